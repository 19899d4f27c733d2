# %% [markdown]
# # A study in a mixed model
#
# How much better than fine-tuning is a defense, and how sure are we? A mixed model answers with all
# settings at once: the defenses are *fixed effects*, the differences that we ask for; settings and models
# are *random effects*, a sample of those that there might be. `python docs/analysis_mixed_model.py
# [results]` prints all of this for a finished study. VS Code opens the file as a notebook, and so does
# Jupyter with Jupytext.

# %%
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import statsmodels.formula.api as smf
from scipy import stats

import detrojan

# A notebook runs in docs/, and the arguments it sees are Jupyter's.
RESULTS = Path("../results" if "ipykernel" in sys.modules else sys.argv[1] if sys.argv[1:] else "results")
BASELINE = "ft"
pd.set_option("display.width", 120, "display.max_columns", 20, "display.precision", 3)

# %% [markdown]
# ## The data
#
# One value for each model and defense, the mean over its draws, at the largest budget (a data-free defense
# has none and stands beside it). Draws tell how much a defense varies on one model; the model here is about
# other models, and for these the mean over draws has all that they tell.

# %%
SETTING = ["dataset", "architecture", "attack", "ratio"]

cells = detrojan.read_cells(RESULTS)
ok = cells[cells["attack_took"].fillna(False) & (cells["status"] == "ok") & (cells["defense"] != "none")]
ok = ok[ok["spc"].isin([0, ok["spc"].max()])]
data = ok.groupby([*SETTING, "seed", "defense"], observed=True)[["asr", "der", "num_triggered"]].mean()
data = data.reset_index()
data["setting"] = data[SETTING].astype(str).agg(" ".join, axis="columns")
data["defense"] = data["defense"].astype(str)  # the formula is to know those that are there, and no more
models_in_setting = data.groupby("setting")["seed"].nunique()
print(f"{len(data)} values of {data['defense'].nunique()} defenses in {len(models_in_setting)} settings")

# %% [markdown]
# ## The model
#
# The outcome of defense *d* on model *m* of setting *s* is
#
#     y = base + effect(d) + setting(s) + model(m in s) + [d in s] + rest
#
# where `effect` is what we ask for, as a difference from fine-tuning, and the last four are random, normal
# with mean 0. `[d in s]`: a defense that is good on the whole may be bad in a setting. Left out, each model
# would count as independent evidence on the effect, and its interval be too narrow. It can be told from the
# rest only where settings have several models (seeds). With one model each it is in the rest, as `model` is
# in `setting`: then settings are the evidence, and the model has no more parts than that.
#
# Mind what it leaves out: settings share data sets, architectures, attacks and samples, and here they are
# independent. So its intervals are too narrow for other data sets and attacks. `comparisons.parquet` has
# intervals for these, and others for the same settings with other seeds and samples (docs/statistics.md).

# %%
several_settings = len(models_in_setting) > 1
several_models = models_in_setting.max() > 1


def fit(outcome):
    """Return the fitted model of ``outcome``, and how many units its intervals stand on."""
    formula = f"{outcome} ~ C(defense, Treatment('{BASELINE}'))"
    if not (several_settings or several_models):
        print("One model only. Its differences say nothing of others, so they get no intervals.")
        return smf.ols(formula, data).fit(), 1
    # With one setting, its models are the sample, and the effects are those in that setting.
    groups = "setting" if several_settings else "seed"
    nested = {"model": "0 + C(seed)", "defense in setting": "0 + C(defense)"}
    parts = nested if several_settings and several_models else None
    said, singular = set(), True
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitted = smf.mixedlm(formula, data, groups=groups, re_formula="1", vc_formula=parts).fit()
        said = {str(warning.message).splitlines()[0] for warning in caught}
        singular = not (fitted.cov_re.iloc[0, 0] > 1e-9 and np.isfinite(fitted.bse_fe).all())
    except np.linalg.LinAlgError:
        pass
    if singular:
        print(f"The mixed model of {outcome} is singular. Instead, each {groups} gets a constant of its own.")
        fitted = smf.ols(f"{formula} + C({groups})", data).fit()
    else:
        for line in sorted(said):
            print(f"statsmodels warns of {outcome}: {line}")
    return fitted, data[groups].nunique()


def effects(fitted, num_units):
    """Return each defense's difference from fine-tuning, and its 95 % interval.

    statsmodels takes the normal distribution, which is too sure where there are few settings. So this
    is Student's, with as many degrees of freedom as there are settings, less one.
    """
    reach = stats.t.ppf(0.975, num_units - 1) * fitted.bse if num_units > 1 else np.nan
    table = pd.DataFrame(
        {"effect": fitted.params, "low": fitted.params - reach, "high": fitted.params + reach}
    )
    table = table[table.index.str.startswith("C(defense")]
    return table.rename(index=lambda name: name.split("T.")[-1].rstrip("]"))


def spreads(fitted):
    """Return the standard deviations of the random effects, by name; none without a mixed model."""
    if not hasattr(fitted, "cov_re"):
        return {}
    parts = dict(zip(fitted.model.exog_vc.names, fitted.vcomp, strict=True))
    whole = {"setting" if several_settings else "model": fitted.cov_re.iloc[0, 0]}
    return {name: math.sqrt(variance) for name, variance in (whole | parts | {"rest": fitted.scale}).items()}


# %% [markdown]
# ## DER
#
# DER (defense effectiveness rating) is 1 if all of the attack is gone at no cost in accuracy, and 0.5 if
# nothing was won. An effect of 0.05 is worth 10 percentage points of ASR. A spread of 0 is an estimate at
# its boundary: these data can't tell it from none, which with few settings doesn't mean that there is none.
# (statsmodels warns of the boundary also some way before it.)

# %%
of_der, num_units = fit("der")
der_effects, der_spreads = effects(of_der, num_units), spreads(of_der)
print(f"DER, difference from {BASELINE}\n{der_effects.to_string()}")
print(
    "Spreads:", ", ".join(f"{name} {spread:.3f}" for name, spread in der_spreads.items()) or "not known", "\n"
)

# %% [markdown]
# ## What it comes to
#
# If no value is missing and every setting has as many models, an effect is nothing else than the mean
# difference of the pairs. The mixed model adds the interval. Where cells failed it also weighs what is
# left, as if they were missing by chance. They seldom are: a defense fails where it has a hard time, so it
# looks better than it is.

# %%
wide = data.pivot(index=["setting", "seed"], columns="defense", values="der")
paired = wide.sub(wide[BASELINE], axis="index").drop(columns=BASELINE)
missing = int(wide.isna().sum().sum())
comparison = pd.DataFrame({"mixed model": der_effects["effect"], "mean of pairs": paired.mean()})
print(f"{missing} of {wide.size} values are missing\n{comparison.to_string()}\n")

# %% [markdown]
# ## Where it fails, and ASR in log odds
#
# DER and ASR end at 0 and 1, and many values lie there: an attack is gone, or untouched. Near a bound there
# is no room for normal noise, one more setting or an effect that is the same everywhere. The signs: fitted
# values beyond the bound, and less spread about those near it. A logit has no bounds: `log((k + 1/2) / (n -
# k + 1/2))` of *k* hits among *n* triggered images is finite also for none and all of them. An effect of
# -2.3 divides the odds of an attack by ten. But values at the bounds become a heap at the end of the scale,
# whose place depends on *n*, so look at ranks as well (`ranks.parquet`): they assume nothing of the kind.

# %%
hits = data["asr"] * data["num_triggered"]
data["asr_logit"] = np.log((hits + 0.5) / (data["num_triggered"] - hits + 0.5))
of_logit, num_units = fit("asr_logit")
logit_effects = effects(of_logit, num_units)
logit_effects["odds"] = np.exp(logit_effects["effect"])
print(f"ASR in log odds, difference from {BASELINE}; odds: relative to it\n{logit_effects.to_string()}\n")

beyond = int((~of_der.fittedvalues.between(0, 1)).sum())
print(f"Fitted DER beyond 0 or 1: {beyond} of {len(data)}")
for name, fitted in (("DER", of_der), ("log odds of ASR", of_logit)):
    third = pd.qcut(fitted.fittedvalues.rank(method="first"), 3, labels=["lowest", "middle", "highest"])
    spread = fitted.resid.groupby(third, observed=True).std()
    said = ", ".join(f"{part} third {value:.3f}" for part, value in spread.items())
    print(f"Spread of the rest by fitted {name}: {said}")
