"""What a device holds: what is left of it, what a computation takes of it, and when it ran out."""
