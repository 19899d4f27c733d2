"""Measures a finished study anew from the predicted classes that it keeps.

It writes ``tables/measures.parquet``, needs neither GPU nor weights, and leaves the rest of the study alone.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import pyarrow as pa
from rich.console import Console
from rich.progress import track

from detrojan.analysis.report.views import counted
from detrojan.analysis.statistics import predictions
from detrojan.analysis.statistics.predictions import MEASURES, Measure, Reader
from detrojan.cells import Shard
from detrojan.storage import records
from detrojan.study import conditions
from detrojan.study.conditions import Condition
from detrojan.workflow.site import Site

ROWS_AT_ONCE = 250_000  # about 30 MB of memory; a row group of the file


class Made(NamedTuple):
    """What was measured: shards, cells, and rows of the table."""

    num_shards: int
    num_cells: int
    num_rows: int


def named(texts: Sequence[str]) -> dict[str, Measure]:
    """Return the measures of these names; all of them without any.

    Raises:
        ValueError: there is no such measure.
    """
    for text in texts:
        if text not in predictions.REGISTRY:
            raise ValueError(f"--only: unknown measure {text!r}; there are {', '.join(predictions.REGISTRY)}")
    return {name: predictions.REGISTRY[name] for name in texts} if texts else dict(predictions.REGISTRY)


def planned(site: Site, asked: Sequence[Condition]) -> list[Shard]:
    """Return the shards of the study that have cells which meet the conditions ``asked``.

    Raises:
        ValueError: there are none, or it is not known what the study plans.
    """
    if site.study is None:
        raise ValueError(
            f"{site.results}: no study.yaml, so what was planned here is not known; name the folder of "
            "results of a study that was run, with --results"
        )
    return conditions.shards(site.study, asked)


def write(
    reader: Reader,
    shards: Iterable[Shard],
    asked: Sequence[Condition],
    measures: Mapping[str, Measure],
    path: Path,
) -> Made:
    """Write the table ``MEASURES`` of ``shards`` to ``path``, a few of them in memory at a time.

    Args:
        reader: of the results.
        shards: those that were evaluated.
        asked: conditions; those on draws say which of a shard are measured.
        measures: by name.
        path: of the table.
    """
    num_shards = num_cells = num_rows = 0
    of_draws = [condition for condition in asked if condition.axis == "draw"]
    with records.table_writer(path, MEASURES) as writer:
        waiting: list[pa.Table] = []
        for shard in shards:
            draws = [draw for draw in shard.draws.numbers() if all(one.admits(draw) for one in of_draws)]
            waiting.append(predictions.rows(reader, shard, draws, measures))
            num_shards, num_cells = num_shards + 1, num_cells + len(draws)
            num_rows += len(waiting[-1])
            if sum(map(len, waiting)) >= ROWS_AT_ONCE:
                writer.write_table(pa.concat_tables(waiting))
                waiting.clear()
        if waiting:
            writer.write_table(pa.concat_tables(waiting))
    return Made(num_shards, num_cells, num_rows)


def _said(
    made: Made, measures: Mapping[str, Measure], left_out: int, path: Path, seconds: float
) -> Iterator[str]:
    yield f"{path}: {made.num_rows:,} rows, {counted(len(measures), 'measure')} of {made.num_cells:,} cells."
    yield f"{made.num_shards:,} shards in {seconds:.1f} s, {made.num_shards / seconds:.0f} a second."
    if left_out:
        yield (
            f"{left_out:,} more are planned and were left out: they, or the untouched models beside them, "
            "have no predictions. `detrojan status` says how far the study is."
        )


def listed() -> Iterator[str]:
    """Yield a line a measure, its name and what it is."""
    for name, function in predictions.REGISTRY.items():
        first = (function.__doc__ or "").splitlines()[0]
        yield f"{name:20} {first.removeprefix('Return ')}"


def main(texts: Sequence[str], only: Sequence[str], results: Path, into: Path | None) -> None:
    """Measure a part of a study, and say what was measured.

    Args:
        texts: conditions as ``KEY=VALUE``; all must be met.
        only: names of measures; all if there are none.
        results: the study's folder of results.
        into: the table to write; ``tables/measures.parquet`` if None.

    Raises:
        ValueError: there is nothing to measure, or a file is broken.
    """
    began = time.perf_counter()
    asked = conditions.parse(texts)
    measures = named(only)
    site = Site(results)
    reader = Reader(site)
    shards = planned(site, asked)
    there = [shard for shard in shards if reader.is_there(shard)]
    if not there:
        raise ValueError(
            f"{site.results}: no predictions of {counted(len(shards), 'planned shard')}, such as "
            f"{site.predictions(shards[0])}; run the workflow first"
        )
    path = into or site.table("measures")
    shown = track(there, "measuring", console=Console(stderr=True), disable=not sys.stderr.isatty())
    made = write(reader, shown, asked, measures, path)
    seconds = time.perf_counter() - began
    click.echo("\n".join(_said(made, measures, len(shards) - len(there), path, seconds)))
