"""Writes the page that shows a study: one file, which opens offline."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
from markupsafe import Markup

from detrojan.analysis import views
from detrojan.analysis.gate import describe
from detrojan.analysis.measures import MEASURED
from detrojan.analysis.views import Row, Setting
from detrojan.cells import NO_METHOD, ratio_text
from detrojan.config import BASELINES
from detrojan.settings import Gate

TEMPLATE = Path(__file__).with_name("report.html.j2")
OPEN_GROUPS = 12  # groups of a larger study are folded away
AXES = ("dataset", "architecture", "attack", "ratio", "seed", "defense", "spc", "draw")


def page(
    cells: pa.Table,
    models: pa.Table,
    summary: pa.Table,
    figure: str,
    sheets: Mapping[str, str],
    gate: Gate,
    example: str,
) -> str:
    """Return the page as HTML that needs nothing else; the same inputs give the same text.

    Args:
        cells: of the schema ``CELLS``.
        models: of the schema ``MODELS``.
        summary: of the schema ``SUMMARY``.
        figure: an SVG.
        sheets: by data set, an SVG of its triggers.
        gate: what an attack has to reach.
        example: path of a metrics table of the study, for the command that makes it again.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"share": views.share, "seconds": views.seconds}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    failed = views.failed_attacks(models)
    return template.render(
        axes={axis: _axis(cells, axis) for axis in AXES},
        statuses=views.statuses(cells),
        cost=_cost(cells, models),
        groups=[_group(setting, rows, failed) for setting, rows in views.groups(summary).items()],
        open_groups=OPEN_GROUPS,
        interval_note=views.interval_note(summary),
        models=[_model(row) for row in sorted(models.to_pylist(), key=_clean_first)],
        figure=Markup(figure[figure.index("<svg") :]),  # noqa: S704 -- ours, without the XML prologue
        gate=describe(gate),
        failed=failed,
        weak_triggers=views.weak_triggers(models),
        sheets=_sheets(models, sheets),
        controls=_controls(cells),
        failures=views.failures(cells),
        provenance=_provenance(cells, models),
        example=example,
    )


def _axis(cells: pa.Table, axis: str) -> list[str]:
    write = ratio_text if axis == "ratio" else str
    return [write(value) for value in views.values(cells, axis)]


def _cost(cells: pa.Table, models: pa.Table) -> dict[str, float]:
    """Return the hours that training and defending took, over all devices."""
    return {
        name: sum(table["seconds"].to_pylist()) / 3600
        for name, table in (("train", models), ("defend", cells))
    }


def _group(setting: Setting, rows: list[Row], failed: Mapping[Setting, list[str]]) -> dict[str, Any]:
    """Return a setting's table; each value has its text and what to sort it by."""
    return {
        "title": str(setting),
        "reasons": failed.get(setting, []),
        "rows": [
            row
            | {"name": views.defense_text(row["defense"]), "untouched": row["defense"] == NO_METHOD}
            | {
                measure: {"text": views.percent(row, measure), "value": row[f"{measure}_mean"]}
                for measure in MEASURED
            }
            for row in rows
        ],
    }


def _clean_first(row: Row) -> tuple[Any, ...]:
    return (
        row["dataset"],
        row["architecture"],
        row["attack"] != NO_METHOD,
        row["attack"],
        row["ratio"],
        row["seed"],
    )


def _model(row: Row) -> Row:
    return row | {
        "attack_text": views.attack_text(row["attack"], row["ratio"]),
        "took_text": {None: views.UNDEFINED, True: "took", False: "failed"}[row["attack_took"]],
    }


def _sheets(models: pa.Table, sheets: Mapping[str, str]) -> dict[str, str]:
    """Return the sheets of the data sets that were attacked, as an image's source."""
    attacked = {row["dataset"] for row in models.to_pylist() if row["attack"] != NO_METHOD}
    return {
        dataset: "data:image/svg+xml;base64," + base64.b64encode(sheet.encode()).decode()
        for dataset, sheet in sheets.items()
        if dataset in attacked
    }


def _controls(cells: pa.Table) -> dict[str, bool]:
    """Return which of the controls that every comparison needs are among the cells."""
    attacks, defenses = (views.values(cells, axis) for axis in ("attack", "defense"))
    return {
        "a clean model (attack none)": NO_METHOD in attacks,
        "the untouched model (defense none)": NO_METHOD in defenses,
        **{f"the baseline {name}": name in defenses for name in BASELINES},
    }


def _provenance(cells: pa.Table, models: pa.Table) -> dict[str, list[str]]:
    """Return the distinct versions, commits, devices and digests of code behind the tables."""

    def distinct(column: str) -> list[str]:
        found = {*views.values(cells, column), *views.values(models, column)}
        return sorted(found - {""})  # cells that were given up have none

    versions: dict[str, set[str]] = {}
    for text in distinct("versions"):
        for name, version in json.loads(text).items():
            versions.setdefault(name, set()).add(version)
    return {
        **{name: sorted(found) for name, found in sorted(versions.items())},
        "git commit": distinct("git_commit"),
        "device": distinct("device"),
        "code digests": distinct("code"),
    }
