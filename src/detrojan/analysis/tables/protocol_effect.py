"""What other settings of the same defense change: one protocol minus another, pair by pair."""

import itertools
from typing import Any

import pandas as pd
import pyarrow as pa

from detrojan.analysis import protocols
from detrojan.analysis.statistics import arrays, scores
from detrojan.analysis.statistics.arrays import Study
from detrojan.analysis.statistics.crossed import Spread
from detrojan.analysis.statistics.frames import frame_of, table_of_rows
from detrojan.analysis.statistics.relative import COMPARED
from detrojan.analysis.tables.base import Table, columns
from detrojan.analysis.tables.comparisons import SCOPES
from detrojan.cells import NO_METHOD
from detrojan.storage.columns import OK

Row = dict[str, Any]
BETWEEN = "\0"  # in no name

TABLE = Table(
    row="a measure, budget, defense and two of its protocols",
    holds="what a protocol changes",
    about="""\
The one table that compares protocols: `protocol` minus `other`, of the same defense on the same models with
the same samples and random numbers. Empty where a study has one protocol.""",
    columns=[
        columns("measure", kind=pa.string(), meaning="`acc`, `asr`, `ra`, `der` or `net`", words=True),
        columns("spc", kind=pa.int32(), meaning="the budget; null: all budgets pooled", null=True),
        columns("defense", kind=pa.string(), meaning="the defense"),
        columns("protocol", "other", kind=pa.string(), meaning="the two", words=True),
        columns("num_settings", kind=pa.int32(), meaning="settings in which both have a result"),
        columns(
            "mean",
            "other_mean",
            kind=pa.float64(),
            meaning="mean under each, over the settings that it has",
            null=True,
        ),
        columns(
            "difference",
            *(f"difference_{scope}_{end}" for scope in SCOPES for end in ("low", "high")),
            kind=pa.float64(),
            meaning="value under `protocol` minus that under `other`, pair by pair, with both 95 % "
            "[intervals](statistics.md#intervals)",
            null=True,
        ),
        columns(
            "steps",
            "other_steps",
            kind=pa.float64(),
            meaning="mean optimizer steps of a run under each; null: no run ended well",
            null=True,
        ),
    ],
    across=True,
)


def make(cells: pa.Table) -> pa.Table:
    """Return a row a measure, budget, defense and pair of protocols; the pooled budget comes first.

    Args:
        cells: with the columns of ``CELLS``, of all protocols.
    """
    names = protocols.of(cells)
    if len(names) < 2:
        return table_of_rows([], TABLE.schema)
    frame = scores.attacked(frame_of(cells))
    frame = frame[frame["defense"].astype(str) != NO_METHOD]
    # A defense under one protocol is compared with itself under another, as with another defense.
    named = frame["defense"].astype(str) + BETWEEN + frame["protocol"].astype(str)
    ended = frame.assign(named=named)[frame["status"] == OK]
    steps = ended.groupby(["named", scores.BUDGET])["steps"].mean()
    study = arrays.of_cells(frame.assign(defense=named))
    rows = []
    for measure, (defense, pair) in itertools.product(COMPARED, _pairs(study, names)):
        for budget in (None, *study.budgets):
            row = _row(study, measure, budget, defense, pair)
            rows += [row | _steps(steps, budget, defense, pair)] if row else []
    return table_of_rows(rows, TABLE.schema)


def _pairs(study: Study, names: list[str]) -> list[tuple[str, tuple[str, str]]]:
    """Return each defense with each two of its protocols, the later one of ``names`` first."""
    found: dict[str, set[str]] = {}
    for run in study.runs:
        defense, _, protocol = run.partition(BETWEEN)
        found.setdefault(defense, set()).add(protocol)
    return [
        (defense, (later, earlier))
        for defense, own in found.items()
        for earlier, later in itertools.combinations([name for name in names if name in own], 2)
    ]


def _row(study: Study, measure: str, budget: int | None, defense: str, pair: tuple[str, str]) -> Row | None:
    """Return what one protocol changes against another; None where no run has both."""
    later, earlier = (f"{defense}{BETWEEN}{protocol}" for protocol in pair)
    crossed = study.pairs(later, earlier, measure).crossed(study.design, study.at(budget))
    if not crossed.num_settings:
        return None
    row: Row = {"measure": measure, "spc": budget, "defense": defense}
    row |= {"protocol": pair[0], "other": pair[1], "num_settings": crossed.num_settings}
    for name, run in (("mean", later), ("other_mean", earlier)):
        row[name] = study.crossed(run, measure, budget).mean
    row["difference"] = crossed.mean
    for scope in SCOPES:
        spread: Spread = getattr(crossed, scope)
        row[f"difference_{scope}_low"], row[f"difference_{scope}_high"] = spread.interval(crossed.mean)
    return row


def _steps(means: "pd.Series[float]", budget: int | None, defense: str, pair: tuple[str, str]) -> Row:
    """Return the mean steps under both protocols; every budget weighs the same."""
    found: Row = {}
    for name, protocol in zip(("steps", "other_steps"), pair, strict=True):
        own = means[means.index.get_level_values(0) == f"{defense}{BETWEEN}{protocol}"]
        chosen = own if budget is None else own[own.index.get_level_values(1) == budget]
        found[name] = float(chosen.mean()) if len(chosen) else None
    return found
