"""Methods that are given clean images too, SPC of each class."""
