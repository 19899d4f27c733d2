"""The errors that stages tell apart. Everything else is a bug and fails its job."""

import errno
import os


class DivergedError(ArithmeticError):
    """A loss or a weight is not finite: a training job stops, a defense becomes a row."""


class NotApplicableError(ValueError):
    """A defense can't work on this model or with this sample: it becomes a row with the reason."""


class TryAgainError(ValueError):
    """A defense ran out of memory, and its job will be tried again with more: no row yet."""


class StoppedError(BaseException):
    """The job was told to stop by a signal: no error of its own, so that nothing takes it for a result."""


class FaultError(OSError):
    """The machine does not do as it should: the message names the file, the fault and what to do."""


# Of the system's errors, those that are no bug, and what to do about them.
FAULTS = {
    errno.ENOSPC: "make room on this disk, or let results be a link to a larger one",
    errno.EDQUOT: "remove what you need no more, or ask for a larger quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EACCES: "give yourself the right to it (ls -l tells whose it is)",
    errno.EPERM: "give yourself the right to it (ls -l tells whose it is)",
    errno.EROFS: "work where you may write",
    errno.EIO: "the disk or the network fails: ask who runs the machine",
    errno.ESTALE: "the network file system has lost it: ask who runs the machine",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "the machine has too many open files: end what needs them",
}


def told(error: OSError, path: str | os.PathLike[str] | None = None) -> OSError:
    """Return ``error``; if it is a fault of the machine's, as a ``FaultError`` that says so on one line.

    Args:
        error: what the system or a library raised.
        path: of the file that was read or written, if it is not the one that ``error`` names.
    """
    if isinstance(error, FaultError) or error.errno not in FAULTS:
        return error
    where = path or error.filename
    said = f"{os.strerror(error.errno)}; {FAULTS[error.errno]}, and run the workflow again"
    return FaultError(f"{os.fsdecode(where)}: {said}" if where else said)
