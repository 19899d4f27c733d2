"""How far a defense can be relied on: over settings, in the worst of them, and where it does harm.

Means and intervals are of cells that ended well. What has no result is counted in ``num_without_result``
here, and with its reasons in :mod:`.outcomes`; ``der_all`` counts it as a model that was left untouched.
"""

import math
from typing import Any

import numpy as np
import pyarrow as pa

from detrojan.analysis.statistics import arrays, harm, scores
from detrojan.analysis.statistics.arrays import DER_ALL, Runs, Study
from detrojan.analysis.statistics.crossed import FACTORS, Array, Crossed, Design, mean_of
from detrojan.analysis.statistics.frames import SETTING, frame_of, table_of_rows
from detrojan.analysis.statistics.relative import COMPARED, LOWER_IS_BETTER, SHARES
from detrojan.analysis.tables.base import Table, columns
from detrojan.study.schema import BASELINES

Row = dict[str, Any]
SPREADS = (*SETTING, "spc")
MORE = 0.005  # DER, half a point: by less nobody beats anybody
ENDS = ("grid_low", "grid_high", "beyond_low", "beyond_high")
OF_MEASURES = {
    "acc": "mean ACC over settings, and its 95 % intervals: `grid` on these settings with other seeds and "
    "samples, `beyond` with other data sets, architectures and attacks ([both](statistics.md#intervals))",
    "asr": "the same of ASR",
    "ra": "the same of RA",
    "der": "the same of DER",
    DER_ALL: "the same of DER where a cell that gave no repaired model counts as an untouched model, 0.5",
    "net": "the same of the attack success removed minus the accuracy lost; below 0 is harm",
    "acc_drop": "the same of the accuracy lost",
    "asr_reduction": "the same of the attack success removed",
    "ra_recovery": "the same of the RA won back",
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
            meaning="settings whose attack took, and in which a model has a result at every planned budget "
            "of the row: those that the means are over",
        ),
        columns(
            *("num_datasets", "num_architectures", "num_attacks"),
            kind=pa.int32(),
            meaning="of how many data sets, architectures and attacks these are",
        ),
        columns(
            "num_without_result",
            kind=pa.int32(),
            meaning="settings whose attack took, and in which fewer than half of its planned cells ended "
            "well, at some budget of the row",
        ),
        columns(
            "share_failed",
            kind=pa.float64(),
            meaning="share of its planned cells that gave no repaired model",
        ),
        columns("num_models", kind=pa.int32(), meaning="fewest models with a result in one of its settings"),
        columns("single_seed", kind=pa.bool_(), meaning="whether that is one"),
        *(
            columns(
                *(f"{measure}_{part}" for part in ("mean", *ENDS)),
                kind=pa.float64(),
                meaning=meaning,
                null=True,
            )
            for measure, meaning in OF_MEASURES.items()
        ),
        columns(
            *(f"{measure}_worst_tenth" for measure in COMPARED),
            kind=pa.float64(),
            meaning="mean of the worst tenth of settings; of ASR the worst are the highest",
            null=True,
        ),
        columns(
            *("acc_before_mean", "asr_before_mean", "ra_before_mean"),
            kind=pa.float64(),
            meaning="ACC, ASR and RA of the untouched models of these same settings",
            null=True,
        ),
        columns(
            "grid_basis",
            kind=pa.string(),
            meaning="what the `grid` intervals rest on (of DER): `seeds_draws`, `seeds` or `draws`; "
            "`bound_draws` or `bound` where a setting has one seed: an upper bound; null: nothing",
            null=True,
            words=True,
        ),
        columns(
            "beyond_over",
            kind=pa.string(),
            meaning="what varies in the `beyond` intervals (of DER): `dataset`, `architecture`, `attack`; "
            "null: too few levels to speak of others",
            null=True,
            words=True,
        ),
        columns("beyond_df", kind=pa.float64(), meaning="its degrees of freedom", null=True),
        columns(
            *(f"beyond_share_{factor}" for factor in FACTORS),
            kind=pa.float64(),
            meaning="the share of each in its variance: what a study would add next",
            null=True,
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
            meaning="share of settings in which its DER is above both fine-tuning's and fine-pruning's by "
            "more than 0.005",
            null=True,
        ),
        columns(
            "num_beats_settings",
            kind=pa.int32(),
            meaning="settings in which all three have a result: what it is a share of",
        ),
        columns(
            *(f"share_{verdict}" for verdict in harm.VERDICTS),
            kind=pa.float64(),
            meaning="share of settings in which `net` is below 0, about 0, or above it, by more than a point "
            "and than [noise](statistics.md#harm); together 1",
            null=True,
        ),
        columns(
            "harm_single_run",
            kind=pa.bool_(),
            meaning="whether that rests on one run in some setting, which may be noise",
        ),
        columns(
            "num_clean_settings", kind=pa.int32(), meaning="clean models' settings in which it has a result"
        ),
        columns(
            *(f"clean_acc_drop_{part}" for part in ("mean", *ENDS, "worst_tenth")),
            kind=pa.float64(),
            meaning="accuracy that it costs clean models, with both intervals",
            null=True,
        ),
        columns(
            "share_clean_harmed",
            kind=pa.float64(),
            meaning="share of these settings in which that is more than a point and than noise",
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
    attacked, clean = (arrays.of_cells(rows) for rows in (scores.attacked(frame), scores.clean(frame)))
    rows = [
        _row(attacked, clean, defense, budget)
        for budget in (None, *attacked.budgets)
        for defense, runs in attacked.runs.items()
        if runs.planned[:, :, attacked.at(budget)].any()
    ]
    return table_of_rows(rows, TABLE.schema)


def _row(attacked: Study, clean: Study, defense: str, budget: int | None) -> Row:
    runs, at = attacked.runs[defense], attacked.at(budget)
    found = {measure: attacked.crossed(defense, measure, budget) for measure in OF_MEASURES}
    der = found["der"]
    planned, ended = runs.planned[:, :, at], runs.ok[:, :, at]
    row: Row = {"spc": budget, "defense": defense, "threat_model": runs.threat_model}
    row |= {
        # Others than ACC may not have been published.
        "num_settings": found["acc"].num_settings,
        "num_without_result": int(runs.lacking(at).sum()),
        "share_failed": float(1 - ended.sum() / planned.sum()),
        "num_models": found["acc"].fewest_models,
        "single_seed": found["acc"].fewest_models == 1,
        "seconds": _mean(runs.columns["seconds"][:, :, at]),
    }
    levels = zip(("num_datasets", "num_architectures", "num_attacks"), found["acc"].design, strict=True)
    row |= {name: len(np.unique(codes)) for name, codes in levels}
    for measure, crossed in found.items():
        row |= of_mean(measure, crossed, clip=measure in SHARES or measure == DER_ALL)
    for measure in COMPARED:
        worst = worst_tenth(found[measure].by_setting, lower_is_better=measure in LOWER_IS_BETTER)
        row[f"{measure}_worst_tenth"] = worst
    row["acc_before_mean"] = found["acc"].mean + found["acc_drop"].mean
    row["asr_before_mean"] = found["asr"].mean + found["asr_reduction"].mean
    row["ra_before_mean"] = found["ra"].mean - found["ra_recovery"].mean
    row |= {"grid_basis": der.grid.basis or None, "beyond_over": der.beyond.basis or None}
    row |= {"beyond_df": der.beyond.df} | _beyond_shares(der)
    row |= _spreads(attacked, defense, der, budget) | _wins(attacked, defense, der, budget)
    return row | _harm(runs, at, found["net"]) | _harm_to_clean(clean, defense, budget)


def of_mean(name: str, crossed: Crossed, *, clip: bool) -> Row:
    """Return a mean and the ends of both its intervals, by their columns; clipped to [0, 1] if asked to."""
    row = {f"{name}_mean": crossed.mean}
    for scope, spread in (("grid", crossed.grid), ("beyond", crossed.beyond)):
        ends = np.array(spread.interval(crossed.mean))
        low, high = np.clip(ends, 0, 1) if clip else ends
        row |= {f"{name}_{scope}_low": float(low), f"{name}_{scope}_high": float(high)}
    return row


def worst_tenth(values: Array, *, lower_is_better: bool) -> float:
    """Return the mean of the worst tenth of ``values``, at least of one; NaN if there is none."""
    known = np.sort(values[~np.isnan(values)])
    number = math.ceil(len(known) / 10)
    return _mean(known[len(known) - number :] if lower_is_better else known[:number])


def _mean(values: Array) -> float:
    return float(mean_of(values.reshape(-1), 0))


def _beyond_shares(der: Crossed) -> Row:
    """Return how much of the variance beyond the grid each factor makes."""
    variances = {factor: part.variance for factor, part in der.by_factor.items()}
    whole = sum(variances.values()) if der.beyond.parts else 0.0
    return {
        f"beyond_share_{factor}": variances.get(factor, 0.0) / whole if whole else math.nan
        for factor in FACTORS
    }


def _spreads(attacked: Study, defense: str, der: Crossed, budget: int | None) -> Row:
    """Return the standard deviations of DER's means at the values of each axis; NaN with one value."""
    has = ~np.isnan(der.means)
    means: dict[str, list[float]] = {axis: [] for axis in SPREADS}
    for axis in SETTING:
        codes = attacked.codes(axis)[has]
        means[axis] = [_mean(der.by_setting[codes == level]) for level in np.unique(codes)]
    if budget is None:
        of_budgets = (attacked.crossed(defense, "der", each) for each in attacked.budgets)
        means["spc"] = [each.mean for each in of_budgets if each.num_settings]
    return {
        f"der_spread_{axis}": float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        for axis, values in means.items()
    }


def _wins(attacked: Study, defense: str, der: Crossed, budget: int | None) -> Row:
    """Return in which share of settings a defense beats both baselines, and of how many."""
    share, number = math.nan, 0
    # Of the baselines themselves, nothing is asked.
    if defense not in BASELINES and attacked.runs.keys() >= set(BASELINES):
        best = np.maximum(*(attacked.crossed(name, "der", budget).means for name in BASELINES))
        # Where one of the two has no result, there is nothing to beat.
        gaps = (der.means - best)[~np.isnan(der.means - best)]
        share, number = _mean((np.round(gaps - MORE, 9) > 0).astype(float)), len(gaps)
    return {"share_beats_baselines": share, "num_beats_settings": number}


def _harm(runs: Runs, at: slice, net: Crossed) -> Row:
    """Return in which shares of settings a defense repairs, does harm, or neither."""
    cells = _cells(runs, at)
    noise = harm.noise(
        cells["net"],
        (cells["acc"], -cells["acc_drop"], cells["num_test"]),
        (cells["asr"], -cells["asr_reduction"], cells["num_triggered"]),
    )
    found = harm.verdicts(net.means, noise)
    row: Row = {f"share_{verdict}": harm.share(found, verdict) for verdict in harm.VERDICTS}
    counts = (~np.isnan(cells["net"])).sum(1)
    return row | {"harm_single_run": bool((counts[~np.isnan(net.means)] == 1).any())}


def _harm_to_clean(clean: Study, defense: str, budget: int | None) -> Row:
    """Return what a defense costs clean models."""
    names = [f"clean_acc_drop_{part}" for part in ("mean", *ENDS, "worst_tenth")]
    row: Row = dict.fromkeys((*names, "share_clean_harmed"), math.nan) | {"num_clean_settings": 0}
    if defense not in clean.runs:
        return row
    runs, at = clean.runs[defense], clean.at(budget)
    lost = clean.crossed(defense, "acc_drop", budget)
    # Clean models of several architectures have no trigger in common: each has strata of its own.
    of_networks = Design(clean.design.dataset, np.zeros_like(clean.design.attack), clean.design.architecture)
    own = Crossed(of_networks, runs.values("acc_drop")[:, :, at], runs.budgets_of("acc_drop")[:, :, at])
    row |= of_mean("clean_acc_drop", lost, clip=False)
    low, high = own.grid.interval(own.mean)
    row |= {"clean_acc_drop_grid_low": low, "clean_acc_drop_grid_high": high}
    row["clean_acc_drop_worst_tenth"] = worst_tenth(lost.by_setting, lower_is_better=True)
    cells = _cells(runs, at)
    noise = harm.noise(-cells["acc_drop"], (cells["acc"], -cells["acc_drop"], cells["num_test"]))
    verdicts = harm.verdicts(-lost.means, noise)
    return row | {
        "num_clean_settings": lost.num_settings,
        "share_clean_harmed": harm.share(verdicts, harm.HARMFUL),
    }


def _cells(runs: Runs, at: slice) -> dict[str, Array]:
    """Return what tells how a setting's runs vary: (settings, cells), each run once."""
    single = runs.single_of(at)
    names = ("net", "acc", "asr", "acc_drop", "asr_reduction", "num_test", "num_triggered")
    return {
        name: np.where(single, runs.columns[name][:, :, at], np.nan).reshape(
            len(single), math.prod(single.shape[1:])
        )
        for name in names
    }
