"""Names a part of a study for Snakemake: ``KEY=VALUE ...`` in, the paths of its artifacts out.

    snakemake --profile slurm -R $(python -m detrojan.commands.select attack=badnets defense=ft,fp)

All conditions must be met. A value is one value, several with commas between, or for a number a
comparison, in quotes: ``spc=">=10"``. ``draw=3`` means the shards that hold draw 3.
"""

import argparse
import functools
import signal
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pydantic
from snakemake.common.configfile import load_configfile
from snakemake.utils import update_config
from snakemake_interface_common.exceptions import WorkflowError

from detrojan.cells import MODEL_AXES, NO_METHOD, Shard, ratio_text
from detrojan.commands import status
from detrojan.study import files, grid
from detrojan.study.schema import FILTER_AXES, Filter, NumberCondition, Study
from detrojan.workflow import graph

KEYS = (*FILTER_AXES, "draw")
MOST_SHOWN = 20  # values that a message lists


class Condition(Filter):
    """A condition on one axis, as in the filters of study files, or on the draws of a shard."""

    draw: NumberCondition = None

    @functools.cached_property
    def conditions(self) -> dict[str, str | list[str] | list[float]]:
        """The axis that is given, with its condition."""
        return super().conditions if self.draw is None else {"draw": self.draw}

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Return the condition that ``text`` writes, ``KEY=VALUE``.

        Raises:
            ValueError: it is none.
        """
        key, equals, value = text.partition("=")
        if not equals or key not in KEYS:
            raise ValueError(f"{text!r} is no condition: write KEY=VALUE, with a key of {', '.join(KEYS)}")
        if not value.strip():
            raise ValueError(f"{text!r} has no value: write KEY=VALUE")
        try:
            return cls.model_validate({key: value.split(",") if "," in value else value})
        except pydantic.ValidationError as error:
            said = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
            raise ValueError(f"{text}: {said}") from None

    def holds(self, shard: Shard) -> bool:
        """Return whether ``shard`` meets it."""
        ((axis, condition),) = self.conditions.items()
        # As in study files, no comparison is met by a clean model's ratio and a data-free method's SPC,
        # which are written as 0. But here a row of a table may be named as it stands there.
        return any(
            self.matches({axis: value}) or (isinstance(condition, list) and value in condition)
            for value in _values(shard, axis)
        )


class Part(NamedTuple):
    """A job of the study.

    Attributes:
        path: what to ask Snakemake for.
        result: the file that is there when the job and what belongs to it are done.
        place: the part of the grid, as :class:`detrojan.commands.status.Job` has it.
    """

    path: str
    result: str
    place: str


def shards(study: Study, conditions: Sequence[Condition]) -> list[Shard]:
    """Return the shards of the study that meet all conditions.

    Raises:
        ValueError: there are none; the message says what there is.
    """
    planned = list(grid.shards(study))
    selected = [shard for shard in planned if all(condition.holds(shard) for condition in conditions)]
    if not selected:
        for condition in conditions:
            if not any(map(condition.holds, planned)):
                raise ValueError(_matches_nothing(condition, planned))
        raise ValueError("each condition matches some of the study, but nothing meets all of them")
    return selected


def parts(shards: Iterable[Shard], stage: str) -> Iterator[Part]:
    """Yield the jobs of ``shards`` in a stage: ``defend``, ``evaluate``, or ``train``, a job a model."""
    if stage == "train":
        for model in dict.fromkeys(shard.model for shard in shards):
            card = graph.model_card(model)
            yield Part(card, card, graph.of_model(model))
        return
    for shard in shards:
        metrics = graph.metrics(shard)
        defended = stage == "defend" and shard.defense != NO_METHOD
        yield Part(graph.defended(shard) if defended else metrics, metrics, graph.of_shard(shard))


def died(results: Path, stage: str) -> set[str]:
    """Return the places of the stage's jobs that died, at their last attempt."""
    rules = status.MODEL_RULES if stage == "train" else status.SHARD_RULES
    return {job.place for job in status.jobs(results) if job.record.rule in rules and job.state != "running"}


def _values(shard: Shard, axis: str) -> Sequence[Any]:
    if axis == "draw":
        return shard.draws.numbers()
    return [getattr(shard.model if axis in MODEL_AXES else shard, axis)]


def _matches_nothing(condition: Condition, planned: Iterable[Shard]) -> str:
    ((axis, asked),) = condition.conditions.items()
    # Draws as the ranges that paths name.
    found = sorted({shard.draws if axis == "draw" else _values(shard, axis)[0] for shard in planned})
    there = [ratio_text(value) if isinstance(value, float) else str(value) for value in found]
    more = f" and {len(there) - MOST_SHOWN} more" if len(there) > MOST_SHOWN else ""
    values = asked if isinstance(asked, list) else [asked]
    what = ", ".join(value if isinstance(value, str) else f"{value:g}" for value in values)
    return f"nothing has {axis} {what}; there is {', '.join(there[:MOST_SHOWN])}{more}"


def _study(results: Path, configfiles: Collection[Path]) -> Study:
    """Return the study of these files, merged as Snakemake does; without any, the one that was run last."""
    if not configfiles:
        return files.load_study(files.kept(results))
    merged: dict[str, Any] = {}
    for file in configfiles:
        if not file.is_file():
            hint = "; conditions stand before --configfile" if "=" in file.name else ""
            raise ValueError(f"{file}: no such study file{hint}")
        try:
            update_config(merged, load_configfile(file))
        except WorkflowError as error:
            raise ValueError(f"{file}: {error}") from error
    return files.load_study(merged)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m detrojan.commands.select",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("conditions", nargs="*", metavar="KEY=VALUE", help=f"keys: {', '.join(KEYS)}")
    parser.add_argument("--results", default="results", type=Path, help="the folder of results")
    parser.add_argument(
        "--configfile", nargs="+", default=[], type=Path, metavar="FILE", help="instead of the study run last"
    )
    parser.add_argument(
        "--stage",
        choices=("defend", "evaluate", "train"),
        default="defend",
        help="print what is defended (the default; for untouched models, their metrics), the metrics, or "
        "the cards of the models",
    )
    parser.add_argument("--missing", action="store_true", help="only where no metrics, or no card, are there")
    parser.add_argument("--failed", action="store_true", help="only what died at its last attempt")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the paths that ``arguments`` select; return the exit code."""
    asked = _arguments().parse_intermixed_args(arguments)
    try:
        conditions = [Condition.parse(text) for text in asked.conditions]
        selected = list(parts(shards(_study(asked.results, asked.configfile), conditions), asked.stage))
        kept = selected
        if asked.missing:
            kept = [part for part in kept if status.made(asked.results, part.result) is None]
        if asked.failed:
            dead = died(asked.results, asked.stage)
            kept = [part for part in kept if part.place in dead]
        if not kept:
            lacks = ["is missing"] * asked.missing + ["has died"] * asked.failed
            raise ValueError(f"none of the {len(selected):,} selected {' and '.join(lacks)}")
    except ValueError as error:
        print(f"detrojan.commands.select: {error}", file=sys.stderr)  # noqa: T201
        return 1
    print(*(part.path for part in kept), sep="\n")  # noqa: T201
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
    sys.exit(main())
