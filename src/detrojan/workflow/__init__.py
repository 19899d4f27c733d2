"""What Snakemake's jobs need around their work: log and signals, attempts, GPUs, what to ask of a scheduler.

Nothing that computes a number imports it.
"""
