"""Measures of the predictions of a study that was really run: equal to its own, and easy to add to."""

import re
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from detrojan.analysis.statistics.predictions import MEASURES
from detrojan.cells import CELL_AXES
from detrojan.storage import records

from .conftest import ROOT

PAGE = (ROOT / "docs" / "measures.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
(EXAMPLE,) = (snippet for snippet in SNIPPETS if snippet.startswith("@measure"))


def run(workshop, *arguments):
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=workshop.folder,
        env=workshop.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def values(table, measure):
    """Return the values of a measure of whole cells, by cell."""
    rows = [row for row in table.to_pylist() if row["measure"] == measure]
    return {tuple(row[axis] for axis in CELL_AXES): row["value"] for row in rows}


@pytest.fixture(scope="module")
def measured(finished, tmp_path_factory):
    """The table of measures of the finished study, written elsewhere."""
    path = tmp_path_factory.mktemp("measured") / "measures.parquet"
    run(finished, "-m", "detrojan", "measure", "--into", str(path))
    return records.read_table(path, MEASURES)


def test_acc_asr_and_ra_are_those_of_the_study(finished, measured):
    cells = pq.read_table(finished.folder / "results/tables/cells.parquet").to_pylist()
    assert {row["attack"] for row in cells} == {"none", "badnets"}
    for measure in ("acc", "asr", "ra"):
        assert values(measured, measure) == {
            tuple(row[axis] for axis in CELL_AXES): row[measure] for row in cells
        }


def test_no_image_is_lost(measured):
    """The images of the classes are together those of the cell; none where nothing could be defended."""
    counts = {}
    for row in measured.to_pylist():
        cell = (row["measure"], *(row[axis] for axis in CELL_AXES))
        counts[cell] = counts.get(cell, 0) + row["num_images"]
    for (measure, *cell), count in counts.items():
        whole = {"class_acc": "acc", "class_asr": "asr", "class_ra": "ra", "source_asr": "asr"}.get(measure)
        if whole:
            assert count == counts[whole, *cell], (measure, cell)
    assert sum(count == 0 for (measure, *_), count in counts.items() if measure == "class_acc") == 2


def test_the_example_is_a_measure(workshop, measured):
    workshop.edit(
        "src/detrojan/analysis/statistics/predictions.py", "# --- reading", f"{EXAMPLE}\n\n# --- reading"
    )
    (command,) = re.findall(r"^detrojan (measure --only astray.*)", PAGE, re.M)
    assert "1 measure of 12 cells" in run(workshop, "-m", "detrojan", *command.split())
    table = pq.read_table(workshop.folder / "astray.parquet")
    asr, ra = values(measured, "asr"), values(measured, "ra")
    for cell, value in values(table, "astray").items():
        if asr[cell] is None:
            assert value is None
        else:
            assert value == pytest.approx(1 - asr[cell] - ra[cell])


def test_the_page_reads_what_it_writes(workshop):
    for command in re.findall(r"^detrojan (measure(?!.*astray).*)", PAGE, re.M):
        run(workshop, "-m", "detrojan", *re.sub("spc=10", "spc=2", command).split())
    shown = run(workshop, "-W", "error", "-c", "\n".join(s for s in SNIPPETS if s != EXAMPLE))
    assert "grad_prune" in shown
    assert "agreement" in shown
    assert (workshop.folder / "badnets.parquet").exists()
