"""From the metrics of single cells to tables, figures and the report."""
