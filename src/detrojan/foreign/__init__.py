"""Models that somebody else trained: their files are read here, and nothing in them is ever run.

:func:`read` gives the tensors of a file and what it says of them, :mod:`~detrojan.foreign.mapping` brings
them under the names of our architectures. docs/foreign-models.md says which kinds are read, and why that
is safe.
"""

from detrojan.foreign.checkpoints import Checkpoint, read
from detrojan.foreign.configs import Known

__all__ = ["Checkpoint", "Known", "read"]
