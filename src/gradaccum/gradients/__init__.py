"""Where gradients add up."""
