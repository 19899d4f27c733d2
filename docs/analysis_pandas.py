# %% [markdown]
# # A study in pandas
#
# `python docs/analysis_pandas.py [results]` prints all of this for a finished study. VS Code opens the file
# as a notebook, and so does Jupyter with Jupytext.

# %%
import math
import sys
from pathlib import Path

import pandas as pd

import detrojan

# A notebook runs in docs/, and the arguments it sees are Jupyter's.
RESULTS = Path("../results" if "ipykernel" in sys.modules else sys.argv[1] if sys.argv[1:] else "results")
pd.set_option("display.width", 120, "display.max_columns", 20, "display.precision", 3)

# %% [markdown]
# ## What there is
#
# A row a cell: one model, one defense, one budget (SPC, clean samples per class), one draw of these
# samples. Keys are categories, in order, with the controls (`none`) first. `docs/tables.md` explains every
# column.

# %%
cells = detrojan.read_cells(RESULTS)
print(f"{len(cells):,} cells in {RESULTS}")
print(pd.crosstab(cells["defense"], cells["status"]).to_string(), "\n")

# %% [markdown]
# ## What counts
#
# Where no backdoor took, none can be removed: those models stay out, and so do clean ones. A cell without a
# repaired model has no measures. It is a failure of its defense, so say how many there are: a mean over the
# rest flatters.

# %%
attacked = cells[cells["attack_took"].fillna(False)]
ok = attacked[(attacked["status"] == "ok") & (attacked["defense"] != "none")]
print(f"{len(attacked):,} of models whose attack took; {len(ok):,} of these were defended and ended well\n")

# %% [markdown]
# ## Means that respect how cells are nested
#
# Draws are nested in models, models (seeds) in settings: (data set, architecture, attack, ratio). Ten draws
# of one model aren't ten models. So average over draws first, then over the models of a setting, then over
# settings. That gives every setting the same weight, however many draws of it ended well.

# %%
SETTING = ["dataset", "architecture", "attack", "ratio"]
MEASURES = ["acc", "asr", "ra", "der"]


def nested_means(rows, by, measures):
    """Return the means of ``measures`` for each group ``by``: over draws, then models, then settings."""
    for level in ([*SETTING, "seed"], SETTING, []):
        keys = list(dict.fromkeys([*by, *level]))
        rows = rows.groupby(keys, observed=True)[measures].mean().reset_index()
    return rows


means = nested_means(ok, ["defense", "spc"], MEASURES)
plain = ok.groupby(["defense", "spc"], observed=True)["asr"].mean()
means["asr_of_rows"] = plain.to_numpy()  # what a plain mean of all rows would say
print(means.to_string(index=False), "\n")

# %% [markdown]
# ## Defense × attack
#
# At one budget, here the largest. A data-free defense has no budget (`spc` 0) and stands beside all of
# them.

# %%
budget = ok["spc"].max()
at_budget = ok[ok["spc"].isin([0, budget])]
by_attack = nested_means(at_budget, ["defense", "attack"], ["asr"])
asr = by_attack.pivot(index="defense", columns="attack", values="asr")
print(f"ASR at {budget} samples per class; lower is better\n{asr.to_string()}\n")

# %% [markdown]
# ## The worst tenth
#
# A mean hides where a defense fails. So take its settings one by one, and of these the worst tenth, at
# least one. DER (defense effectiveness rating) weighs what was removed of the attack against what was lost
# in accuracy: 1 is best, and at 0.5 nothing was won. `consistency.parquet` has the same numbers for every
# budget.

# %%
der = nested_means(at_budget, ["defense", *SETTING], ["der"])


def worst_tenth(of_settings):
    """Return the mean of the smallest tenth, of at least one value."""
    return of_settings.nsmallest(math.ceil(len(of_settings) / 10)).mean()


worst = der.groupby("defense", observed=True)["der"].agg(["size", "mean", "std", worst_tenth])
worst = worst.sort_values("worst_tenth", ascending=False)
knows = cells[cells["threat_model"] == "known_trigger"]["defense"].unique()
print(f"DER over settings at {budget} samples per class\n{worst.to_string()}")
print(f"Given the trigger, which no defender has, and so an upper bound: {', '.join(knows) or 'none'}")
