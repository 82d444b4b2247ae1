"""What fits: how much memory an update takes at each micro-batch size, and how long a sample takes."""
