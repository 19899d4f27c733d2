"""What a run hands to its jobs on other machines: the study and the code that it began with.

Each of a cluster's jobs parses the Snakefile again. It would read a study file that was edited since the run
began, and would take code that was edited since for the code that its results were planned with. So the
run writes both into a file when it begins, and its jobs are told to read that in place of the study files.
Its name is a digest of what is in it: a later run, of another study, leaves it as it is.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from detrojan.workflow import graph

FOLDER = Path(".snakemake", "runs")
CODE, IMAGES = "planned_code", "planned_images"  # beside the keys of a study


def give(workflow: Any, raw: Mapping[str, Any], images: Mapping[str, str]) -> None:
    """Let the jobs of Snakemake's ``workflow`` have the study ``raw``, as parsed, and what is there now.

    That is the code, and which ``images`` each data set has, see :mod:`detrojan.workflow.sources`.
    """
    planned = {CODE: graph.all_code(), IMAGES: dict(images)}
    text = yaml.safe_dump({**raw, **planned}, sort_keys=False, allow_unicode=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    FOLDER.mkdir(parents=True, exist_ok=True)
    partial, path = FOLDER / f".{name}.partial", FOLDER / f"{name}.yaml"
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    # What Snakemake tells each job in its command: --configfiles.
    workflow.config_settings.configfiles = [path.absolute()]


def take(config: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the planned digests of code and the images; leave the study in ``config``.

    None in the run itself, which plans with those of now.
    """
    return config.pop(CODE, {}), config.pop(IMAGES, {})
