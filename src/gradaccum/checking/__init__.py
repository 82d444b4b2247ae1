"""What every check of a model is made of: gradients compared, runs that leave nothing behind, the same random draws."""
