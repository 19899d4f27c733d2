"""Puts other people's results through our analysis, and sets them beside ours.

docs/compare.md explains the mapping from their columns to ours.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import pyarrow as pa
from pyarrow import csv

from detrojan.analysis import derived
from detrojan.analysis.escape import for_markdown, for_spreadsheet
from detrojan.analysis.others import external, parity
from detrojan.analysis.others.external import TableMapping
from detrojan.analysis.report import report, views
from detrojan.analysis.report.views import Tables
from detrojan.analysis.statistics.collect import CELLS
from detrojan.analysis.statistics.gate import describe
from detrojan.analysis.statistics.relative import MEASURED
from detrojan.storage import records
from detrojan.workflow import graph

PAIRS_SHOWN = 20  # in the folder's README; the tables have all


class Asked(NamedTuple):
    """The files that were named: their table, the mapping, and a folder of results of ours or None."""

    table: Path
    mapping: Path
    results: Path | None


def main(table: Path, mapping: Path, results: Path | None, into: Path | None) -> None:
    """Analyse other people's results, and say where the analysis lies.

    Args:
        table: of their results.
        mapping: the file that maps their columns to ours.
        results: a study of ours to compare with.
        into: where to write; ``compare/`` and the mapping's name if None.

    Raises:
        ValueError: the table, the mapping or our study has mistakes.
    """
    into = into or Path("compare") / mapping.stem
    read = external.load_mapping(mapping)
    cells = external.cells(external.read_table(table), read)
    ours = parity.read_ours(results) if results else None
    both = parity.parity(cells, ours, read) if ours else None
    _write(cells, both, read, Asked(table, mapping, results), into)
    click.echo("\n".join(external.notes(cells, read)))
    if both:
        click.echo("\n".join(_counts(both)))
    click.echo(f"\n{into}/README.md says what lies there.")


def _write(
    cells: pa.Table, both: parity.Parity | None, mapping: TableMapping, asked: Asked, into: Path
) -> None:
    records.write_table(cells, graph.below(into, graph.table("cells")), CELLS)
    made = derived.write(
        {"cells": cells, "gate": external.gate_table(cells, mapping.gate)},
        {name: graph.below(into, graph.table(name)) for name in derived.TABLES},
    )
    if both:
        for name, (table, schema) in parity.tables(both).items():
            records.write_table(table, graph.below(into, graph.table(name)), schema)
            with records.whole(graph.below(into, graph.table(name, "csv"))) as partial:
                csv.write_csv(_for_spreadsheet(table), partial)
        records.write_text(parity.latex(both.pairs), graph.below(into, graph.table("parity", "tex")))
    lines = [mapping.citation, *external.notes(cells, mapping), *(_counts(both) if both else ())]
    about = report.About(f"{mapping.source}, analysed by Detrojan", lines, _gate(mapping), None)
    report.write(Tables(external.without_costs(cells), None, made), about, into / "report")
    records.write_text(asked.mapping.read_text(encoding="utf-8"), into / "mapping.yaml")
    records.write_text("\n".join(_readme(cells, both, mapping, asked)), into / "README.md")


def _for_spreadsheet(table: pa.Table) -> pa.Table:
    """Return a table whose text no spreadsheet takes for a formula."""
    for place, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            texts = [for_spreadsheet(text) for text in table[place].to_pylist()]
            table = table.set_column(place, field, pa.array(texts, field.type))
    return table


def _gate(mapping: TableMapping) -> str:
    return f"{describe(mapping.gate)} Where the table has no clean model, the ASR alone decides."


# --- what the folder says of itself ----------------------------------------------------------------


def _readme(
    cells: pa.Table, both: parity.Parity | None, mapping: TableMapping, asked: Asked
) -> Iterator[str]:
    digest = hashlib.sha256(asked.table.read_bytes()).hexdigest()
    yield f"# {for_markdown(mapping.source)}, analysed by Detrojan"
    yield f"\n{for_markdown(mapping.citation)}\n"
    yield f"Read from {for_markdown(asked.table.name)}, SHA-256 {digest}, by `mapping.yaml`, a copy of "
    yield f"{for_markdown(asked.mapping.name)}.\n"
    yield f"{for_markdown(_gate(mapping))}\n"
    yield from (f"- {for_markdown(note)}" for note in external.notes(cells, mapping))
    yield "\n## Files\n"
    yield "- `report/index.html`: the page, which opens offline; beside it its figures, and its tables as CSV"
    yield "  and LaTeX"
    yield f"- `tables/cells.parquet`, `{'`, `'.join(derived.TABLES)}`: as of a study of ours, see"
    yield "  `docs/tables.md`. Costs are not known: seconds are NaN, counts 0."
    if both:
        yield "- `tables/parity.parquet`, `.csv` and `.tex`: theirs beside ours; `parity_by_defense` and"
        yield "  `parity_agreement` sum it up"
        yield f"\n## Beside ours\n\nOurs are those of `{asked.results}`.\n"
        yield from (f"- {for_markdown(line)}" for line in _counts(both))
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
    yield from (f"| {' | '.join(map(for_markdown, row))} |" for row in rows)


def _two(value: Any) -> str:
    return views.UNDEFINED if value is None else f"{value:z.2f}"
