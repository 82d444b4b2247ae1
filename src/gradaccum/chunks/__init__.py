"""Micro-batches inside the sample: the rows of the last layer in chunks."""
