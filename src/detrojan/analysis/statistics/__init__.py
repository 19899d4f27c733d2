"""The tables of a study and the statistics in them."""
