"""Which GPUs this machine offers, and a GPU for each job: never two jobs on one unless asked.

On a cluster the scheduler gives each job its GPUs. On one machine nobody does, so a job takes a lock
on a GPU and holds it until its process ends, however it ends. Free of torch: the Snakefile counts GPUs.
"""

import contextlib
import fcntl
import logging
import os
import stat
import tempfile
import time
from pathlib import Path

logger = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"
JOBS_PER_GPU = "DETROJAN_JOBS_PER_GPU"
DRIVER = Path("/proc/driver/nvidia/gpus")
POLL_SECONDS = 0.5

_held: list[int] = []  # open lock files: closed, and so unlocked, when the process ends


def visible() -> list[str]:
    """Return the names of the GPUs that jobs here may use, as ``CUDA_VISIBLE_DEVICES`` writes them."""
    given = os.environ.get(VISIBLE)
    if given is not None:
        names = [name.strip() for name in given.split(",")]
        # CUDA ignores all that follows a name that stands for nothing.
        return names[: names.index("-1")] if "-1" in names else [name for name in names if name]
    with contextlib.suppress(OSError):
        return [str(number) for number in range(len(list(DRIVER.iterdir())))]
    return []


def jobs_per_gpu() -> int:
    """Return how many jobs may share a GPU: 1, or what ``DETROJAN_JOBS_PER_GPU`` says.

    Raises:
        ValueError: it says no whole number from 1 up.
    """
    text = os.environ.get(JOBS_PER_GPU, "1")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{JOBS_PER_GPU}: should be a whole number from 1 up, found {text!r}")
    return int(text)


def slots() -> int:
    """Return how many jobs can have a GPU of this machine at once."""
    return len(visible()) * jobs_per_gpu()


def claim(folder: Path | None = None) -> str | None:
    """Take a GPU for the rest of this process and show CUDA no other; wait for one if all are taken.

    To call before CUDA starts. Where a cluster's scheduler or nobody offers GPUs, nothing happens.

    Args:
        folder: of the lock files, one for all jobs of a user and machine; by default in the folder of
            temporary files.

    Returns:
        The GPU's name, or None.

    Raises:
        ValueError: the folder is not this user's own, or jobs can't be told to share GPUs as they are.
    """
    names = visible()
    if not names or "SLURM_JOB_ID" in os.environ:
        return None
    folder = folder or Path(tempfile.gettempdir(), f"detrojan-gpus-{os.getuid()}")
    _make_own(folder)
    # Slot by slot, so that jobs share a GPU only when each has one.
    files = [folder / f"{name}.{slot}.lock" for slot in range(jobs_per_gpu()) for name in names]
    told = False
    while True:
        for file in files:
            if _lock(file):
                name = file.name.split(".")[0]
                os.environ[VISIBLE] = name
                return name
        if not told:
            logger.info("all %d GPUs are taken: waiting for one", len(names))
            told = True
        time.sleep(POLL_SECONDS)


def _make_own(folder: Path) -> None:
    """Make ``folder`` if it is not there; refuse one that others could put their files or links into."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if not is_own or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(
            f"{folder}: the locks on GPUs lie there, so it should be a folder of your own that nobody else "
            "may write to; remove it, or set TMPDIR to a folder of yours"
        )


def _lock(path: Path) -> bool:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return False
    _held.append(file)
    return True
