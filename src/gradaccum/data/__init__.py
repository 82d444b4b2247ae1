"""Data: which samples make which batch, and which process has which of them."""
