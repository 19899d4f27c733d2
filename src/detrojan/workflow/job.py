"""What every script does first and last: cell, log, random state, one clear line on bad input.

The only module that knows Snakemake's script object and its wildcards.
"""

import contextlib
import functools
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from detrojan.cells import Cell
from detrojan.errors import FaultError, StoppedError, told
from detrojan.learning import determinism
from detrojan.registry import NETWORK, PACKAGE
from detrojan.storage import records
from detrojan.workflow import gpus, graph
from detrojan.workflow.attempts import Diary

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# How schedulers tell a job to stop, before they kill it.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


@contextlib.contextmanager
def run(snakemake: Any) -> Iterator[Cell]:
    """Yield the job's cell; log to the rule's log file and, from warnings up, to the terminal.

    Bad input that our code refuses (``ValueError``, ``OSError``), divergence and faults of the machine,
    such as a full disk, end the job with one line that names the rule and the cell, in the log and on
    the terminal. Any other error is a bug and shows its traceback too. A signal that asks the job to stop
    ends it cleanly: what was half written is removed, and training goes on after its last epoch when the
    job is started again.
    """
    # What a job may know stands in its inputs, wildcards and params, or it could not rerun when that
    # changes. The config also holds paths of test data, which a defense must not see.
    snakemake.config.clear()
    # Nothing is downloaded: timm would ask a hub for weights if someone let it.
    os.environ["HF_HUB_OFFLINE"] = "1"
    cell = Cell.from_wildcards(dict(snakemake.wildcards.items()))
    # A rule without a log of its own adds to an earlier one's: a large study then has one a shard.
    log = Path(snakemake.log[0] if snakemake.log else snakemake.params.log)
    _log_to(log, mode="w" if snakemake.log else "a")
    determinism.configure(snakemake.threads)
    where = f"rule {snakemake.rule}, {cell}" if str(cell) else f"rule {snakemake.rule}"
    diary = Diary(graph.known(snakemake.rule), cell.axes, str(log))
    limits = snakemake.resources
    _stop_on_signals()
    logger.info("%s", where)
    started = time.monotonic()
    try:
        diary.start(mem_mb=limits.get("mem_mb"), runtime_min=limits.get("runtime"))
        for output in snakemake.output:
            records.sweep(output)
        _check_code(snakemake)
        yield cell
    except (StoppedError, KeyboardInterrupt) as stop:
        reason = f"told to stop by {stop or 'SIGINT'}"
        diary.end("stopped", reason)
        logger.warning("%s: %s after %.0f s", where, reason, time.monotonic() - started)
        raise SystemExit(128 + signal.SIGTERM) from None
    except Exception as error:
        # A full disk is no bug, whoever met it.
        shown = told(error) if isinstance(error, OSError) else error
        diary.end("failed", f"{type(shown).__name__}: {shown}".splitlines()[0])
        ours = isinstance(error, (ValueError, OSError, ArithmeticError)) and _is_ours(error)
        if ours or isinstance(shown, FaultError):
            logger.error("%s: %s", where, shown)
            raise SystemExit(1) from None
        error.add_note(f"({where})")
        logger.exception("%s: a bug", where)
        raise
    logger.info("done in %.1f s", time.monotonic() - started)
    diary.done()


def _check_code(snakemake: Any) -> None:
    """Refuse to run code other than that which the job was planned with: its results would say that.

    Raises:
        ValueError: it was edited since.
    """
    named = {
        **dict(snakemake.wildcards.items()),
        "source": snakemake.params.get("source"),
        NETWORK: (snakemake.params.get("architecture") or {}).get(NETWORK),
    }
    found, planned = graph.code_digest(graph.known(snakemake.rule), named), snakemake.params.code
    if found != planned:
        raise ValueError(
            f"the code was edited since the run began: it is {found}, the job was planned with {planned}; "
            "start the run again, or put the code back"
        )


def _stop_on_signals() -> None:
    def stop(number: int, _frame: object) -> NoReturn:
        for other in STOP_SIGNALS:  # once is enough: schedulers repeat themselves
            signal.signal(other, signal.SIG_IGN)
        raise StoppedError(signal.Signals(number).name)

    for number in STOP_SIGNALS:
        signal.signal(number, stop)


@functools.cache
def device() -> "torch.device":
    """Return the GPU if the job has or finds one, else the CPU; see :func:`detrojan.workflow.gpus.claim`."""
    import torch

    gpus.claim()

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _is_ours(error: Exception) -> bool:
    """Return whether our own code raised ``error``; what a library raises is a bug of ours."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised_in).is_relative_to(PACKAGE)


class _LogFile(logging.FileHandler):
    """A log that loses lines, and says nothing of it, when the disk is full."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, logging's name
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def _log_to(path: Path, *, mode: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _LogFile(path, mode=mode)
    except OSError as error:
        raise SystemExit(f"ERROR: {told(error)}") from None
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.WARNING)
    terminal.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[file, terminal], force=True)
