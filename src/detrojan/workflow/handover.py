"""What a run hands to its jobs on other machines: the study and the code that it began with, and its retries.

Each of a cluster's jobs parses the Snakefile again. It would read a study file that was edited since the run
began, and would take code that was edited since for the code that its results were planned with. So the
run writes both into a file when it begins, and its jobs are told to read that in place of the study files.
Its name is a digest of what is in it: a later run, of another study, leaves it as it is.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from detrojan.workflow import graph

FOLDER = Path(".snakemake", "runs")
# Beside the keys of a study.
CODE, IMAGES, CLASSES, RETRIES = "planned_code", "planned_images", "planned_classes", "retries"


class Planned(NamedTuple):
    """What a run has planned with: nothing in the run itself, which finds out.

    Attributes:
        code: digests, by :func:`.graph.code_key`.
        images: which ones each data set has, see :mod:`detrojan.workflow.sources`.
        classes: how many each data set has.
    """

    code: dict[str, str]
    images: dict[str, str]
    classes: dict[str, int]


def give(
    workflow: Any,
    raw: Mapping[str, Any],
    images: Mapping[str, str],
    classes: Mapping[str, int],
    networks: Iterable[str] = (),
) -> None:
    """Let the jobs of Snakemake's ``workflow`` have the study ``raw``, as parsed, and what is there now.

    That is the code, that of ``networks`` of others too, and the ``images`` and ``classes`` of each data
    set, see :class:`Planned`.
    """
    from detrojan.storage import records  # pyarrow, which each of a cluster's jobs would load

    own = {
        CODE: graph.all_code(networks),
        IMAGES: dict(images),
        CLASSES: dict(classes),
        RETRIES: workflow.execution_settings.retries,
    }
    text = yaml.safe_dump({**raw, **own}, sort_keys=False, allow_unicode=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = FOLDER / f"{name}.yaml"
    records.write_text(text, path)
    # What Snakemake tells each job in its command: --configfiles.
    workflow.config_settings.configfiles = [path.absolute()]


def take(config: dict[str, Any]) -> Planned:
    """Return what the run has planned with; leave the study in ``config``."""
    return Planned(config.pop(CODE, {}), config.pop(IMAGES, {}), config.pop(CLASSES, {}))


def given(folder: Path) -> dict[str, str]:
    """Return the digests of code that the one run of a working folder has handed over; empty if none has."""
    found: dict[str, str] = {}
    for path in (folder / FOLDER).glob("*.yaml"):
        found |= yaml.safe_load(path.read_text(encoding="utf-8"))[CODE]
    return found


def retries(config: dict[str, Any]) -> int | None:
    """Return how often jobs that fail are tried again, and leave the study in ``config``.

    None in the run itself, which knows. Its jobs on other machines are told by Snakemake that there are
    none: it is the run that tries again.
    """
    found: int | None = config.pop(RETRIES, None)
    return found
