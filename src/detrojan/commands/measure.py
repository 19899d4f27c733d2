"""Measures a finished study anew from the predicted classes that it keeps.

``python -m detrojan.commands.measure`` writes ``results/tables/measures.parquet``, needs neither GPU nor
weights, and leaves the rest of the study alone. With ``KEY=VALUE``, such as ``attack=badnets spc=10``,
only these cells are measured.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track

from detrojan.analysis.report.views import counted
from detrojan.analysis.statistics import predictions
from detrojan.analysis.statistics.predictions import MEASURES, Measure, Reader
from detrojan.cells import Shard
from detrojan.storage import records
from detrojan.study.site import KEYS, Axes, Site, axes_of, no_match, parse_axes

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


def planned(site: Site, given: Axes) -> list[Shard]:
    """Return the shards of the study that have cells with the values ``given``.

    Raises:
        ValueError: there are none, or it is not known what the study plans.
    """
    if site.study is None:
        raise ValueError(
            f"{site.results}: no study.yaml, so what was planned here is not known; name the folder of "
            "results of a study that was run, with --results"
        )
    shards = list(site.planned_shards(given))
    if not shards:
        everything = [axes_of(cell) for cell in site.planned({})]
        raise ValueError(no_match("cell", given, everything))
    return shards


def write(
    reader: Reader, shards: Iterable[Shard], given: Axes, measures: Mapping[str, Measure], path: Path
) -> Made:
    """Write the table ``MEASURES`` of ``shards`` to ``path``, a few of them in memory at a time.

    Args:
        reader: of the results.
        shards: those that were evaluated.
        given: with a draw, only that one is measured.
        measures: by name.
        path: of the table.
    """
    num_shards = num_cells = num_rows = 0
    with records.whole(path) as partial, pq.ParquetWriter(partial, MEASURES, compression="zstd") as writer:
        waiting: list[pa.Table] = []
        for shard in shards:
            draws = [int(given["draw"])] if "draw" in given else shard.draws.numbers()
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
            "have no predictions. `python -m detrojan.commands.status` says how far the study is."
        )


def _arguments() -> argparse.ArgumentParser:
    first_lines = {
        name: (function.__doc__ or "").splitlines()[0] for name, function in predictions.REGISTRY.items()
    }
    listed = "\n".join(f"  {name:20} {line.removeprefix('Return ')}" for name, line in first_lines.items())
    parser = argparse.ArgumentParser(
        prog="python -m detrojan.commands.measure",
        description=__doc__,
        epilog=f"measures:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cells", nargs="*", metavar="KEY=VALUE", help=f"keys: {', '.join(KEYS)}")
    parser.add_argument("--only", default="", metavar="NAMES", help="measures, with commas between; else all")
    parser.add_argument("--results", default="results", type=Path, help="the folder of results")
    parser.add_argument("--into", type=Path, metavar="FILE", help="instead of tables/measures.parquet")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what ``arguments`` select; return the exit code."""
    asked = _arguments().parse_intermixed_args(arguments)
    began = time.perf_counter()
    try:
        given = parse_axes(asked.cells)
        measures = named([name for name in asked.only.split(",") if name])
        site = Site(asked.results)
        reader = Reader(site)
        shards = planned(site, given)
        there = [shard for shard in shards if reader.is_there(shard)]
        if not there:
            raise ValueError(
                f"{site.results}: no predictions of {counted(len(shards), 'planned shard')}, such as "
                f"{reader.file(shards[0])}; run the workflow first"
            )
        path = asked.into or site.table("measures")
        shown = track(there, "measuring", console=Console(stderr=True), disable=not sys.stderr.isatty())
        made = write(reader, shown, given, measures, path)
    except ValueError as error:
        print(f"detrojan.commands.measure: {error}", file=sys.stderr)  # noqa: T201
        return 1
    seconds = time.perf_counter() - began
    print(*_said(made, measures, len(shards) - len(there), path, seconds), sep="\n")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
