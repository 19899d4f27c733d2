"""What every script does first and last: cell, log, random state, one clear line on bad input.

The only module that knows Snakemake's script object and its wildcards.
"""

import contextlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detrojan.cells import Cell
from detrojan.registry import PACKAGE

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def run(snakemake: Any) -> Iterator[Cell]:
    """Yield the job's cell; log to the rule's log file and, from warnings up, to the terminal.

    Bad input that our code refuses (``ValueError``, ``OSError``) and divergence end the job with one
    line that names the rule and the cell, in the log and on the terminal. Any other error is a bug
    and shows its traceback too.
    """
    # What a job may know stands in its inputs, wildcards and params, or it could not rerun when that
    # changes. The config also holds paths of test data, which a defense must not see.
    snakemake.config.clear()
    cell = Cell.from_wildcards(dict(snakemake.wildcards.items()))
    _log_to(Path(snakemake.log[0]))
    _configure_torch(snakemake.threads)
    where = f"rule {snakemake.rule}, {cell}" if str(cell) else f"rule {snakemake.rule}"
    logger.info("%s", where)
    started = time.monotonic()
    try:
        yield cell
    except Exception as error:
        if isinstance(error, (ValueError, OSError, ArithmeticError)) and _is_ours(error):
            logger.error("%s: %s", where, error)
            raise SystemExit(1) from None
        error.add_note(f"({where})")
        logger.exception("%s: a bug", where)
        raise
    logger.info("done in %.1f s", time.monotonic() - started)


def device() -> "torch.device":
    """Return the GPU if the job sees one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _is_ours(error: Exception) -> bool:
    """Return whether our own code raised ``error``; what a library raises is a bug of ours."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised_in).is_relative_to(PACKAGE)


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(path, mode="w")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.WARNING)
    terminal.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[file, terminal], force=True)


def _configure_torch(threads: int) -> None:
    """Make torch deterministic and give it the job's threads, if the script has imported it at all."""
    if "torch" not in sys.modules:
        return
    import torch

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts, which is later
    # Only a warning where there is no deterministic algorithm: on a GPU, VGG's average pooling to 7×7.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    torch.set_num_threads(threads)
