"""Methods that are given the model alone."""
