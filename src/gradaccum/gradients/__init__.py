"""Where gradients add up, and in what."""
