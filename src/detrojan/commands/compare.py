"""Puts other people's results through our analysis, and sets them beside ours.

``python -m detrojan.commands.compare TABLE --mapping MAPPING.yaml [--results results] [--into compare/NAME]``
"""

import argparse
import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv

from detrojan.analysis.others import external, parity
from detrojan.analysis.others.external import TableMapping
from detrojan.analysis.report import report, views
from detrojan.analysis.report.views import Tables
from detrojan.analysis.statistics import derived
from detrojan.analysis.statistics.collect import CELLS
from detrojan.analysis.statistics.gate import describe
from detrojan.analysis.statistics.relative import MEASURED
from detrojan.storage import records

ABOUT = """\
Put other people's results through our analysis: the same tables and the same page as for a study of ours.
With --results also a parity table, which sets theirs beside ours and says how the settings differ.
"""
EXAMPLE = """\
example:
  python -m detrojan.commands.compare leaderboard.csv --results results \\
    --mapping config/external/backdoorbench.yaml

docs/compare.md explains the mapping. A mistake in it, or in the table, ends the command before it writes.
"""
PAIRS_SHOWN = 20  # in the folder's README; the tables have all


def main(arguments: Sequence[str] | None = None) -> int:
    """Analyse the table that ``arguments`` name, print where the results are; return the exit code."""
    asked = _arguments().parse_args(arguments)
    into = asked.into or Path("compare") / asked.mapping.stem
    try:
        mapping = external.load_mapping(asked.mapping)
        cells = external.cells(external.read_table(asked.table), mapping)
        ours = parity.read_ours(asked.results) if asked.results else None
    except ValueError as error:
        print(f"detrojan.commands.compare: {error}", file=sys.stderr)  # noqa: T201
        return 1
    both = parity.parity(cells, ours, mapping) if ours else None
    _write(cells, both, mapping, asked, into)
    print("\n".join(external.notes(cells, mapping)))  # noqa: T201
    if both:
        print("\n".join(_counts(both)))  # noqa: T201
    print(f"\n{into}/README.md says what lies there.")  # noqa: T201
    return 0


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m detrojan.commands.compare",
        description=ABOUT,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", type=Path, metavar="TABLE", help="their results: .csv, .tsv or .parquet")
    parser.add_argument(
        "--mapping", type=Path, required=True, metavar="FILE", help="from its columns to ours, YAML"
    )
    parser.add_argument(
        "--results", type=Path, metavar="FOLDER", help="a study of ours to compare with, such as results"
    )
    parser.add_argument(
        "--into",
        type=Path,
        metavar="FOLDER",
        help="where to write; compare/ and the mapping's name if not given",
    )
    return parser


def _write(
    cells: pa.Table, both: parity.Parity | None, mapping: TableMapping, asked: argparse.Namespace, into: Path
) -> None:
    made = {name: table.make(cells) for name, table in derived.TABLES.items()}
    schemas = {"cells": CELLS, **{name: table.schema for name, table in derived.TABLES.items()}}
    for name, table in {"cells": cells, **made}.items():
        records.write_table(table, into / "tables" / f"{name}.parquet", schemas[name])
    if both:
        for name, (table, schema) in parity.tables(both).items():
            records.write_table(table, into / "tables" / f"{name}.parquet", schema)
            with records.whole(into / "tables" / f"{name}.csv") as partial:
                csv.write_csv(table, partial)
        records.write_text(parity.latex(both.pairs), into / "tables" / "parity.tex")
    lines = [mapping.citation, *external.notes(cells, mapping), *(_counts(both) if both else ())]
    about = report.About(f"{mapping.source}, analysed by Detrojan", lines, _gate(mapping), None)
    report.write(Tables(external.without_costs(cells), **made), about, into / "report")
    records.write_text(asked.mapping.read_text(encoding="utf-8"), into / "mapping.yaml")
    records.write_text("\n".join(_readme(cells, both, mapping, asked)), into / "README.md")


def _gate(mapping: TableMapping) -> str:
    return f"{describe(mapping.gate)} Where the table has no clean model, the ASR alone decides."


# --- what the folder says of itself ----------------------------------------------------------------


def _readme(
    cells: pa.Table, both: parity.Parity | None, mapping: TableMapping, asked: argparse.Namespace
) -> Iterator[str]:
    digest = hashlib.sha256(asked.table.read_bytes()).hexdigest()
    yield f"# {mapping.source}, analysed by Detrojan"
    yield f"\n{mapping.citation.strip()}\n"
    yield f"Read from `{asked.table.name}`, SHA-256 {digest}, by `mapping.yaml`, a copy of "
    yield f"`{asked.mapping.name}`.\n"
    yield f"{_gate(mapping)}\n"
    yield from (f"- {note}" for note in external.notes(cells, mapping))
    yield "\n## Files\n"
    yield "- `report/index.html`: the page, which opens offline; beside it its figures, and its tables as CSV"
    yield "  and LaTeX"
    yield f"- `tables/cells.parquet`, `{'`, `'.join(derived.TABLES)}`: as of a study of ours, see"
    yield "  `docs/tables.md`. Costs are not known: seconds are NaN, counts 0."
    if both:
        yield "- `tables/parity.parquet`, `.csv` and `.tex`: theirs beside ours; `parity_by_defense` and"
        yield "  `parity_agreement` sum it up"
        yield f"\n## Beside ours\n\nOurs are those of `{asked.results}`.\n"
        yield from (f"- {line}" for line in _counts(both))
        yield from _parity_lines(both)
    yield ""


def _counts(both: parity.Parity) -> Iterator[str]:
    """Yield how many pairs there are, and how many of theirs have none."""
    comparable = sum(both.pairs["comparable"].to_pylist())
    yield (
        f"{len(both.pairs)} of theirs stand beside ours, {comparable} of them with the same ratio and an "
        "attack that took on both sides (of the untouched model, whether or not)."
    )
    yield from both.apart
    yield "Without a pair: " + ", ".join(f"{number} ({why})" for why, number in both.left_out.items()) + "."


def _parity_lines(both: parity.Parity) -> Iterator[str]:
    """Yield the sums, and the first pairs, as Markdown tables; percent, ours first."""
    sums = [row for row in parity.by_defense(both.pairs).to_pylist() if row["num_pairs"]]
    if sums:
        yield "\nOurs minus theirs, points, mean over comparable pairs; r: correlation over pairs.\n"
        head = [f"{name.upper()}{of}" for name in MEASURED for of in ("", " r")]
        yield from _markdown(
            ["defense", "pairs", *head],
            (
                [
                    row["defense"] or "all",
                    str(row["num_pairs"]),
                    *(
                        text
                        for name in MEASURED
                        for text in (views.share(row[f"{name}_difference"]), _two(row[f"{name}_correlation"]))
                    ),
                ]
                for row in sums
            ),
        )
        yield "\nDo both rank the defenses alike? Rank correlation in each setting, mean over settings.\n"
        yield from _markdown(
            ["measure", "settings", "Spearman", "Kendall"],
            (
                [
                    row["measure"].upper(),
                    str(row["num_settings"]),
                    _two(row["spearman"]),
                    _two(row["kendall"]),
                ]
                for row in parity.agreement(both.pairs).to_pylist()
            ),
        )
    pairs = sorted(both.pairs.to_pylist(), key=lambda row: not row["comparable"])[:PAIRS_SHOWN]
    if pairs:
        yield f"\nThe first {len(pairs)} of {len(both.pairs)} pairs, percent, ours / theirs:\n"
        yield from _markdown(
            parity.HEAD,
            (parity.texts(row) for row in pairs),
        )


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---' for _ in head)} |"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _two(value: Any) -> str:
    return views.UNDEFINED if value is None else f"{value:z.2f}"


if __name__ == "__main__":
    sys.exit(main())
