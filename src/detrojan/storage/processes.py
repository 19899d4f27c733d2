"""Whether a process that left a note is still at work."""

import contextlib
import os
import socket
from pathlib import Path


def is_at_work(host: str, pid: int, since: float) -> bool | None:
    """Return whether a process runs; None if it belongs to another machine, which can't be told from here.

    Args:
        host: name of its machine.
        pid: its number there.
        since: a time when it ran, seconds since 1970.
    """
    if host != socket.gethostname():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    # A number that was given anew belongs to a process that started later.
    with contextlib.suppress(OSError, ValueError):
        return _started(pid) <= since + 1
    return True


def booted() -> float:
    """Return when this machine started, seconds since 1970; 0 where that can't be told."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/stat").read_text().splitlines():
            if line.startswith("btime"):
                return float(line.split()[1])
    return 0.0


def _started(pid: int) -> float:
    """Return when a process of this machine started, seconds since 1970 (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return booted() + float(fields[19]) / os.sysconf("SC_CLK_TCK")
