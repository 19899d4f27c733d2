"""The tests. They, and what they start, compute with one thread, since each worker has a core."""

import os

# Read by numerical libraries when they are loaded, so before the first of them is.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
