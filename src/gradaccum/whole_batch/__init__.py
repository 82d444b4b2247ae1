"""Losses and layers that see the whole batch: two passes, lockstep, BatchNorm."""
