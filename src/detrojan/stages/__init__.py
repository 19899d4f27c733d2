"""What the rules do, one module a stage: from a source of images to the metrics of a cell."""
