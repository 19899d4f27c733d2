"""How far a defense can be relied on: over settings, in the worst of them, and where it does harm.

Means and intervals are of cells that ended well. What has no result is counted in ``num_without_result``
here, and with its reasons in :mod:`.outcomes`.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyarrow as pa

from detrojan.analysis.statistics import bootstrap, scores
from detrojan.analysis.statistics.relative import LOWER_IS_BETTER, SCORES, SHARES, UNCHANGED
from detrojan.analysis.statistics.scores import BUDGET, NESTED
from detrojan.analysis.statistics.summary import SETTING, clipped, frame_of, table
from detrojan.storage.columns import OK, required
from detrojan.study.schema import BASELINES

SPREADS = (*SETTING, "spc")
SLACK = 1e-9  # of a share; test sets are not that large

CONSISTENCY = pa.schema(
    [
        pa.field("spc", pa.int32()),
        required("defense", pa.string()),
        required("threat_model", pa.string()),
        required("num_settings", pa.int32()),
        required("num_without_result", pa.int32()),
        required("num_models", pa.int32()),
        required("single_seed", pa.bool_()),
        *(
            pa.field(f"{measure}_{part}", pa.float64())
            for measure in SCORES
            for part in ("mean", "low", "high", "worst_tenth")
        ),
        pa.field("interval_over", pa.string()),
        *(pa.field(f"der_spread_{axis}", pa.float64()) for axis in SPREADS),
        pa.field("share_beats_baselines", pa.float64()),
        pa.field("share_harmful", pa.float64()),
        required("num_clean_settings", pa.int32()),
        pa.field("clean_acc_drop_mean", pa.float64()),
        pa.field("clean_acc_drop_worst_tenth", pa.float64()),
        pa.field("seconds", pa.float64()),
    ]
)


def consistency(cells: pa.Table) -> pa.Table:
    """Return a row a budget and defense, the untouched model (``none``) among them; pooled first.

    Args:
        cells: with the columns of ``CELLS``.
    """
    frame = frame_of(cells)
    attacked, clean = scores.attacked(frame), scores.clean(frame)
    if attacked.empty:
        return CONSISTENCY.empty_table()
    budgets = [(None, attacked, clean)] + [
        (budget, rows, clean[clean[BUDGET] == budget]) for budget, rows in attacked.groupby(BUDGET)
    ]
    parts = [
        table(_of_budget(rows, unattacked).assign(spc=spc), CONSISTENCY) for spc, rows, unattacked in budgets
    ]
    return pa.concat_tables(parts)


def _of_budget(attacked: pd.DataFrame, clean: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of one budget, or of several that are pooled."""
    pooled = scores.pooled(attacked, ["defense"], SCORES)
    intervals = clipped(bootstrap.intervals(pooled, ["defense"], SCORES, NESTED), SHARES)
    rows = intervals.rename(columns={"der_over": "interval_over"}).set_index("defense")
    settings = nested_means(pooled, SCORES)
    rows = rows.join(_counts(attacked, settings)).join(_relied_on(settings))
    rows = rows.join(_spreads(settings)).join(_spread(_of_budgets(attacked), BUDGET, "spc"))
    return rows.join(_harm_to_clean(clean)).fillna({"num_clean_settings": 0}).reset_index()


def nested_means(frame: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    """Return each defense's mean in each setting, over models by their means over draws."""
    of_models = frame.groupby(["defense", *SETTING, "seed"], observed=True)[list(measures)].mean()
    return of_models.groupby(["defense", *SETTING], observed=True).mean().reset_index()


def _of_budgets(attacked: pd.DataFrame) -> pd.DataFrame:
    """Return each defense's scores in each setting and budget."""
    of_models = attacked.groupby(["defense", *SETTING, BUDGET, "seed"], observed=True)[list(SCORES)].mean()
    return of_models.groupby(["defense", *SETTING, BUDGET], observed=True).mean().reset_index()


def worst_tenth(values: "pd.Series[float]", *, lower_is_better: bool) -> float:
    """Return the mean of the worst tenth of ``values``, at least of one; NaN if there is none."""
    known = values.dropna().sort_values(ascending=not lower_is_better)
    return float(known.iloc[: math.ceil(len(known) / 10)].mean()) if len(known) else np.nan


def _counts(attacked: pd.DataFrame, settings: pd.DataFrame) -> pd.DataFrame:
    by_defense = attacked.assign(ok_seconds=attacked["seconds"].where(attacked["status"] == OK))
    counts = by_defense.groupby("defense", observed=True).agg(
        threat_model=("threat_model", "first"), seconds=("ok_seconds", "mean")
    )
    ended = attacked[attacked["status"] == OK]
    models = ended.groupby(["defense", *SETTING], observed=True)["seed"].nunique().groupby("defense").min()
    has_result = settings[SCORES[0]].notna().groupby(settings["defense"])
    counts = counts.assign(
        num_settings=has_result.sum(),
        num_without_result=has_result.size() - has_result.sum(),
        num_models=models,
    ).fillna({"num_models": 0})
    return counts.assign(single_seed=counts["num_models"] == 1)


def _relied_on(settings: pd.DataFrame) -> pd.DataFrame:
    """Return the worst tenths, and in which share of settings a defense wins and does harm."""
    grouped = settings.groupby("defense", observed=True)
    found = {
        f"{measure}_worst_tenth": grouped[measure].apply(
            worst_tenth, lower_is_better=measure in LOWER_IS_BETTER
        )
        for measure in SCORES
    }
    der = settings.pivot(index=SETTING, columns="defense", values="der")
    harmful = (der < UNCHANGED - SLACK).where(der.notna())
    found |= {"share_harmful": _share(harmful), "share_beats_baselines": _share(_beats_baselines(der))}
    return pd.DataFrame(found)


def _beats_baselines(der: pd.DataFrame) -> pd.DataFrame:
    """Return where a defense beats both baselines: (settings, defenses), missing without a result."""
    # Where one of the two has no result, there is nothing to beat; of the baselines nothing is asked.
    best = der.reindex(columns=list(BASELINES)).max(axis="columns", skipna=False)
    beats = der.gt(best + SLACK, axis="index").where(der.notna()).where(best.notna(), axis="index")
    return beats.drop(columns=list(BASELINES), errors="ignore")


def _share(holds: pd.DataFrame) -> "pd.Series[float]":
    return holds.astype(float).mean()


def _spreads(settings: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([_spread(settings, axis, axis) for axis in SETTING], axis="columns")


def _spread(settings: pd.DataFrame, axis: str, name: str) -> "pd.Series[float]":
    """Return the standard deviation of DER's means at the values of ``axis``; missing with one value."""
    means = settings.groupby(["defense", axis], observed=True)["der"].mean()
    return means.groupby("defense").std(ddof=1).rename(f"der_spread_{name}")


def _harm_to_clean(clean: pd.DataFrame) -> pd.DataFrame:
    """Return what defenses cost clean models."""
    pooled = scores.pooled(clean, ["defense"], ["acc_drop"])
    grouped = nested_means(pooled, ["acc_drop"]).groupby("defense", observed=True)["acc_drop"]
    return pd.DataFrame(
        {
            "num_clean_settings": grouped.count(),
            "clean_acc_drop_mean": grouped.mean(),
            "clean_acc_drop_worst_tenth": grouped.apply(worst_tenth, lower_is_better=True),
        }
    )
