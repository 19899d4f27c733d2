"""Each defense against the two seminal baselines, fine-tuning and fine-pruning, pair by pair.

A pair is one draw of one model: both defenses met the same backdoor, with the same clean images. What is
averaged are differences, so what makes a model or a sample hard for all falls out of the interval.
The probability of improvement is the share of pairs in which the defense is better, ties half (Agarwal,
Schwarzer, Castro, Courville, Bellemare, "Deep Reinforcement Learning at the Edge of the Statistical
Precipice", NeurIPS 2021, Sec. 4.2, here on pairs), averaged like any measure: over draws, models, settings.
"""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from detrojan.analysis.statistics import bootstrap, scores
from detrojan.analysis.statistics.frames import SETTING, frame_of, table
from detrojan.analysis.statistics.relative import LOWER_IS_BETTER, SCORES
from detrojan.analysis.statistics.scores import BUDGET, MODEL, NESTED
from detrojan.analysis.tables.base import Table, columns
from detrojan.cells import NO_METHOD
from detrojan.study.schema import BASELINES

PARTS = {"difference": (-np.inf, np.inf), "improvement": (0.0, 1.0)}  # with the range of each

TABLE = Table(
    row="a measure, budget, baseline and defense",
    holds="each defense against fine-tuning and fine-pruning, pair by pair",
    columns=[
        columns("measure", kind=pa.string(), meaning="`acc`, `asr`, `ra` or `der`", words=True),
        columns("spc", kind=pa.int32(), meaning="the budget; null: all budgets pooled", null=True),
        columns("baseline", kind=pa.string(), meaning="`ft` or `fp`", words=True),
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
            *("difference", "difference_low", "difference_high"),
            kind=pa.float64(),
            meaning="the defense's value minus the baseline's, mean and 95 % interval; of ASR, a negative "
            "one is good",
            null=True,
        ),
        columns(
            *("improvement", "improvement_low", "improvement_high"),
            kind=pa.float64(),
            meaning="share of pairs in which the defense is better, ties half",
            null=True,
        ),
        columns(
            "interval_over",
            kind=pa.string(),
            meaning="what varies within the intervals: `settings`, `models` or `draws`",
            null=True,
            words=True,
        ),
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
    attacked = scores.attacked(frame_of(cells))
    found = [part for baseline in BASELINES for part in _against(baseline, attacked)]
    parts = [table(part, TABLE.schema) for part in found]
    whole = pa.concat_tables([TABLE.schema.empty_table(), *parts])
    order = [(name, "ascending", "at_start") for name in ("measure", "baseline", "spc", "defense")]
    return whole.take(pc.sort_indices(whole, order))


def _against(baseline: str, attacked: pd.DataFrame) -> list[pd.DataFrame]:
    pairs = _pairs(baseline, attacked)
    if pairs.empty:
        return []
    values = [f"{part} {measure}" for part in PARTS for measure in SCORES]
    of_budgets = bootstrap.intervals(pairs, [BUDGET, "defense"], values, NESTED)
    over_all = scores.pooled(pairs, ["defense"], values)
    pooled = bootstrap.intervals(over_all, ["defense"], values, NESTED).assign(spc=None)
    found = []
    for intervals, by in ((pooled, ["defense"]), (of_budgets, [BUDGET, "defense"])):
        for measure in SCORES:
            counted = _counts(pairs, by, f"difference {measure}")
            rows = intervals.merge(counted, on=by).rename(columns=_names(measure))
            for part, (low, high) in PARTS.items():
                ends = [f"{part}_low", f"{part}_high"]
                rows[ends] = rows[ends].clip(low, high)
            found.append(rows[rows["num_pairs"] > 0].assign(measure=measure, baseline=baseline))
    return found


def _pairs(baseline: str, attacked: pd.DataFrame) -> pd.DataFrame:
    """Return a row a pair, with the columns ``difference MEASURE`` and ``improvement MEASURE``."""
    axes = [*MODEL, BUDGET, "draw"]
    of_baseline = attacked.loc[attacked["defense"] == baseline, [*axes, *SCORES]]
    others = attacked[~attacked["defense"].isin([baseline, NO_METHOD])]
    others = others[[*axes, "defense", "threat_model", "spc", *SCORES]]
    # A method that is given no data has one run, which stands beside every draw of the baseline.
    alone = others["spc"] != others[BUDGET]
    repeated = (
        others[alone]
        .drop(columns="draw")
        .merge(of_baseline, on=[axis for axis in axes if axis != "draw"], suffixes=("", " baseline"))
    )
    paired = others[~alone].merge(of_baseline, on=axes, suffixes=("", " baseline"))
    pairs = pd.concat([repeated, paired], ignore_index=True)
    columns: dict[str, pd.Series[float]] = {}
    for measure in SCORES:
        difference = pairs[measure] - pairs[f"{measure} baseline"]
        gain = -difference if measure in LOWER_IS_BETTER else difference
        improvement = pd.Series(np.sign(gain) / 2 + 0.5, pairs.index)
        columns |= {f"difference {measure}": difference, f"improvement {measure}": improvement}
    return pairs[[*axes, "defense", "threat_model"]].assign(**columns)


def _counts(pairs: pd.DataFrame, by: list[str], value: str) -> pd.DataFrame:
    known = pairs[value].notna()
    model = pd.Series(pairs.groupby(MODEL, observed=True).ngroup(), pairs.index)
    setting = pd.Series(pairs.groupby(SETTING, observed=True).ngroup(), pairs.index)
    counted = pairs[[*by, "threat_model", *SETTING]].assign(
        known=known, unknown=~known, model=model.where(known), setting=setting.where(known)
    )
    counts = counted.groupby(by, observed=True).agg(
        threat_model=("threat_model", "first"),
        num_settings=("setting", "nunique"),
        num_models=("model", "nunique"),
        num_pairs=("known", "sum"),
        num_unpaired=("unknown", "sum"),
    )
    # Settings with two models or more tell a seed's part from the setting's.
    return counts.assign(single_seed=counts["num_models"] == counts["num_settings"]).reset_index()


def _names(measure: str) -> dict[str, str]:
    """Return what the columns of the intervals of ``measure`` are called in the table."""
    ends = {"_mean": "", "_low": "_low", "_high": "_high"}
    names = {f"{part} {measure}{old}": f"{part}{new}" for part in PARTS for old, new in ends.items()}
    return names | {f"difference {measure}_over": "interval_over", BUDGET: "spc"}
