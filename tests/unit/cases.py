"""Studies of which each calls for another first sentence of the report."""

import functools

import numpy as np

from tests.unit import pages
from tests.unit import tables as made

NOISE = 0.02
GATE_FAILED = {"attack_took": False}


def cells(
    effects,
    datasets=("cifar10", "gtsrb", "tiny"),
    architectures=("resnet",),
    attacks=("badnets", "blended", "lf", "wanet"),
    seeds=(0, 1),
    spc=(10,),
    draws=2,
    before=0.97,
    noise=NOISE,
    by_dataset=None,
    skipped=frozenset(),
    **more,
):
    """Return cells of a study; ``effects`` are the ASR and the ACC lost after each defense.

    Args:
        by_dataset: by defense and data set, what is added to the ASR.
        skipped: pairs of defense and data set that nobody planned.
    """
    rng = np.random.default_rng(7)

    def near(value):
        return float(np.clip(np.round(value + noise * rng.standard_normal(), 3), 0, 1))

    rows = []
    axes = [(d, a, t, s) for d in datasets for a in architectures for t in attacks for s in seeds]
    for dataset, architecture, attack, seed in axes:
        model = {"dataset": dataset, "architecture": architecture, "attack": attack, "seed": seed} | more
        model |= {"num_test": 10_000, "num_triggered": 9_000}
        acc = near(0.9)
        rows.append(made.untouched(acc, near(before), 0.02, **model))
        for name, (asr, lost) in effects.items():
            if (name, dataset) in skipped:
                continue
            shift = (by_dataset or {}).get((name, dataset), 0.0)
            data_free = made.THREAT_MODELS.get(name) == "data_free"
            for budget in (0,) if data_free else spc:
                for draw in range(1 if data_free else draws):
                    place = model | {"spc": budget, "draw": draw}
                    rows += [made.cell(name, near(acc - lost), near(asr + shift), near(0.7), **place)]
    for dataset, architecture, seed in {(d, a, s) for d, a, _, s in axes}:
        model = {"dataset": dataset, "architecture": architecture, "attack": "none", "seed": seed}
        rows.append(made.untouched(0.91, **model))
    return pages.of_rows(*rows)


@functools.cache
def winner():
    """``ibau`` is better than all others, on every data set."""
    effects = {"anp": (0.4, 0.02), "clp": (0.7, 0.03), "fp": (0.5, 0.01), "ft": (0.6, 0.01)}
    return pages.tables_of(cells(effects | {"ibau": (0.05, 0.02), "nc": (0.3, 0.02)}, spc=(10, 100)))


@functools.cache
def winner_here():
    """``ibau`` is better than all others, by much on one data set and by little on the others."""
    effects = {"fp": (0.5, 0.01), "ft": (0.5, 0.01), "ibau": (0.3, 0.02)}
    return pages.tables_of(cells(effects, by_dataset={("ibau", "cifar10"): -0.25, ("ibau", "tiny"): 0.15}))


@functools.cache
def tie():
    """``ibau`` and ``nc`` are alike, and better than the others."""
    return pages.tables_of(
        cells({"fp": (0.5, 0.01), "ft": (0.6, 0.01), "ibau": (0.2, 0.02), "nc": (0.2, 0.02)}, noise=0.05)
    )


@functools.cache
def nothing_works():
    """No defense does anything."""
    return pages.tables_of(cells({"anp": (0.97, 0.0), "fp": (0.97, 0.0), "ft": (0.97, 0.0)}, noise=0.002))


@functools.cache
def too_little():
    """Two settings of one seed each."""
    few = {"datasets": ("digits",), "architectures": ("net",), "attacks": ("badnets", "sig"), "seeds": (0,)}
    return pages.tables_of(cells({"ft": (0.5, 0.01), "mm_bd": (0.04, 0.0)}, **few))


@functools.cache
def one_seed():
    """As ``winner``, but with one model a setting."""
    effects = {"anp": (0.4, 0.02), "clp": (0.7, 0.03), "fp": (0.5, 0.01), "ft": (0.6, 0.01)}
    return pages.tables_of(cells(effects | {"ibau": (0.05, 0.02), "nc": (0.3, 0.02)}, seeds=(0,), draws=1))


@functools.cache
def failed_gate():
    """No attack took: the best has an ASR of about 60 %."""
    few = {"datasets": ("digits",), "architectures": ("net",), "attacks": ("badnets", "wanet"), "seeds": (0,)}
    of_weak = cells({"fp": (0.2, 0.02), "ft": (0.3, 0.01)}, before=0.6, **few, **GATE_FAILED)
    models = pages.models_of(of_weak).to_pylist()
    for row in models:
        if row["attack"] != "none":
            row["gate_reason"] = f"ASR {100 * row['asr']:.1f} % is below 80 %"
    return pages.tables_of(of_weak, pages.models_table(models))


@functools.cache
def leaderboard():
    """Other people's table: one seed, one draw, and a defense that was run on one data set alone."""
    effects = {"anp": (0.3, 0.02), "clp": (0.7, 0.03), "fp": (0.5, 0.01), "ft": (0.45, 0.01)}
    effects |= {"ibau": (0.15, 0.02), "nc": (0.16, 0.02)}
    skipped = frozenset(("fp", dataset) for dataset in ("gtsrb", "tiny"))
    found = cells(effects, seeds=(0,), draws=1, noise=0.08, skipped=skipped)
    return pages.without_models(found)


ALL = (winner, winner_here, tie, nothing_works, too_little, one_seed, failed_gate, leaderboard)
