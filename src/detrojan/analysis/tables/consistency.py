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
from detrojan.analysis.statistics.frames import SETTING, clipped, frame_of, table
from detrojan.analysis.statistics.relative import LOWER_IS_BETTER, SCORES, SHARES, UNCHANGED
from detrojan.analysis.statistics.scores import BUDGET, NESTED
from detrojan.analysis.tables.base import Table, columns
from detrojan.storage.columns import OK
from detrojan.study.schema import BASELINES

SPREADS = (*SETTING, "spc")
SLACK = 1e-9  # of a share; test sets are not that large

PARTS = ("mean", "low", "high", "worst_tenth")
OF_SCORES = {
    "acc": "mean ACC over settings, its 95 % interval, and the mean of the worst tenth of settings",
    "asr": "the same of ASR, whose worst are the highest",
    "ra": "the same of RA",
    "der": "the same of DER",
}
TABLE = Table(
    row="a budget and defense",
    holds="means over settings, worst tenths, spreads and harm",
    about="The untouched model is the row with defense `none`.",
    columns=[
        columns("spc", kind=pa.int32(), meaning="the budget; null: all budgets pooled", null=True),
        columns("defense", "threat_model", kind=pa.string(), meaning="the defense"),
        columns(
            "num_settings",
            kind=pa.int32(),
            meaning="settings whose attack took, and in which it has a result",
        ),
        columns(
            "num_without_result",
            kind=pa.int32(),
            meaning="settings whose attack took, and in which it has none",
        ),
        columns("num_models", kind=pa.int32(), meaning="fewest models with a result in one of its settings"),
        columns("single_seed", kind=pa.bool_(), meaning="whether that is one"),
        *(
            columns(
                *(f"{measure}_{part}" for part in PARTS),
                kind=pa.float64(),
                meaning=OF_SCORES[measure],
                null=True,
            )
            for measure in SCORES
        ),
        columns(
            "interval_over",
            kind=pa.string(),
            meaning="what varies within the intervals: `settings`, `models` or `draws`",
            null=True,
            words=True,
        ),
        columns(
            *(f"der_spread_{axis}" for axis in SPREADS),
            kind=pa.float64(),
            meaning="standard deviation of the mean DER between the values of that axis; null where there is "
            "one",
            null=True,
        ),
        columns(
            "share_beats_baselines",
            kind=pa.float64(),
            meaning="share of settings in which its DER is above both fine-tuning's and fine-pruning's",
            null=True,
        ),
        columns(
            "share_harmful",
            kind=pa.float64(),
            meaning="share of settings in which it costs more accuracy than it removes attack success (DER "
            "below 0.5)",
            null=True,
        ),
        columns(
            "num_clean_settings", kind=pa.int32(), meaning="clean models' settings in which it has a result"
        ),
        columns(
            *("clean_acc_drop_mean", "clean_acc_drop_worst_tenth"),
            kind=pa.float64(),
            meaning="accuracy that it costs clean models",
            null=True,
        ),
        columns("seconds", kind=pa.float64(), meaning="mean wall time of the defense", null=True),
    ],
)


def make(cells: pa.Table) -> pa.Table:
    """Return a row a budget and defense, the untouched model (``none``) among them; pooled first.

    Args:
        cells: with the columns of ``CELLS``.
    """
    frame = frame_of(cells)
    attacked, clean = scores.attacked(frame), scores.clean(frame)
    if attacked.empty:
        return TABLE.schema.empty_table()
    budgets = [(None, attacked, clean)] + [
        (budget, rows, clean[clean[BUDGET] == budget]) for budget, rows in attacked.groupby(BUDGET)
    ]
    parts = [
        table(_of_budget(rows, unattacked).assign(spc=spc), TABLE.schema) for spc, rows, unattacked in budgets
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
