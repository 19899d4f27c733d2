"""What choosing settings gains, and what it costs: the trials of each defense, by how many were run."""

import math
from typing import Any

import pyarrow as pa

from detrojan.analysis.statistics import tuning
from detrojan.analysis.statistics.frames import table_of_rows
from detrojan.analysis.tables.base import Table, as_in_cells, columns

Row = dict[str, Any]

TABLE = Table(
    row="a data set, defense, budget and number of trials",
    holds="what choosing settings gains and costs",
    about="""\
Of [trials](tuning.md) alone; empty where a study has none. The first trials are a smaller search, so there is
a row for each of several numbers of them, the last with all. Means are over the cells that every trial has,
on models whose attack took; a cell without a result has a DER of 0. No ranking has any of this.""",
    columns=[
        as_in_cells("dataset", "defense", "spc", meaning="the search"),
        columns("num_trials", kind=pa.int32(), meaning="the first so many trials"),
        columns("num_cells", kind=pa.int32(), meaning="cells of each"),
        columns("num_attacks", kind=pa.int32(), meaning="attacks that these are of"),
        columns("chosen", kind=pa.int32(), meaning="the trial that all attacks together choose"),
        columns(
            "der_survey",
            "der_paper",
            kind=pa.float64(),
            meaning="mean DER of the first trial, whose settings are those of `survey`, and of the second, "
            "`paper`; null if it was not run",
            null=True,
        ),
        columns(
            "der_tuned",
            kind=pa.float64(),
            meaning="mean DER of the trial that attacks of other families choose, each attack by its own "
            "choice; null without other families",
            null=True,
        ),
        columns(
            "der_oracle",
            kind=pa.float64(),
            meaning="mean DER of the trial that is best at each cell: a bound, which no choice exceeds",
        ),
        columns("gain", kind=pa.float64(), meaning="`der_tuned` minus `der_paper`", null=True),
        columns("cost", kind=pa.float64(), meaning="`der_oracle` minus `der_tuned`", null=True),
        columns(
            "forward_passes",
            "backward_passes",
            kind=pa.int64(),
            meaning="images through the whole network in all these trials, and back",
        ),
    ],
    across=True,
)


def make(trials: pa.Table) -> pa.Table:
    """Return a row a data set, defense, budget and number of trials.

    Args:
        trials: the cells of trials, with the columns of ``CELLS``.
    """
    rows: list[Row] = []
    for search in tuning.searches(trials):
        all_trials = int(search.numbers.max()) + 1
        budgets = [*(size for size in tuning.BUDGETS if size < all_trials), all_trials]
        found = {budget: search.first(budget) for budget in budgets}
        rows += [_row(smaller, budget) for budget, smaller in found.items() if len(smaller.numbers)]
    return table_of_rows(rows, TABLE.schema)


def _row(search: tuning.Search, budget: int) -> Row:
    at = search.chosen()
    assert at is not None, "a search has cells"
    survey, paper = (_mean(search.of_trial(number)) for number in (0, 1))
    tuned, oracle = _mean(search.tuned), _mean(search.oracle)
    return {
        "dataset": search.dataset,
        "defense": search.defense,
        "spc": search.spc,
        "num_trials": budget,
        "num_cells": len(search.der),
        "num_attacks": len(set(search.attacks)),
        "chosen": int(search.numbers[at]),
        "der_survey": survey,
        "der_paper": paper,
        "der_tuned": tuned,
        "der_oracle": oracle,
        "gain": tuned - paper,
        "cost": oracle - tuned,
        "forward_passes": int(search.rows["forward_passes"].sum()),
        "backward_passes": int(search.rows["backward_passes"].sum()),
    }


def _mean(values: tuning.Array) -> float:
    return float(values.mean()) if len(values) else math.nan
