"""Each defense against fine-tuning, fine-pruning and the untouched model, pair by pair.

A pair is one draw of one model: both defenses met the same backdoor, with the same clean images. What is
averaged are differences, so what makes a model or a sample hard for all falls out of the interval.
The probability of improvement is the share of pairs in which the defense is better, ties half (Agarwal,
Schwarzer, Castro, Courville, Bellemare, "Deep Reinforcement Learning at the Edge of the Statistical
Precipice", NeurIPS 2021, Sec. 4.2, here on pairs), averaged like any measure: over draws, models, settings. A
tie is a difference of at most a point: which of two has the last image right is luck.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from detrojan.analysis.statistics import arrays, scores
from detrojan.analysis.statistics.arrays import Pairs, Study
from detrojan.analysis.statistics.crossed import Array, Crossed, Spread, holm, share_interval
from detrojan.analysis.statistics.frames import frame_of, table_of_rows
from detrojan.analysis.statistics.relative import COMPARED, LOWER_IS_BETTER
from detrojan.analysis.tables.base import Table, columns
from detrojan.cells import NO_METHOD
from detrojan.study.schema import BASELINES

Row = dict[str, Any]
AGAINST = (*BASELINES, NO_METHOD)
TIES = dict.fromkeys(COMPARED, 0.01) | {"der": 0.005}  # a point; DER is half of a difference
SCOPES = ("grid", "beyond")

TABLE = Table(
    row="a measure, budget, baseline and defense",
    holds="each defense against fine-tuning, fine-pruning and the untouched model, pair by pair",
    about="""\
A *family* is a measure, a budget and a baseline: over its defenses the p are adjusted, after Holm. There are
[two intervals](statistics.md#intervals), and so two p, for two questions.""",
    columns=[
        columns("measure", kind=pa.string(), meaning="`acc`, `asr`, `ra`, `der` or `net`", words=True),
        columns("spc", kind=pa.int32(), meaning="the budget; null: all budgets pooled", null=True),
        columns(
            "baseline", kind=pa.string(), meaning="`ft`, `fp`, or `none`: the untouched model", words=True
        ),
        columns("defense", "threat_model", kind=pa.string(), meaning="what is compared with it"),
        columns(
            "num_settings",
            "num_models",
            "num_pairs",
            kind=pa.int32(),
            meaning="what the comparison is over; a pair is one draw of one model",
        ),
        columns(
            "num_unpaired", kind=pa.int32(), meaning="planned pairs in which one of the two has no result"
        ),
        columns(
            "num_tied", kind=pa.int32(), meaning="pairs that differ by at most a point; of DER, half a point"
        ),
        columns(
            "levels_missing",
            kind=pa.string(),
            meaning="data sets, architectures and attacks of the study that no pair is of",
            null=True,
        ),
        columns(
            "difference",
            *(f"difference_{scope}_{end}" for scope in SCOPES for end in ("low", "high")),
            kind=pa.float64(),
            meaning="the defense's value minus the baseline's, mean and 95 % intervals on this grid and "
            "beyond; of ASR, a negative one is good",
            null=True,
        ),
        columns(
            "improvement",
            *(f"improvement_{scope}_{end}" for scope in SCOPES for end in ("low", "high")),
            kind=pa.float64(),
            meaning="share of pairs in which the defense is better, ties half",
            null=True,
        ),
        columns(
            *("p_grid", "p_grid_holm", "p_beyond", "p_beyond_holm"),
            kind=pa.float64(),
            meaning="two-sided p of a true difference of 0, alone and adjusted in its family; null where "
            "there is no spread to judge by",
            null=True,
        ),
        columns("num_family", kind=pa.int32(), meaning="defenses of the family"),
        columns(
            *("grid_basis", "beyond_over"),
            kind=pa.string(),
            meaning="as in `consistency`, of the difference",
            null=True,
            words=True,
        ),
        columns("beyond_df", kind=pa.float64(), meaning="its degrees of freedom", null=True),
        columns("single_seed", kind=pa.bool_(), meaning="whether each setting is one attack seed"),
    ],
)


def make(cells: pa.Table) -> pa.Table:
    """Return a row a measure, budget, baseline and defense; the pooled budget comes first.

    ``difference`` is the defense's value minus the baseline's, in the measure's own units: of ASR a
    negative one is good. ``num_unpaired`` counts planned pairs in which one of the two has no result.

    Args:
        cells: with the columns of ``CELLS``.
    """
    study = arrays.of_cells(scores.attacked(frame_of(cells)))
    rows = [
        row
        for measure in sorted(COMPARED)
        for baseline in sorted(set(AGAINST) & set(study.runs))
        for row in _against(study, measure, baseline)
    ]
    return table_of_rows(rows, TABLE.schema)


def _against(study: Study, measure: str, baseline: str) -> list[Row]:
    """Return the rows of a measure and baseline, budget by budget."""
    rivals = [name for name in study.runs if name not in (baseline, NO_METHOD)]
    pairs = {name: study.pairs(name, baseline, measure) for name in rivals}
    rows = []
    for budget in (None, *study.budgets):
        about: Row = {"measure": measure, "baseline": baseline, "spc": budget}
        found: list[Row] = [
            about | {"defense": name, "threat_model": study.runs[name].threat_model} | row
            for name in rivals
            if (row := _row(study, pairs[name], measure, budget))["num_pairs"]
        ]
        for scope in SCOPES:
            adjusted = holm([row[f"p_{scope}"] for row in found])
            for row, p in zip(found, adjusted, strict=True):
                row |= {f"p_{scope}_holm": p, "num_family": len(found)}
        rows += found
    return rows


def _row(study: Study, pairs: Pairs, measure: str, budget: int | None) -> Row:
    """Return what is known of the pairs of two defenses at a budget."""
    at = study.at(budget)
    differences, planned = pairs.difference[:, :, at], pairs.planned[:, :, at]
    crossed = Crossed(study.design, differences, pairs.budgets[:, :, at])
    won = Crossed(study.design, improvement(differences, measure), pairs.budgets[:, :, at])
    tied = np.abs(differences) <= TIES[measure]
    row: Row = {
        "num_settings": crossed.num_settings,
        "num_models": crossed.num_models,
        "num_pairs": int((~np.isnan(differences)).sum()),
        "num_unpaired": int((planned & np.isnan(differences)).sum()),
        "num_tied": int(tied.sum()),
        "levels_missing": study.levels_missing(~np.isnan(crossed.means)),
        "grid_basis": crossed.grid.basis or None,
        "beyond_over": crossed.beyond.basis or None,
        "beyond_df": crossed.beyond.df,
        "difference": crossed.mean,
        "improvement": won.mean,
        # Settings with two models or more tell a seed's part from the setting's.
        "single_seed": crossed.num_models == crossed.num_settings,
    }
    for scope, clusters in (("grid", won.num_strata), ("beyond", fewest_levels(won))):
        spread: Spread = getattr(crossed, scope)
        row[f"p_{scope}"] = spread.p_value(crossed.mean)
        ends = {
            "difference": spread.interval(crossed.mean),
            "improvement": share_interval(won.mean, getattr(won, scope), clusters),
        }
        for name, (low, high) in ends.items():
            row |= {f"{name}_{scope}_low": low, f"{name}_{scope}_high": high}
    return row


def improvement(differences: Array, measure: str) -> Array:
    """Return 1 where a difference is for the better, 0 where for the worse, 0.5 for a tie; NaN stays."""
    gains = -differences if measure in LOWER_IS_BETTER else differences
    tied = np.abs(gains) <= TIES[measure]
    won: Array = np.where(tied, 0.5, np.sign(gains) / 2 + 0.5)
    return won


def fewest_levels(crossed: Crossed) -> int:
    """Return the fewest levels of a factor that varies; 0 where none does."""
    return min((int(part.df) + 1 for part in crossed.by_factor.values()), default=0)
