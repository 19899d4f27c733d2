"""Makes anew what follows from a study's two tables of results, such as those copied from a cluster.

The tables of cells and of models say all that was measured. The other tables and the report are made of
them as the workflow does; only the sheets of triggers need images, and are left out.
"""

from pathlib import Path

import click

from detrojan.analysis import derived
from detrojan.analysis.report import report
from detrojan.analysis.report.views import Tables, counted
from detrojan.analysis.statistics import collect
from detrojan.analysis.statistics.gate import table
from detrojan.settings import Gate
from detrojan.storage import records
from detrojan.study.files import KEPT, kept, load_study
from detrojan.study.schema import Study
from detrojan.workflow import graph

GATE_UNKNOWN = "Whether an attack took is as the table of models has it, by a gate that was not copied along."


def study_of(folder: Path) -> Study | None:
    """Return the study whose tables lie in a folder; None if its file was not copied along.

    Raises:
        ValueError: it has mistakes, by today's code.
    """
    return load_study(kept(folder)) if (folder / KEPT).exists() else None


def about(tables: Tables, study: Study | None) -> report.About:
    """Return what the page says beside its tables; less if nobody knows the study file."""
    if study:
        return report.of_study(tables, study.gate, [str(draws) for draws in study.grid.draws])
    return report.of_study(tables, Gate(), [])._replace(gate=GATE_UNKNOWN, draws=None)


# What stands between these lines of docs/tables.md follows from the tables' own files.
BEGIN = (
    "<!-- Made by `detrojan tables --page docs/tables.md`: edit src/detrojan/analysis/tables/ instead. -->"
)
END = "<!-- The end of what is made. -->"


def explained(page: str) -> str:
    """Return a page with the columns of all tables that follow from others, between its two marks.

    Raises:
        ValueError: it lacks the marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(
            f"a page of tables needs two lines, between which they are listed: {BEGIN} and {END}"
        )
    sections = [made.table.section(name) for name, made in derived.TABLES.items()]
    return "\n".join([before + begin, "", *sections, end + after])


def explain(page: Path) -> None:
    """Write the columns of all tables that follow from others into a page.

    Raises:
        ValueError: it is missing, or lacks its two marks.
    """
    if not page.is_file():
        raise ValueError(f"{page}: no such page; run this in the clone, and name docs/tables.md")
    records.write_text(explained(page.read_text(encoding="utf-8")), page)
    click.echo(f"{page}: explains {', '.join(derived.TABLES)}.")


def main(folder: Path) -> None:
    """Make the tables and the report in a folder of results, and say what was made.

    Raises:
        ValueError: a table is missing or broken, the study file beside it has mistakes by today's code, or
            the workflow makes the tables there itself.
    """
    if (folder / "metrics").exists():
        raise ValueError(
            f"{folder}: these are a study's own results, whose tables the workflow makes: run `snakemake "
            "--profile local`, or copy tables/cells.parquet and tables/models.parquet into another folder"
        )
    files = {name: graph.below(folder, graph.table(name)) for name in graph.TABLES}
    cells = records.read_table(files["cells"], collect.CELLS)
    models = records.read_table(files["models"], collect.MODELS)
    study = study_of(folder)
    given = {"cells": cells, "models": models}
    # What other limits would change can't be told without knowing this one.
    made = derived.write(given | ({"gate": table(models.to_pylist(), study.gate)} if study else {}), files)
    tables = Tables(cells, models, made)
    report.write(tables, about(tables, study), folder / "report")
    click.echo(f"{folder}: {counted(len(cells), 'cell')} of {counted(len(models), 'model')}.")
    click.echo(f"Made tables/ {', '.join(made)}, and report/index.html.")
