"""The documentation says what the code does."""

import re
from pathlib import Path

import pytest

from detrojan.analysis.statistics import derived
from detrojan.analysis.statistics.collect import CELLS, MODELS
from detrojan.analysis.statistics.predictions import MEASURES
from detrojan.learning.training import HISTORY
from detrojan.storage.columns import PREDICTIONS

ROOT = Path(__file__).parents[2]
TABLES = (ROOT / "docs" / "tables.md").read_text()


def documented(section):
    """Return the columns that a section's table explains, in order, with their types."""
    text = TABLES.split(f"tables/{section}.parquet`")[1].split("\n## ")[0]
    columns = {}
    for names, kind in re.findall(r"^\| (`.*?`) \| (.*?) \|", text, re.M):
        columns |= dict.fromkeys(re.findall(r"`(\w+)`", names), kind)
    return columns


@pytest.mark.parametrize(
    ("section", "schema"),
    [
        ("cells", CELLS),
        ("models", MODELS),
        ("measures", MEASURES),
        *((name, table.schema) for name, table in derived.TABLES.items()),
    ],
)
def test_every_column_is_explained(section, schema):
    columns = documented(section)
    assert list(columns) == schema.names
    for name, kind in columns.items():
        field = schema.field(name)
        if kind != "as above":
            assert kind.startswith(str(field.type)), name
            assert ("null" in kind) == field.nullable, name


@pytest.mark.parametrize("schema", [PREDICTIONS, HISTORY])
def test_other_files_are_explained(schema):
    for name in schema.names:
        assert f"`{name}`" in TABLES


def test_links_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "results" / "README.md"]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"
