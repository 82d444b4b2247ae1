"""Checkpoints that survive a kill: written whole or not at all, checked before they are used."""
