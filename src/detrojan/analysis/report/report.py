"""Writes the report of a study: a page in one file that opens offline, and beside it figures and tables."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup
from matplotlib.figure import Figure as Sheet

from detrojan.analysis import derived
from detrojan.analysis.report import (
    charts,
    contact_sheet,
    data_sets,
    headline,
    listings,
    payload,
    vega,
    views,
)
from detrojan.analysis.report.figures import base
from detrojan.analysis.report.listings import Listing
from detrojan.analysis.report.views import MEASURE_TEXTS, Row, Tables
from detrojan.analysis.statistics.gate import describe
from detrojan.analysis.statistics.relative import LOWER_IS_BETTER
from detrojan.cells import CELL_AXES, NO_METHOD, axes_text, ratio_text
from detrojan.settings import Gate
from detrojan.storage import paths, records
from detrojan.storage.columns import OK
from detrojan.study.schema import BASELINES

ASSETS = Path(__file__).with_name("page")
TEMPLATE, STYLE = "page.html.j2", "style.css"
SCRIPTS = ("data.js", "text.js", "cells.js", "heatmap.js", "settings.js", "figures.js", "main.js")
SETTING = ("dataset", "architecture", "attack", "ratio", "attack_took")
# What the page shows of a cell; the relative measures follow from the others.
SHOWN = (
    *("dataset", "architecture", "attack", "ratio", "seed", "attack_took", "defense", "protocol", "spc"),
    "draw",
    *("status", "reason", "acc", "asr", "ra", "der", "seconds", "peak_memory_bytes"),
    *("forward_passes", "backward_passes", "num_test", "num_triggered"),
    *("device", "code", "versions", "git_commit", "hyperparameters"),
)
SUMMED = (
    *("dataset", "architecture", "attack", "ratio", "attack_took", "defense", "spc"),
    *("num_cells", "num_ok", "seconds"),
    *(f"{measure}_{part}" for measure in MEASURE_TEXTS for part in ("mean", "low", "high")),
)
MOST_CHOSEN = 4_000_000  # characters of the packed column `chosen`; a page that is larger opens too slowly
# Of paper's colours, those that have others on a dark ground, and the variables of the style sheet.
THEMED = (
    dict(zip(charts.COLORS, ("--der", "--asr", "--acc", "--ra"), strict=True))
    | {color: f"--spc-{place}" for place, color in enumerate(charts.BUDGETS)}
    | {charts.GREY: "--figure-grey", "#dddddd": "--figure-line", "#777777": "--figure-axis"}
)


class Protocol(NamedTuple):
    """What a page says of its protocol, where there are several.

    Attributes:
        name: of it.
        others: the addresses of the others' pages, from this one, by name.
    """

    name: str
    others: Mapping[str, str]


class About(NamedTuple):
    """What a page says beside its tables.

    Attributes:
        title: of the page.
        lines: sentences below it.
        gate: the sentence that says which attacks count.
        draws: the ranges of draws that shards have, as the study file writes them; None if the cells
            were not made here, so that nothing can explain or recompute them.
        protocol: of its defenses, where the study has several.
        cards: of the data sets; none where their images were not read here.
    """

    title: str
    lines: Sequence[str]
    gate: str
    draws: Sequence[str] | None
    protocol: Protocol | None = None
    cards: Sequence[data_sets.Card] = ()


def of_study(tables: Tables, gate: Gate, draws: Sequence[str], cards: Sequence[data_sets.Card] = ()) -> About:
    """Return what the page of a study of ours says beside its tables; ``gate`` is what attacks must reach."""
    datasets = ", ".join(views.values(tables.cells, "dataset"))
    assert tables.models is not None, "a study of ours has models"
    training, defending = (sum(t["seconds"].to_pylist()) / 3600 for t in (tables.models, tables.cells))
    lines = [
        f"A Detrojan study of {datasets}.",
        f"Over all jobs, {training:.2f} h of training and {defending:.2f} h of defending.",
    ]
    return About("What is left of the backdoor", lines, describe(gate), draws, cards=cards)


def write(
    tables: Tables, about: About, folder: str | Path, sheets: Mapping[str, Sheet] | None = None
) -> None:
    """Write a report into ``folder``: ``index.html``, ``figures/`` and ``tables/``.

    It is of one protocol. Where there are several, those after the first have such a report each, in a
    folder of their own below, and the pages lead to one another.

    Args:
        tables: what to show.
        about: what to say beside it.
        folder: where to write.
        sheets: by data set, its triggers.
    """
    names = tables.protocols
    for name in names:
        own = about._replace(protocol=_protocol_of(name, names))
        _write(tables.of_protocol(name), own, Path(folder, "" if name == names[0] else name), sheets)


def _protocol_of(name: str, names: Sequence[str]) -> Protocol | None:
    """Return what the page of one of the protocols says of it and the others; None if there is no other."""
    if len(names) == 1:
        return None
    up = "" if name == names[0] else "../"
    pages = {other: f"{up}{'' if other == names[0] else f'{other}/'}index.html" for other in names}
    return Protocol(name, {other: page for other, page in pages.items() if other != name})


def _write(tables: Tables, about: About, folder: Path, sheets: Mapping[str, Sheet] | None) -> None:
    """Write the report of one protocol."""
    figures = base.on_paper(tables)
    drawn = {name: vega.files(figure) for name, figure in figures.items()}
    for name, files in drawn.items():
        for kind, content in files._asdict().items():
            with records.whole(paths.figure(folder, name, kind)) as partial:
                partial.write_bytes(content if isinstance(content, bytes) else content.encode())
    texts = contact_sheet.write(sheets or {}, folder / paths.FIGURES)
    found = listings.of_tables(tables)
    for listing in found:
        records.write_text(listings.csv_text(listing), paths.table(folder, listing.name, "csv"))
        records.write_text(listings.latex(listing), paths.table(folder, listing.name, "tex"))
    pictures = {name: files.svg for name, files in drawn.items()}
    records.write_text(page(tables, about, figures, pictures, found, texts), folder / "index.html")


def page(
    tables: Tables,
    about: About,
    figures: Mapping[str, vega.Figure],
    pictures: Mapping[str, str],
    found: Sequence[Listing],
    sheets: Mapping[str, str],
) -> str:
    """Return the page as HTML that needs nothing else; the same inputs give the same text.

    Args:
        tables: what to show.
        about: what to say beside it.
        figures: by name.
        pictures: the same as SVG.
        found: the listings of ``tables``.
        sheets: by data set, an SVG of its triggers.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    by_name = {listing.name: listing for listing in found}
    scripts = [vega.bundle(), "\n".join(_asset(name) for name in SCRIPTS)]
    models = tables.models
    own = about.draws is not None
    empty = _empty(figures, by_name)
    return environment.get_template(TEMPLATE).render(
        title=about.title,
        about=about.lines,
        protocol=about.protocol,
        gate=about.gate,
        own=own,
        facts=_facts(tables),
        headline=headline.of_tables(tables),
        failed={} if models is None else views.failed_attacks(models),
        advice=[] if models is None else views.advice(models),
        num_settings=len(_attacked_settings(tables)),
        weak_triggers=[] if models is None else views.weak_triggers(models),
        measure_texts=MEASURE_TEXTS,
        budgets=views.budgets(tables),
        spc_text=views.spc_text,
        rankings={measure: by_name[f"ranking_{measure}"] for measure in MEASURE_TEXTS},
        comparisons={measure: by_name[f"comparisons_{measure}"] for measure in MEASURE_TEXTS},
        consistency=by_name["consistency"],
        protocol_effect=by_name["protocol_effect"],
        tuning=by_name["tuning"],
        num_trials=max(tables.tuning["num_trials"].to_pylist(), default=0),
        outcomes=by_name["outcomes"],
        reasons=by_name["reasons"],
        models=by_name.get("models"),
        figures=_in_sections(figures, pictures),
        sections=base.SECTIONS,
        empty=empty,
        nothing=_nothing(figures, empty, tables),
        made={name: derived.TABLES[name].table for name in tables.made},
        interval_note=_on_intervals(tables.summary),
        sheets=_sheets(models, sheets),
        controls=_controls(tables),
        data_sets=data_sets.read_all(about.cards),
        provenance=_provenance(tables) if own else {},
        example=_example(tables.cells),
        style=Markup(_asset(STYLE)),  # noqa: S704 -- ours
        data=_data(tables, about, figures),
        # None of them ends its element: a test looks for that.
        bundle=Markup(scripts[0]),  # noqa: S704
        script=Markup(scripts[1]),  # noqa: S704
        script_sources=" ".join(map(_digest, scripts)),
    )


def _in_sections(
    figures: Mapping[str, vega.Figure], pictures: Mapping[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """Return what the page shows of each figure, by section, in its order."""
    found: dict[str, list[dict[str, Any]]] = {section: [] for section in base.SECTIONS}
    for name, planned in base.ordered().items():
        shown = {"name": name, "figure": figures[name], "source": _image(pictures[name])}
        shown |= {"plan": planned.plan, "by_measure": planned.by_measure}
        found.setdefault(planned.plan.section, []).append(shown)
    return found


# Of the sections that a study may have nothing for: their names, and the first of their tables.
SECTION_TITLES = {
    "ranking": "ranking",
    "effect": "effect",
    "curves": "SPC and ratio",
    "cost": "cost",
    "consistency": "consistency",
    "comparisons": "against the two baselines",
}
SECTION_TABLES = {"ranking": "ranking_der", "consistency": "consistency", "comparisons": "comparisons_der"}


def _empty(figures: Mapping[str, vega.Figure], by_name: Mapping[str, Listing]) -> list[str]:
    """Return the sections that have neither a table nor a figure to show."""
    drawn = {base.load(name).plan.section for name, figure in figures.items() if not figure.nothing}
    listed = {
        section
        for section, table in SECTION_TABLES.items()
        if any(block.rows for block in by_name[table].blocks)
    }
    return [section for section in SECTION_TITLES if section not in drawn | listed]


def _nothing(figures: Mapping[str, vega.Figure], empty: Sequence[str], tables: Tables) -> list[str]:
    """Return what is left out, and why: whole sections, and figures of the others."""
    found: dict[str, list[str]] = {}
    reasons: dict[str, list[str]] = {"comparisons": [listings.NO_PAIRS]}
    for name, figure in figures.items():
        if figure.nothing:
            reasons.setdefault(base.load(name).plan.section, []).append(figure.alt)
    for section in empty:
        reason = " ".join(reasons.get(section, []))
        if not len(tables.consistency):
            reason = charts.nothing_to_show(tables)
        found.setdefault(reason, []).append(SECTION_TITLES[section])
    for name, figure in figures.items():
        plan = base.load(name).plan
        if figure.nothing and plan.section not in empty:
            found.setdefault(figure.alt, []).append((plan.heading or f"the figure {name}").lower())
    return [f"{', '.join(names)} ({reason.rstrip('.')})" for reason, names in found.items()]


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    """Return what a Content-Security-Policy calls a script, so that it lets no other run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _image(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


# --- what the page carries for its scripts ---------------------------------------------------------


def _data(tables: Tables, about: About, figures: Mapping[str, vega.Figure]) -> str:
    cells = tables.cells.select([name for name in SHOWN if name in tables.cells.column_names])
    chosen = tables.cells.select(["chosen"])
    if len(payload.pack({"cells": chosen}, {})) <= MOST_CHOSEN:
        cells = cells.append_column("chosen", chosen["chosen"])
    packed = {"cells": _with_texts(cells), "summary": _with_texts(tables.summary.select(list(SUMMED)))}
    rest = {
        "commands": about.draws is not None,
        "draws": list(about.draws or ()),
        "defenses": views.defenses(tables),
        "upper_bounds": sorted(
            {
                row["defense"]
                for row in tables.consistency.to_pylist()
                if row["threat_model"] == views.KNOWN_TRIGGER
            }
        ),
        "lower_is_better": sorted(LOWER_IS_BETTER & set(MEASURE_TEXTS)),
        "palette": charts.BAD_TO_GOOD,
        "pale": charts.PALE,
        "config": vega.CONFIG,
        "colors": {color.lower(): f"var({variable})" for color, variable in THEMED.items()},
        "figures": _live(tables, figures),
    }
    return payload.pack(packed, rest)


def _live(tables: Tables, figures: Mapping[str, vega.Figure]) -> dict[str, dict[str, Any]]:
    """Return the figures that the page draws: some for each measure, which on paper are of DER alone."""
    whole = {name: figure for name, figure in figures.items() if not base.load(name).by_measure}
    drawn = whole | base.of_measures(tables)
    return {
        name: {"spec": figure.spec, "alt": figure.alt, "inches": figure.inches}
        for name, figure in drawn.items()
    }


def _with_texts(table: pa.Table) -> pa.Table:
    """Return ``table`` with ratios as paths and commands write them."""
    texts = {ratio: ratio_text(ratio) for ratio in pc.unique(table["ratio"]).to_pylist()}
    ratios = pa.array([texts[ratio] for ratio in table["ratio"].to_pylist()], pa.string())
    return table.set_column(table.column_names.index("ratio"), "ratio", ratios)


# --- what it says ----------------------------------------------------------------------------------


def _attacked_settings(tables: Tables) -> set[tuple[Any, ...]]:
    rows = tables.summary.select(list(SETTING)).to_pylist()
    return {tuple(row.values()) for row in rows if row["attack"] != NO_METHOD}


def _facts(tables: Tables) -> list[dict[str, str]]:
    """Return the numbers that say how large a study is."""
    statuses = views.statuses(tables.cells)
    settings = _attacked_settings(tables)
    took = sum(setting[-1] is True for setting in settings)
    total = sum(statuses.values())
    axes = {axis: [v for v in views.values(tables.cells, axis) if v != NO_METHOD] for axis in CELL_AXES}
    nouns = {"defense": "defense", "attack": "attack", "dataset": "data set", "architecture": "architecture"}
    ended = ", ".join(f"{number:,} {status.replace('_', ' ')}" for status, number in statuses.items())
    return [
        {"number": f"{total:,}", "text": f"cells: {ended}"},
        *(
            {
                "number": str(len(axes[axis])),
                "text": f"{noun}{'s' * (len(axes[axis]) != 1)}: {', '.join(axes[axis])}",
            }
            for axis, noun in nouns.items()
        ),
        {"number": f"{took} of {len(settings)}", "text": "attacked settings whose attack took"},
    ]


def _on_intervals(summary: pa.Table) -> str:
    """Return what the intervals of settings are over."""
    over = set(summary["interval_over"].to_pylist()) - {None}
    if not over:
        return "No intervals: there is one cell in each."
    return f"In brackets, the 95 % interval of the mean, {views.over_text(over)}."


def _sheets(models: pa.Table | None, sheets: Mapping[str, str]) -> dict[str, str]:
    """Return the sheets of the data sets that were attacked, as an image's source."""
    rows = [] if models is None else models.to_pylist()
    attacked = {row["dataset"] for row in rows if row["attack"] != NO_METHOD}
    return {dataset: _image(sheet) for dataset, sheet in sheets.items() if dataset in attacked}


def _controls(tables: Tables) -> list[dict[str, Any]]:
    """Return the controls that every comparison needs: whether they are there, and what they show."""
    attacks, defenses = (views.values(tables.cells, axis) for axis in ("attack", "defense"))
    pooled = {row["defense"]: row for row in tables.consistency.to_pylist() if row["spc"] is None}
    untouched = pooled.get(NO_METHOD)
    clean = [
        row["acc_mean"]
        for row in tables.summary.to_pylist()
        if row["attack"] == row["defense"] == NO_METHOD and row["acc_mean"] is not None
    ]
    before = (
        ""
        if untouched is None
        else f"ACC {_share(untouched, 'acc')}, ASR {_share(untouched, 'asr')}, RA {_share(untouched, 'ra')}"
    )
    of_clean = (
        f"ACC {views.share(sum(clean) / len(clean))} %, mean of {views.counted(len(clean), 'setting')}"
        if clean
        else ""
    )
    controls = [
        ("a clean model (attack none)", NO_METHOD in attacks, of_clean),
        ("the untouched model (defense none)", NO_METHOD in defenses, before),
    ]
    for name in BASELINES:
        row = pooled.get(name)
        shows = (
            ""
            if row is None
            else f"DER {_share(row, 'der')}, ASR {_share(row, 'asr')}, ACC {_share(row, 'acc')}"
        )
        controls.append((f"the baseline {name}", name in defenses, shows))
    return [{"name": name, "there": there, "shows": shows} for name, there, shows in controls]


def _share(row: Row, measure: str) -> str:
    text = views.share(row[f"{measure}_mean"])
    low, high = (row[f"{measure}_grid_{end}"] for end in ("low", "high"))
    return f"{text} %" if low is None else f"{text} % [{views.share(low)}, {views.share(high)}]"


def _provenance(tables: Tables) -> dict[str, list[str]]:
    """Return the distinct versions, commits, devices and digests of code behind the tables."""
    sources = [table for table in (tables.cells, tables.models) if table is not None]

    def distinct(column: str) -> list[str]:
        found = {value for table in sources for value in views.values(table, column)}
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


def _example(cells: pa.Table) -> str:
    """Return the axes of a cell that a defense repaired, as commands take them; of any, if there is none."""
    repaired = pc.and_(pc.equal(cells["status"], OK), pc.not_equal(cells["defense"], NO_METHOD))
    found = cells.filter(repaired)
    row = (found if len(found) else cells).select(list(CELL_AXES)).slice(0, 1).to_pylist()[0]
    return axes_text(row)
