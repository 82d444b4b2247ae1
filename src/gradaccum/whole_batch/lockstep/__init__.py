"""Micro-batches in lockstep, for layers that see the whole batch. See README.md."""
