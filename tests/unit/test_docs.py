"""The documentation says what the code does."""

import re
from pathlib import Path

import pytest
import yaml

import detrojan
from detrojan.analysis import derived
from detrojan.analysis.statistics.collect import CELLS, MODELS
from detrojan.analysis.statistics.predictions import MEASURES
from detrojan.commands import tables
from detrojan.learning.training import HISTORY
from detrojan.storage.columns import PREDICTIONS
from tests.command import exit_code

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


def test_the_page_says_what_the_tables_say_of_themselves():
    """But for tables that were added: a new table is two files. The linters ask for these too."""
    sections = {re.search(r"tables/(\w+)", text)[1]: text for text in made_sections(TABLES)}
    assert len(sections) >= 5
    for name, text in sections.items():
        assert text.strip() == derived.TABLES[name].table.section(name).strip(), (
            "detrojan tables --page docs/tables.md"
        )


def made_sections(page):
    made = page.split(tables.BEGIN)[1].split(tables.END)[0]
    return re.findall(r"^## .*?(?=^## |\Z)", made, re.M | re.S)


def test_the_page_is_made_anew_between_its_marks(tmp_path, capsys):
    page = tmp_path / "tables.md"
    page.write_text(f"before\n\n{tables.BEGIN}\nold\n{tables.END}\n\nafter\n")
    assert exit_code("tables", "--page", page) == 0
    text = page.read_text()
    assert text.startswith(f"before\n\n{tables.BEGIN}\n\n## `")
    assert text.endswith(f"\n\n{tables.END}\n\nafter\n")
    assert "\nold\n" not in text
    assert len(made_sections(text)) == len(derived.TABLES)
    page.write_text("no marks")
    assert exit_code("tables", "--page", page) == 1
    assert "needs two lines" in capsys.readouterr().err
    assert page.read_text() == "no marks"
    assert exit_code("tables", "--page", tmp_path / "nowhere") == 1


@pytest.mark.parametrize("schema", [PREDICTIONS, HISTORY])
def test_other_files_are_explained(schema):
    for name in schema.names:
        assert f"`{name}`" in TABLES


def test_links_lead_somewhere():
    beside = [ROOT / folder / "README.md" for folder in ("config", "results")]
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *beside]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_overview_of_studies_names_all():
    overview = (ROOT / "config" / "README.md").read_text()
    assert {file.name for file in (ROOT / "config").glob("*.yaml")} == set(
        re.findall(r"\[(\w+\.yaml)\]", overview)
    )


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == detrojan.__version__
    assert citation["authors"] == [{"name": "Detrojan contributors"}]


def test_the_catalog_offers_what_there_is():
    usage = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    option, profile = usage["mandatory-flags"]["flags"].split()
    assert option == "--profile"
    assert (ROOT / profile / "config.yaml").is_file()
    # No rule has an environment of its own, and a test of Snakemake's report shows that there is one.
    assert set(usage["software-stack-deployment"].values()) == {False}
    assert usage["report"] is True
