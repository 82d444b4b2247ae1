"""Sync: which process adds up what, and when."""
