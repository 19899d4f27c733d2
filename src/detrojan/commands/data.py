"""Says what a study's data sets hold, before any job: reads the sources as the job ``dataset`` does."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import pydantic

from detrojan.commands.plan import DEFAULT_STUDY
from detrojan.stages import data_card, ingest
from detrojan.study import feasibility
from detrojan.study.files import load_study, read
from detrojan.study.schema import Dataset
from detrojan.workflow import sources


def main(files: Sequence[Path]) -> bool:
    """Print what each data set of a study is; return whether all of them can be used.

    Args:
        files: study files, of which later ones win; the Snakefile's own if there are none.

    Raises:
        ValueError: a study file is missing or has mistakes.
    """
    study, usable = load_study(read(files or [DEFAULT_STUDY])), True
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    for name in sources.of(study):
        click.echo(f"{name}:")
        try:
            for line in told(name, study.datasets[name]):
                click.echo(f"  {line}")
        except pydantic.ValidationError as error:
            usable = False
            for line in feasibility.wrong_source(error, name, study.datasets[name]):
                click.echo(f"  {line}")
        except (ValueError, OSError) as error:
            usable = False
            click.echo(f"  {error}")
    return usable


def told(name: str, dataset: Dataset) -> Iterator[str]:
    """Yield lines that say what a data set is.

    Raises:
        ValueError: it can't be used, and why.
    """
    _, card = ingest.build_with_card(
        sources.load(dataset), name=name, augmentation=dataset.augmentation, **dataset.options
    )
    yield from data_card.lines(card)
