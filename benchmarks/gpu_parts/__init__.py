"""The parts of ``benchmarks/gpu.py``, in the order of their worth, and what they share."""
