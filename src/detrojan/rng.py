"""Random streams keyed by what they belong to, never by the order of calls.

A cell meets the same random numbers alone, inside a shard, locally or on a cluster, and a new cell
shifts none of the old ones, because each stream's seed is a digest of names. Torch is imported where a
stream is asked for: the tables take seeds alone, and are read without torch.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Name = str | int | float


def seed(*names: Name) -> int:
    """Return the 63-bit seed that belongs to ``names``; equal names give equal seeds."""
    digest = hashlib.sha256(json.dumps(names).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stream(*names: Name) -> "torch.Generator":
    """Return a CPU generator seeded by ``names``.

    Random numbers are drawn on the CPU and then moved, so that a GPU run draws what a CPU run draws.
    """
    import torch

    return torch.Generator().manual_seed(seed(*names))


def child(rng: "torch.Generator", *names: Name) -> "torch.Generator":
    """Return the stream ``names`` of ``rng``: it depends on the seed of ``rng``, not on its state.

    So what one part of a method draws never shifts what another part draws.
    """
    return stream(rng.initial_seed(), *names)


@contextlib.contextmanager
def global_stream(rng: "torch.Generator") -> Iterator[None]:
    """Give layers that draw from torch's global generators (dropout) the stream ``rng``.

    The global states of the CPU and of the GPU in use are as before when the block ends.
    """
    import torch

    # Asking a GPU for its state would start a context on it, and take its memory.
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = [torch.cuda.current_device()] if started else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(rng.initial_seed())
        yield
