"""The figures of a report, one a file, which is found by its name."""
