"""Mean ranks of defenses over settings, from pairs: see :mod:`detrojan.analysis.statistics.ranking`.

Rank 1 is the best. :mod:`.pairs` tells which of two can be told apart.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from detrojan.analysis.statistics import arrays, ranking, scores
from detrojan.analysis.statistics.arrays import Study
from detrojan.analysis.statistics.crossed import Crossed
from detrojan.analysis.statistics.frames import frame_of, table_of_rows
from detrojan.analysis.statistics.ranking import Ranking
from detrojan.analysis.statistics.relative import SCORES
from detrojan.analysis.tables.base import Table, columns
from detrojan.analysis.tables.comparisons import SCOPES, improvement
from detrojan.cells import NO_METHOD

Row = dict[str, Any]
# By measure, budget and two defenses, whether they can be told apart, in each scope.
Apart = Mapping[tuple[str, int | None, frozenset[str]], Row]

TABLE = Table(
    row="a measure, budget and defense",
    holds="mean ranks over settings",
    about="""\
The best mean rank first, then those that are not ranked. What is ranked, and how failures are, stands in
[statistics.md](statistics.md#ranks).""",
    columns=[
        columns("measure", kind=pa.string(), meaning="`acc`, `asr`, `ra` or `der`", words=True),
        columns("spc", kind=pa.int32(), meaning="the budget; null: all budgets pooled", null=True),
        columns("defense", "threat_model", kind=pa.string(), meaning="the defense"),
        columns("ranked", kind=pa.bool_(), meaning="whether it is ranked"),
        columns("why_not", kind=pa.string(), meaning="if not, why", null=True),
        columns("num_settings", kind=pa.int32(), meaning="settings that it was planned in"),
        columns(
            "num_without_result",
            kind=pa.int32(),
            meaning="of these, in which fewer than half of its cells ended well, at some budget of the row",
        ),
        columns(
            "num_shared_least",
            kind=pa.int32(),
            meaning="fewest settings that it and another ranked one were both planned in",
            null=True,
        ),
        columns(
            "num_shared_all",
            kind=pa.int32(),
            meaning="settings that all ranked ones were planned in; the same in all rows of a measure and "
            "budget",
        ),
        columns("num_models", kind=pa.int32(), meaning="fewest models behind one of its settings"),
        columns(
            "single_seed",
            kind=pa.bool_(),
            meaning="whether each setting is one attack seed: another seed may give another rank",
        ),
        columns("mean_rank", kind=pa.float64(), meaning="from pairs; 1 is the best", null=True),
        columns(
            *(f"rank_{scope}_{end}" for scope in SCOPES for end in ("low", "high")),
            kind=pa.float64(),
            meaning="its 95 % intervals on this grid and beyond",
            null=True,
        ),
        columns("num_defenses", kind=pa.int32(), meaning="ranked defenses"),
        columns(
            "grid_basis",
            kind=pa.string(),
            meaning="as in `consistency`, of the rank",
            null=True,
            words=True,
        ),
        columns(
            "beats_untouched",
            kind=pa.float64(),
            meaning="share of its cells that are better than the untouched model by more than a point (of "
            "DER, half a point), ties half: a rank without it crowns the least useless",
            null=True,
        ),
        columns(
            *("leader_apart_grid", "leader_apart_beyond"),
            kind=pa.bool_(),
            meaning="whether it can be told from the first one, as in `pairs`; null for that one",
            null=True,
        ),
    ],
)


def make(cells: pa.Table, pairs: pa.Table) -> pa.Table:
    """Return a row a measure, budget and defense, the best mean rank first; the pooled budget comes first.

    Args:
        cells: with the columns of ``CELLS``.
        pairs: of the schema of that table.
    """
    study = arrays.of_cells(scores.attacked(frame_of(cells)))
    apart = {
        (row["measure"], row["spc"], frozenset((row["defense"], row["other"]))): row
        for row in pairs.to_pylist()
    }
    rows = [
        row
        for measure in SCORES
        for budget in (None, *study.budgets)
        if (found := ranking.of_study(study, measure, budget))
        for row in _rows(study, found, measure, budget, apart)
    ]
    return table_of_rows(rows, TABLE.schema)


def _rows(study: Study, found: Ranking, measure: str, budget: int | None, apart: Apart) -> list[Row]:
    """Return the rows of a measure and budget, in their order."""
    every = np.all([found.planned[name] for name in found.names], axis=0)
    rows: list[Row] = []
    for name in (*found.names, *sorted(found.why_not)):
        seeds = study.runs[name].planned[:, :, study.at(budget)].any((2, 3)).sum(1)
        models = int(seeds[found.planned[name]].min(initial=seeds.max()))
        rows.append(
            {
                "measure": measure,
                "spc": budget,
                "defense": name,
                "threat_model": study.runs[name].threat_model,
                "ranked": name in found.names,
                "why_not": found.why_not.get(name),
                "num_settings": int(found.planned[name].sum()),
                "num_without_result": int(found.without[name].sum()),
                "num_shared_all": int(every.sum()),
                "num_models": models,
                "single_seed": models == 1,
                "num_defenses": len(found.names),
                "beats_untouched": _beats_untouched(study, name, measure, budget),
            }
            | _rank(found, name)
        )
    rows.sort(key=lambda row: (not row["ranked"], row["mean_rank"] if row["ranked"] else 0, row["defense"]))
    leader = rows[0]["defense"]
    for row in rows:
        told = apart.get((measure, budget, frozenset((leader, row["defense"]))), {})
        row |= {f"leader_{scope}": told.get(scope) for scope in ("apart_grid", "apart_beyond")}
    return rows


def _rank(found: Ranking, name: str) -> Row:
    """Return the mean rank of a defense and its intervals, within what ranks there are."""
    ends = [f"rank_{scope}_{end}" for scope in SCOPES for end in ("low", "high")]
    row: Row = dict.fromkeys(("mean_rank", *ends), math.nan) | {"num_shared_least": None, "grid_basis": None}
    if name not in found.names:
        return row
    place = found.names.index(name)
    mean, crossed = found.mean_rank(place), found.crossed(place)
    row |= {"mean_rank": mean, "grid_basis": crossed.grid.basis or None}
    row["num_shared_least"] = int(np.delete(found.shared[place], place).min())
    for scope, spread in (("grid", crossed.grid), ("beyond", crossed.beyond)):
        low, high = np.clip(spread.interval(mean), 1, len(found.names))
        row |= {f"rank_{scope}_low": float(low), f"rank_{scope}_high": float(high)}
    return row


def _beats_untouched(study: Study, name: str, measure: str, budget: int | None) -> float:
    """Return the probability of improvement over the untouched model."""
    if NO_METHOD not in study.runs:
        return math.nan
    pairs, at = study.pairs(name, NO_METHOD, measure), study.at(budget)
    won = improvement(pairs.difference[:, :, at], measure)
    return Crossed(study.design, won, pairs.budgets[:, :, at]).mean
