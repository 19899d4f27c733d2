"""The graph of jobs, and what jobs need around their work: log and signals, attempts, GPUs, what to ask for.

Nothing that computes a number imports it.
"""
