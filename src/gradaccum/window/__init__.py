"""How the micro-batches of one update are run."""
