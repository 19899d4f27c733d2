"""Mean ranks of defenses over settings, Friedman's test and Nemenyi's critical difference.

Source: Demšar, "Statistical Comparisons of Classifiers over Multiple Data Sets", JMLR 2006, Sec. 3.2.2; a
setting (data set, architecture, attack, ratio) takes the place of his data set. Rank 1 is the best, ties
share their mean rank, and what has no result shares the last ones. :mod:`.scores` has the rules.

Methods that know the trigger are not ranked, since no defender in the field does; nor, in tables of others,
those that are given the poisoned training set.
"""

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy import stats

from detrojan.analysis.statistics import bootstrap, scores
from detrojan.analysis.statistics.frames import SETTING, frame_of, table
from detrojan.analysis.statistics.relative import LOWER_IS_BETTER, SCORES
from detrojan.analysis.statistics.scores import BUDGET
from detrojan.analysis.tables.base import Table, columns

ALPHA = 0.05
RANKED = ("data_free", "clean_data")  # threat models: what a defender has

TABLE = Table(
    row="a measure, budget and defense",
    holds="mean ranks over settings",
    about="""\
The best mean rank first. What is ranked, and how failures are, stands in
[statistics.md](statistics.md#ranks).""",
    columns=[
        columns("measure", kind=pa.string(), meaning="`acc`, `asr`, `ra` or `der`", words=True),
        columns("spc", kind=pa.int32(), meaning="the budget; null: all budgets pooled", null=True),
        columns("defense", "threat_model", kind=pa.string(), meaning="the defense"),
        columns("num_settings", kind=pa.int32(), meaning="settings that all were ranked in"),
        columns(
            "num_incomplete",
            kind=pa.int32(),
            meaning="settings left out, as not every ranked defense was planned there",
        ),
        columns(
            "num_without_result",
            kind=pa.int32(),
            meaning="settings in which it has no result, and so the last rank",
        ),
        columns("num_models", kind=pa.int32(), meaning="fewest models behind one of its settings"),
        columns(
            "single_seed",
            kind=pa.bool_(),
            meaning="whether each setting is one attack seed: another seed may give another rank",
        ),
        columns("mean_rank", kind=pa.float64(), meaning="over the settings; 1 is the best"),
        columns(
            "rank_low", "rank_high", kind=pa.float64(), meaning="95 % interval, over settings", null=True
        ),
        columns("num_defenses", kind=pa.int32(), meaning="ranked defenses"),
        columns(
            "friedman_chi2",
            "friedman_p",
            kind=pa.float64(),
            meaning="Friedman's test that all are alike; the same in all rows of a measure and budget",
            null=True,
        ),
        columns(
            "critical_difference",
            kind=pa.float64(),
            meaning="mean ranks further apart than this differ at the level 0.05 (Nemenyi)",
            null=True,
        ),
    ],
)


def make(cells: pa.Table) -> pa.Table:
    """Return a row a measure, budget and defense, the best mean rank first; the pooled budget comes first.

    Only settings in which every ranked defense was planned count, so that all are ranked over the same.
    For the pooled budget the ranks at each budget are averaged in each setting, and ranked again.

    Args:
        cells: with the columns of ``CELLS``.
    """
    attacked = scores.attacked(frame_of(cells))
    of_settings = scores.of_settings(attacked[attacked["threat_model"].isin(RANKED)])
    found = [part for measure in SCORES for part in _ranked(of_settings, measure)]
    return pa.concat_tables([TABLE.schema.empty_table(), *(table(part, TABLE.schema) for part in found)])


def _ranked(of_settings: pd.DataFrame, measure: str) -> Iterator[pd.DataFrame]:
    """Yield the rows of a measure: pooled, then of each budget."""
    # A result without this measure was not published in full: it is no worse for that.
    known = of_settings[of_settings[measure].notna() | ~of_settings["has_result"]]
    wide = known.pivot(index=[*SETTING, BUDGET], columns="defense", values=measure)
    planned = known.pivot(index=[*SETTING, BUDGET], columns="defense", values="num_models").notna()
    any_result = wide.notna().any(axis="columns")
    wide, complete = wide[any_result], planned[any_result].all(axis="columns")
    ranks = wide[complete].rank(axis="columns", ascending=measure in LOWER_IS_BETTER, na_option="bottom")
    if ranks.empty:
        return
    lacking = wide[complete].isna()
    over_budgets = ranks.groupby(SETTING).mean().rank(axis="columns")
    pooled = _rows(
        over_budgets,
        lacking.groupby(SETTING).any(),
        num_incomplete=len(complete.groupby(SETTING).any()) - len(over_budgets),
    )
    every = [pooled.assign(spc=None)]
    for budget, of_budget in ranks.groupby(BUDGET):
        incomplete = ~complete[complete.index.get_level_values(BUDGET) == budget]
        rows = _rows(of_budget, lacking.loc[of_budget.index], num_incomplete=int(incomplete.sum()))
        every.append(rows.assign(spc=budget))
    about = of_settings.groupby("defense").agg(
        threat_model=("threat_model", "first"), num_models=("num_models", "min")
    )
    for rows in every:
        yield rows.join(about, on="defense").assign(
            measure=measure, single_seed=lambda frame: frame["num_models"] == 1
        )


def _rows(ranks: pd.DataFrame, lacking: pd.DataFrame, num_incomplete: int) -> pd.DataFrame:
    """Return a row a defense, by its mean rank: (settings, defenses) in, one block a setting."""
    num_settings, num_defenses = ranks.shape
    long = ranks.reset_index().melt(SETTING, list(ranks.columns), value_name="rank")
    intervals = bootstrap.intervals(long, ["defense"], ["rank"], {"settings": SETTING})
    chi2, p = friedman(ranks.to_numpy(float))
    rows = intervals.rename(columns={"rank_mean": "mean_rank"}).assign(
        num_settings=num_settings,
        num_incomplete=num_incomplete,
        num_defenses=num_defenses,
        friedman_chi2=chi2,
        friedman_p=p,
        critical_difference=critical_difference(num_defenses, num_settings),
    )
    ends = ["rank_low", "rank_high"]
    rows[ends] = rows[ends].clip(1, num_defenses)
    rows["num_without_result"] = rows["defense"].map(lacking.sum()).astype(int)
    return rows.sort_values(["mean_rank", "defense"], ignore_index=True)


def friedman(ranks: bootstrap.Array) -> tuple[float | None, float | None]:
    """Return Friedman's statistic, corrected for ties, and its p value by the chi-square distribution.

    Both are None for fewer than 3 defenses or 2 settings, and where all are tied everywhere.

    Args:
        ranks: (settings, defenses), or scores, which are ranked in each setting.
    """
    num_settings, num_defenses = ranks.shape
    if num_defenses < 3 or num_settings < 2 or (np.ptp(ranks, axis=1) == 0).all():
        return None, None
    chi2, p = stats.friedmanchisquare(*ranks.T)
    return float(chi2), float(p)


def critical_difference(num_defenses: int, num_settings: int) -> float | None:
    """Return by how much two mean ranks must differ to differ at the level 0.05 (Nemenyi).

    This is ``q sqrt(k (k + 1) / (6 N))`` with the studentized range's quantile over the square root of two;
    None for fewer than two defenses or settings.
    """
    if min(num_defenses, num_settings) < 2:
        return None
    quantile = stats.studentized_range.ppf(1 - ALPHA, num_defenses, np.inf) / math.sqrt(2)
    return float(quantile * math.sqrt(num_defenses * (num_defenses + 1) / (6 * num_settings)))
