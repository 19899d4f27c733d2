"""Runs a command and says how much memory it took at most, with all that it started, on Linux.

    python benchmarks/memory.py snakemake --profile local --cores 2

What processes share, such as the libraries of forks of one process, counts once (their PSS). Besides, it says
the largest sum of resident sets, in which that counts for each process, as some limits on memory have it.
It looks every half second; shorter peaks may be missed.
"""

import contextlib
import subprocess
import sys
import time
from typing import NamedTuple

import psutil

INTERVAL = 0.5  # seconds


class Memory(NamedTuple):
    """Bytes that a command and all that it started hold: shared ones once, and once for each process."""

    shared_once: int
    resident: int


def held(process: psutil.Process) -> Memory:
    """Return what a process and all that it started hold now."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):  # it has ended
                told = one.memory_full_info()
                found.append((told.pss, told.rss))
    return Memory(*(sum(column) for column in zip(*found, strict=True))) if found else Memory(0, 0)


def peak(command: list[str]) -> tuple[int, Memory]:
    """Run a command to its end; return its exit code and the most that it held of either kind."""
    started = psutil.Process(subprocess.Popen(command).pid)
    most = Memory(0, 0)
    while True:
        try:
            return started.wait(INTERVAL), most
        except psutil.TimeoutExpired:
            most = Memory(*map(max, most, held(started)))


def main() -> int:
    """Run the command that the command line names; return its exit code."""
    began = time.monotonic()
    code, most = peak(sys.argv[1:])
    print(
        f"It took {(time.monotonic() - began) / 60:.1f} minutes and at most {most.shared_once / 1e9:.2f} GB,"
    )
    print(f"what is shared counted once; the resident sets came to {most.resident / 1e9:.2f} GB.")
    return code


if __name__ == "__main__":
    sys.exit(main())
