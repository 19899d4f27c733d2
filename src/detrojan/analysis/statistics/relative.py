"""What a defense has changed: differences and ratios to the untouched model, and DER.

They follow from ACC, ASR and RA of a cell and of the untouched model of the same data set,
architecture, attack, ratio and seed (subscript 0). What is undefined is missing, never 0.

=========================  ==========================================  ===================================
``acc_drop``               ACC0 - ACC                                  accuracy lost
``asr_reduction``          ASR0 - ASR                                  attack success removed
``ra_recovery``            RA - RA0                                    triggered images got right again
``acc_drop_ratio``         acc_drop / ACC0                             share of the accuracy lost
``asr_reduction_ratio``    asr_reduction / ASR0                        share of the attack success removed
``ra_recovery_ratio``      ra_recovery / (ACC0 - RA0)                  share won back of what triggers cost
``der``                    (max(0, asr_reduction)                      0.5: nothing won; 1: all of the
                           - max(0, acc_drop) + 1) / 2                 backdoor gone at no cost
``net``                    asr_reduction - acc_drop                    0: nothing won; below it: harm
=========================  ==========================================  ===================================

DER, the defense effectiveness rating: Zhu, Wei, Shen, Fan, Wu, "Enhancing Fine-Tuning Based Backdoor
Defense with Sharpness-Aware Minimization", ICCV 2023, Sec. 4.1. Some code in the field adds the accuracy
term instead of subtracting it; this is the paper's formula. It clips both terms at 0, so where nothing
but noise has changed its mean is not 0.5: what tells harm from noise is ``net``, which clips nothing.
"""

import pandas as pd

from detrojan.cells import MODEL_AXES, NO_METHOD

MEASURED = ("acc", "asr", "ra")
RELATIVE = (
    "acc_drop",
    "asr_reduction",
    "ra_recovery",
    "acc_drop_ratio",
    "asr_reduction_ratio",
    "ra_recovery_ratio",
    "der",
    "net",
)
MEASURES = (*MEASURED, *RELATIVE)
# What defenses are ranked by, and compared in.
SCORES = ("acc", "asr", "ra", "der")
COMPARED = (*SCORES, "net")
LOWER_IS_BETTER = frozenset({"asr", "acc_drop", "acc_drop_ratio"})
SHARES = frozenset({*MEASURED, "der"})  # whose range is [0, 1]
UNCHANGED = 0.5  # DER of the untouched model


def relative(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the columns ``RELATIVE`` for the rows of ``cells``, float64, with their index.

    Args:
        cells: with the axes of a cell, ``acc``, ``asr`` and ``ra``; the untouched models are the rows
            with the defense ``none``. A row whose untouched model is missing gets missing values.

    Raises:
        ValueError: a model has two untouched rows.
    """
    axes = list(MODEL_AXES)
    measured = cells[list(MEASURED)].astype(float)
    is_untouched = cells["defense"] == NO_METHOD
    untouched = pd.concat([cells.loc[is_untouched, axes], measured[is_untouched]], axis="columns")
    twice = untouched[untouched.duplicated(axes)]
    if len(twice):
        first = ", ".join(f"{axis}={twice[axis].iloc[0]}" for axis in axes)
        raise ValueError(f"{first}: two rows of the untouched model (defense none), where one is allowed")
    before = cells[axes].merge(untouched, on=axes, how="left").set_index(cells.index)
    changes = pd.DataFrame(
        {
            "acc_drop": before["acc"] - measured["acc"],
            "asr_reduction": before["asr"] - measured["asr"],
            "ra_recovery": measured["ra"] - before["ra"],
        }
    )
    der = (changes["asr_reduction"].clip(lower=0) - changes["acc_drop"].clip(lower=0) + 1) / 2
    return changes.assign(
        acc_drop_ratio=_ratio(changes["acc_drop"], before["acc"]),
        asr_reduction_ratio=_ratio(changes["asr_reduction"], before["asr"]),
        ra_recovery_ratio=_ratio(changes["ra_recovery"], before["acc"] - before["ra"]),
        der=der,
        net=changes["asr_reduction"] - changes["acc_drop"],
    )


def _ratio(change: "pd.Series[float]", whole: "pd.Series[float]") -> "pd.Series[float]":
    """Return ``change / whole``, missing where there is nothing to lose or to win."""
    return change / whole.where(whole > 0)
