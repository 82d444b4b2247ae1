"""How large micro-batches are: what fits, what is fastest, and what happens when one does not fit."""
