"""The tables that follow from cells and models, one a file, which is found by its name."""
