"""How much of what a defense can do hangs on its settings: what a blind setting earns of the best one's."""

import pyarrow as pa

from detrojan.analysis.statistics import tuning
from detrojan.analysis.statistics.frames import table_of_rows
from detrojan.analysis.tables.base import Table, as_in_cells, columns
from detrojan.study.trials import FIRST_DRAWN

TABLE = Table(
    row="a data set, defense and budget",
    holds="how much hangs on settings",
    about="""\
Of the [trials](tuning.md) whose settings are drawn; empty where a study has none. A trial earns its mean DER
minus 0.5, which a model has to which nothing is done. A report, and no part of any rank.""",
    columns=[
        as_in_cells("dataset", "defense", "spc", meaning="the search"),
        columns("num_trials", kind=pa.int32(), meaning="trials whose settings are drawn"),
        columns("num_attacks", kind=pa.int32(), meaning="attacks that they met"),
        columns("num_seeds", kind=pa.int32(), meaning="seeds of models that they met"),
        columns(
            "typical",
            "best",
            kind=pa.float64(),
            meaning="what the median trial earns, and the best one; means over attacks",
        ),
        columns(
            *("stability", "stability_low", "stability_high"),
            kind=pa.float64(),
            meaning="`typical` / `best`, cut to [0, 1]: what a setting that is drawn blindly earns of what "
            "the best earns, and its 95 % interval over attacks, then seeds; null if `best` is below 0.02: "
            "nothing was won",
            null=True,
        ),
        columns(
            "transfer",
            kind=pa.float64(),
            meaning="what the settings that other families of attacks choose earn, divided by `best`; above "
            "1 where these are the settings of a protocol; null likewise, or without other families",
            null=True,
        ),
    ],
    across=True,
)


def make(trials: pa.Table) -> pa.Table:
    """Return a row a data set, defense and budget.

    Args:
        trials: the cells of trials, with the columns of ``CELLS``.
    """
    rows = []
    for search in tuning.searches(trials):
        found = tuning.stability(search)
        if found is not None:
            rows.append(
                {
                    "dataset": search.dataset,
                    "defense": search.defense,
                    "spc": search.spc,
                    "num_trials": int((search.numbers >= FIRST_DRAWN).sum()),
                    "num_attacks": len(set(search.attacks)),
                    "num_seeds": len(set(search.seeds)),
                    "typical": found.typical,
                    "best": found.best,
                    "stability": found.score,
                    "stability_low": found.low,
                    "stability_high": found.high,
                    "transfer": found.transfer,
                }
            )
    return table_of_rows(rows, TABLE.schema)
