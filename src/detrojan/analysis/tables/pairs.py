"""Which two defenses can be told apart: each two of those that are ranked, by their paired differences."""

import itertools
import math
from typing import Any

import numpy as np
import pyarrow as pa

from detrojan.analysis.statistics import arrays, ranking, scores
from detrojan.analysis.statistics.arrays import Study
from detrojan.analysis.statistics.crossed import Spread, holm
from detrojan.analysis.statistics.frames import frame_of, table_of_rows
from detrojan.analysis.statistics.ranking import Ranking
from detrojan.analysis.statistics.relative import SCORES
from detrojan.analysis.tables.base import Table, columns
from detrojan.analysis.tables.comparisons import SCOPES, TIES

Row = dict[str, Any]
ALPHA = 0.05

TABLE = Table(
    row="a measure, budget and two ranked defenses",
    holds="which defenses can be told apart",
    about="""\
Each two stand once, `defense` before `other` by name. The p are adjusted over all pairs of a measure and
budget, after Holm.""",
    columns=[
        columns("measure", kind=pa.string(), meaning="`acc`, `asr`, `ra` or `der`", words=True),
        columns("spc", kind=pa.int32(), meaning="the budget; null: all budgets pooled", null=True),
        columns("defense", "other", kind=pa.string(), meaning="the two"),
        columns("num_settings", kind=pa.int32(), meaning="settings in which both have a result"),
        columns(
            "levels_missing",
            kind=pa.string(),
            meaning="data sets, architectures and attacks of the study that none of these is of",
            null=True,
        ),
        columns(
            "win_share",
            kind=pa.float64(),
            meaning="share of settings that both were planned in, in which `defense` is better, ties half",
        ),
        columns(
            "difference",
            *(f"difference_{scope}_{end}" for scope in SCOPES for end in ("low", "high")),
            kind=pa.float64(),
            meaning="value of `defense` minus that of `other`, pair by pair, with both 95 % intervals",
            null=True,
        ),
        columns(
            *("p_grid", "p_grid_holm", "p_beyond", "p_beyond_holm"),
            kind=pa.float64(),
            meaning="two-sided p of a true difference of 0, alone and adjusted; null where there is no "
            "spread to judge by",
            null=True,
        ),
        columns(
            *("apart_grid", "apart_beyond"),
            kind=pa.bool_(),
            meaning="whether they can be told apart: the adjusted p is below 0.05 and the difference is more "
            "than a point (of DER, half a point); null without a p",
            null=True,
        ),
    ],
)


def make(cells: pa.Table) -> pa.Table:
    """Return a row a measure, budget and pair of ranked defenses; the pooled budget comes first.

    Args:
        cells: with the columns of ``CELLS``.
    """
    study = arrays.of_cells(scores.attacked(frame_of(cells)))
    rows = []
    for measure in SCORES:
        differences: dict[tuple[str, str], arrays.Pairs] = {}
        for budget in (None, *study.budgets):
            if found := ranking.of_study(study, measure, budget):
                rows += _rows(study, found, measure, budget, differences)
    return table_of_rows(rows, TABLE.schema)


def _rows(
    study: Study,
    found: Ranking,
    measure: str,
    budget: int | None,
    differences: dict[tuple[str, str], arrays.Pairs],
) -> list[Row]:
    """Return the rows of a measure and budget; ``differences`` keeps those of all budgets."""
    at, rows = study.at(budget), []
    for (place, name), (other_place, other) in itertools.combinations(enumerate(found.names), 2):
        if (name, other) not in differences:
            differences[name, other] = study.pairs(name, other, measure)
        crossed = differences[name, other].crossed(study.design, at)
        row: Row = {"measure": measure, "spc": budget, "defense": name, "other": other}
        row |= {
            "num_settings": crossed.num_settings,
            "levels_missing": study.levels_missing(~np.isnan(crossed.means)),
            "win_share": float(found.win_shares[place, other_place]),
            "difference": crossed.mean,
        }
        for scope in SCOPES:
            spread: Spread = getattr(crossed, scope)
            low, high = spread.interval(crossed.mean)
            row |= {f"difference_{scope}_low": low, f"difference_{scope}_high": high}
            row[f"p_{scope}"] = spread.p_value(crossed.mean)
        rows.append(row)
    for scope in SCOPES:
        adjusted = holm([row[f"p_{scope}"] for row in rows])
        for row, p in zip(rows, adjusted, strict=True):
            apart = p < ALPHA and abs(row["difference"]) > TIES[measure]
            row |= {f"p_{scope}_holm": p, f"apart_{scope}": None if math.isnan(p) else apart}
    return rows
