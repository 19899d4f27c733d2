"""Has Snakemake read study files as strictly as we do, before it makes anything of them.

Snakemake reads ``--configfile`` before the Snakefile, runs the Python that stands in it if the file asks for
that (``__use_yte__``), and lets the last of two equal keys win. Nothing in a Snakefile could refuse it by
then. What Snakemake loads earlier is the package of our logger, which calls :func:`apply`.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import snakemake.common.configfile
import snakemake.settings.types
from snakemake_interface_common.exceptions import WorkflowError

from detrojan.registry import CHECKOUT
from detrojan.study import yaml_text

# Where Snakemake looks when its command names no Snakefile.
USUAL = ("Snakefile", "snakefile", "workflow/Snakefile", "workflow/snakefile")


def apply() -> None:
    """Change how this process's Snakemake reads config files, if it runs our Snakefile."""
    usual = snakemake.common.configfile.load_configfile
    if getattr(usual, "__wrapped__", None) is not None:
        return

    @functools.wraps(usual)
    def load(path: Any) -> Any:
        if not runs_ours(sys.argv[1:]):
            return usual(path)
        try:
            return yaml_text.read(Path(path))
        except ValueError as error:
            raise WorkflowError(str(error)) from None

    snakemake.common.configfile.load_configfile = load
    snakemake.settings.types.load_configfile = load  # it has the name from there


def runs_ours(arguments: Sequence[str]) -> bool:
    """Return whether Snakemake, with these arguments, runs our Snakefile: others' files are their matter."""
    named = [text.rpartition("=")[2] for text in arguments]
    return any(_is_ours(Path(text)) for text in (*named, *USUAL))


def _is_ours(path: Path) -> bool:
    try:
        return path.samefile(CHECKOUT / "Snakefile")
    except OSError:  # no such file, or no path at all
        return False
