"""Names a part of a study for Snakemake: ``KEY=VALUE ...`` in, the paths of its artifacts out."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import click

from detrojan.cells import NO_METHOD, Shard
from detrojan.commands import status
from detrojan.study import conditions, files
from detrojan.study.schema import Study
from detrojan.workflow import graph


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


def _study(results: Path, configfiles: Collection[Path]) -> Study:
    """Return the study of these files, merged as Snakemake does; without any, the one that was run last."""
    return files.load_study(files.read(configfiles) if configfiles else files.kept(results))


def main(
    texts: Sequence[str],
    results: Path,
    configfiles: Sequence[Path],
    stage: str,
    *,
    missing: bool,
    failed: bool,
) -> None:
    """Print the paths of a part of a study.

    Args:
        texts: conditions as ``KEY=VALUE``; all must be met.
        results: the study's folder of results.
        configfiles: study files; the study that was run last if there are none.
        stage: see :func:`parts`.
        missing: leave out what is there.
        failed: leave out what did not die.

    Raises:
        ValueError: nothing is left, or a condition or the study is wrong.
    """
    shards = conditions.shards(_study(results, configfiles), conditions.parse(texts))
    selected = list(parts(shards, stage))
    kept = selected
    if missing:
        kept = [part for part in kept if status.made(results, part.result) is None]
    if failed:
        dead = died(results, stage)
        kept = [part for part in kept if part.place in dead]
    if not kept:
        lacks = ["is missing"] * missing + ["has died"] * failed
        raise ValueError(f"none of the {len(selected):,} selected {' and '.join(lacks)}")
    click.echo("\n".join(part.path for part in kept))
