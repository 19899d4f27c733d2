"""What rankings and comparisons stand on: the cells that count, by budget, and each setting's scores.

The rules, which the report repeats:

- Only models whose attack took count: where there is no backdoor, none can be removed. Clean models count
  where harm is measured.
- Methods that are given no data have one run a model, which stands beside the others at every budget (SPC).
- The pooled rows, whose ``spc`` is null, give every budget of a setting the same weight.
- A defense has a score in a setting if at least half of its cells there ended well. Else it has *no result*,
  which ranks behind every result.
- A value that nobody published (status ``missing``, in tables of others) is no failure. It counts as if it
  had not been planned.
"""

import pandas as pd

from detrojan.analysis.statistics.frames import SETTING
from detrojan.cells import NO_METHOD, NO_SAMPLES
from detrojan.storage.columns import MISSING

BUDGET = "budget"
MODEL = [*SETTING, "seed"]


def attacked(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the cells whose model's attack took, and whose outcome is known, at each budget."""
    took = frame["attack_took"].fillna(False).astype(bool)
    return at_each_budget(frame[took & (frame["status"] != MISSING)])


def clean(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the cells of clean models whose outcome is known, at each budget."""
    return at_each_budget(frame[(frame["attack"] == NO_METHOD) & (frame["status"] != MISSING)])


def at_each_budget(frame: pd.DataFrame) -> pd.DataFrame:
    """Return ``frame`` with the column ``budget``: the SPC; without one, each SPC of the setting by turns."""
    budgets = frame.loc[frame["spc"] > NO_SAMPLES, [*SETTING, "spc"]].drop_duplicates()
    without = frame[frame["spc"] == NO_SAMPLES].merge(
        budgets.rename(columns={"spc": BUDGET}), on=SETTING, how="left"
    )
    # A setting in which no method is given data is a block of its own.
    without = without.fillna({BUDGET: NO_SAMPLES}).astype({BUDGET: frame["spc"].dtype})
    given = frame[frame["spc"] > NO_SAMPLES]
    return pd.concat([given.assign(**{BUDGET: given["spc"]}), without], ignore_index=True)
