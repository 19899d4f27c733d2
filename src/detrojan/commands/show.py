"""Shows the results of a study in the terminal."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
from rich.console import Console, JustifyMethod
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from detrojan import registry
from detrojan.analysis.report import headline, views
from detrojan.analysis.report.views import Row
from detrojan.analysis.statistics.collect import CELLS, MODELS
from detrojan.analysis.tables.summary import TABLE as SUMMARY
from detrojan.cells import NO_METHOD
from detrojan.storage import records
from detrojan.workflow import graph

# Without which the first sentence stands: one is not made where nobody knows the gate, two are of trials.
UNNEEDED = {"gate_sensitivity", "tuning", "stability"}
WIDTH_WITHOUT_TERMINAL = 100
GAP = 2  # between columns
TABLES = {"cells": CELLS, "models": MODELS, "summary": SUMMARY.file_schema}

COLUMNS: dict[str, Callable[[Row], str]] = {
    "defense": lambda row: views.defense_text(row["defense"]),
    "is given": lambda row: "" if row["threat_model"] == NO_METHOD else row["threat_model"],
    "SPC": lambda row: str(row["spc"]) if row["spc"] else "",
    "verdict": lambda row: "" if row["defense"] == NO_METHOD else row["verdict"] or "",
    "DER %": lambda row: views.percent(row, "der"),
    "ACC %": lambda row: views.percent(row, "acc"),
    "ASR %": lambda row: views.percent(row, "asr"),
    "RA %": lambda row: views.percent(row, "ra"),
    "n": lambda row: f"{row['num_ok']}/{row['num_cells']}",
    "seconds": lambda row: views.seconds(row["seconds"]),
}
EXPENDABLE = ("is given", "seconds", "n", "RA %", "DER %", "verdict")  # on a narrow terminal, in this order


def show(
    cells: pa.Table,
    models: pa.Table,
    summary: pa.Table,
    folder: Path,
    console: Console,
    first: str = "",
) -> None:
    """Print the tables of a study.

    Args:
        cells: of the schema ``CELLS``.
        models: of the schema ``MODELS``.
        summary: of the schema ``SUMMARY.file_schema``.
        folder: where they were read from, for the paths at the end.
        console: where to print.
        first: the sentence that the report begins with; none if empty.
    """
    if first:
        console.print(Text(first))
        console.print()
    groups = views.groups(summary)
    columns = list(COLUMNS)
    for expendable in EXPENDABLE:
        if sum(width + GAP for width in _widths(summary, columns)) - GAP <= console.width:
            break
        columns.remove(expendable)
    failed = views.failed_attacks(models)
    for setting, rows in groups.items():
        console.print(Text(str(setting), style="bold"))
        for reason in failed.get(setting, []):
            console.print(Text(reason))
        console.print(_table(rows, columns, _widths(summary, columns)))
        console.print()
    _notes(summary, columns, console, any_failed=bool(failed))
    _weak_triggers(models, console)
    _failures(cells, console)
    _paths(folder, console)


def _widths(summary: pa.Table, columns: list[str]) -> list[int]:
    """Return how wide each column is, the same in all tables: they are read one against another."""
    rows = summary.to_pylist()
    return [max(len(name), *(len(COLUMNS[name](row)) for row in rows)) for name in columns]


def _table(rows: list[Row], columns: list[str], widths: list[int]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
    for name, width in zip(columns, widths, strict=True):
        justify: JustifyMethod = "left" if name in ("defense", "is given", "verdict") else "right"
        table.add_column(name, justify=justify, min_width=width, no_wrap=True)
    for row in rows:
        style = "dim" if not row["num_ok"] else "bold" if row["defense"] == NO_METHOD else None
        table.add_row(*(Text(COLUMNS[name](row)) for name in columns), style=style)
    return table


def _notes(summary: pa.Table, columns: list[str], console: Console, *, any_failed: bool) -> None:
    console.print(Text(views.interval_note(summary)))
    if "n" in columns:
        console.print("n: cells that ended well / cells; means are over those that did.")
    if "verdict" in columns:
        console.print("verdict: net, the ASR removed minus the ACC lost, against a point and noise.")
    if any_failed:
        console.print("Where the attack failed the gate, a low ASR is no defense's merit.")
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        console.print(f"This terminal is narrow: without {', '.join(missing)}.")
    console.print()


def _weak_triggers(models: pa.Table, console: Console) -> None:
    weak = views.weak_triggers(models)
    if weak:
        console.print("Triggers that are weak in themselves:")
        _indented(weak, console)


def _failures(cells: pa.Table, console: Console) -> None:
    failures = views.failures(cells)
    if failures:
        console.print(f"{sum(f.num_cells for f in failures)} of {len(cells)} cells have no result:")
        _indented([_failure_text(failure) for failure in failures], console)


def _failure_text(failure: views.Failure) -> str:
    what = f"{failure.num_cells} × {failure.status}: {failure.defense} on {failure.where}"
    return f"{what}: {failure.reason}" if failure.reason else what


def _paths(folder: Path, console: Console) -> None:
    console.print("Every number, and how it was got:")
    _indented([f"{folder}/tables/{name}.parquet" for name in TABLES], console)
    report = graph.below(folder, graph.job("report", {}).file("page"))
    made = "" if report.is_file() else " (not made yet: run the workflow to its end)"
    console.print(Text(f"Report, opens offline: {report}{made}"), soft_wrap=True)


def _indented(lines: Sequence[str], console: Console) -> None:
    for line in lines:
        console.print(Padding(Text(line), (0, 0, 0, 2), expand=False))
    console.print()


def main(results: Path) -> None:
    """Print the results in a folder.

    Raises:
        ValueError: a table is missing or broken.
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL)
    tables = {
        name: records.read_table(graph.below(results, graph.table(name)), schema)
        for name, schema in TABLES.items()
    }
    paths = {name: graph.below(results, graph.table(name)) for name in registry.names(registry.TABLES)}
    made = {name: records.read_table(path) for name, path in paths.items() if path.is_file()}
    whole = views.Tables(tables["cells"], tables["models"], made)
    for protocol in whole.protocols:
        # No number is over protocols, so each is a study by itself.
        if len(whole.protocols) > 1:
            console.rule(f"protocol {protocol}", align="left", characters="=")
        own = whole.of_protocol(protocol)
        show(own.cells, tables["models"], own.summary, results, console, _first_sentence(own))
    if searches := tuning(whole):
        console.print()
        console.print("Tuning, no part of any rank:")
        _indented(searches, console)


def tuning(tables: views.Tables) -> list[str]:
    """Return a line a search: what choosing settings gains and costs; none where no trials were run."""
    if tables.tuning is None or tables.stability is None:
        return []
    of_search = ("dataset", "defense", "spc")
    # The last row of a search is that of all trials.
    found = {tuple(row[axis] for axis in of_search): row for row in tables.tuning.to_pylist()}
    stable = {tuple(row[axis] for axis in of_search): row for row in tables.stability.to_pylist()}
    lines = []
    for key, row in found.items():
        where = f"{row['defense']} on {row['dataset']}" + (f", SPC {row['spc']}" if row["spc"] else "")
        names = ("survey", "paper", "tuned", "oracle")
        values = ", ".join(f"{name} {views.share(row[f'der_{name}'])}" for name in names)
        score = stable.get(key, {}).get("stability")
        said = "" if score is None else f"; stability {score:.2f}"
        lines.append(f"{where}, {row['num_trials']} trials: DER % {values}{said}")
    return lines


def _first_sentence(tables: views.Tables) -> str:
    """Return what the report says first; empty where a table is missing that it follows from."""
    if set(registry.names(registry.TABLES)) - tables.made.keys() - UNNEEDED:
        return ""
    return headline.of_tables(tables).first
