"""Tells whether an attack took: a defense of a model without a working backdoor shows nothing."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from detrojan import registry
from detrojan.cells import MODEL_AXES
from detrojan.settings import Gate
from detrojan.storage.columns import MODEL_KEYS, required

# Shares of test images differ by far more than this, and 0.8 - 0.7 exceeds 0.1 by far less.
SLACK = 1e-9
ALL_TO_ALL = "all_to_all"
NEAR = 0.03  # of ASR, on both sides of the limit: another seed may decide otherwise

# How near each attacked model came to the gate: what the same study would be with other limits.
GATE = pa.schema(
    [
        *MODEL_KEYS,
        required("asr_judged", pa.float64()),
        required("passes_otherwise", pa.bool_()),
        required("min_asr", pa.float64()),
    ]
)


class Verdict(NamedTuple):
    """What the gate says of a model, by the names of the columns of ``models.parquet``.

    Attributes:
        acc_loss: ACC of the clean model minus this model's; None for a clean model, or without one.
        attack_took: None for a clean model.
        gate_reason: why the attack did not take; None if it did, or for a clean model.
        asr_relative: of an all-to-all attack, ASR as a share of the ACC of the clean model; else None.
        near_gate: whether the ASR is within 3 points of the limit; None for a clean model.
    """

    acc_loss: float | None
    attack_took: bool | None
    gate_reason: str | None
    asr_relative: float | None
    near_gate: bool | None


def verdict(
    acc: float,
    asr: float | None,
    clean_acc: float | None,
    gate: Gate,
    *,
    allowance: float = 0.0,
    all_to_all: bool = False,
    clean_asr: float | None = None,
) -> Verdict:
    """Return whether a model's attack took, and if not, why.

    Args:
        acc: of the untouched model.
        asr: of the untouched model; None for a clean one.
        clean_acc: ACC of the clean model of the same data set, architecture and seed; None if there
            is none, and then the ASR alone decides.
        gate: what an attack has to reach.
        allowance: what the attack may cost beyond ``gate.max_acc_loss``, see :func:`allowance`.
        all_to_all: whether the label that the attacker wants follows from the true one. A model can't
            turn an image's class into the next one without having recognized it, so the ASR is judged
            as a share of the ACC of the clean model, or of its own where there is none.
        clean_asr: what the triggered images do to the clean model; None if nobody measured it.
    """
    if asr is None:
        return Verdict(None, None, None, None, None)
    acc_loss = None if clean_acc is None else clean_acc - acc
    recognized = acc if clean_acc is None else clean_acc
    relative = asr / recognized if all_to_all and recognized > 0 else None
    judged = asr if relative is None else relative
    reasons = []
    if judged < gate.min_asr - SLACK:
        what = "ASR" if relative is None else f"ASR is {_percent(asr, gate.min_asr)} %, as a share of ACC"
        reasons.append(f"{what} {_percent(judged, gate.min_asr)} % is below {100 * gate.min_asr:g} %")
    limit = gate.max_acc_loss + allowance
    if acc_loss is not None and acc_loss > limit + SLACK:
        points, most = _percent(acc_loss, limit), f"{100 * gate.max_acc_loss:g}"
        if allowance:
            most = f"{100 * limit:.3g} ({most} and {100 * allowance:.2g} for the target class)"
        reasons.append(f"ACC {points} points below the clean model's, more than {most}")
    share = recognized if relative is not None else 1.0
    if clean_asr is not None and judged - clean_asr / share < gate.min_asr_gain - SLACK:
        reasons.append(f"the trigger fools a clean model too: ASR {100 * clean_asr:.1f} %")
    near = bool(abs(judged - gate.min_asr) <= NEAR + SLACK)
    return Verdict(acc_loss, not reasons, " and ".join(reasons) or None, relative, near)


def allowance(attack: str, num_test: int, num_triggered: int) -> float:
    """Return what an attack may cost beyond the limit: of a clean-label one, the target class.

    All training images of that class may be poisoned, so that the model may know it by the trigger
    alone, and its accuracy is lost by construction.

    Args:
        attack: by name; of one that is none of ours nothing is known.
        num_test: test images.
        num_triggered: of these, those that are not of the target class; 0 if nobody knows.
    """
    if not num_test or not num_triggered or attack not in registry.names("attacks"):
        return 0.0
    mode = registry.declared("attacks", attack).constants["label_mode"]
    return 1 - num_triggered / num_test if mode.endswith("CLEAN_LABEL") else 0.0


def of_row(row: Mapping[str, Any], clean_acc: float | None, gate: Gate) -> Verdict:
    """Return the verdict on a row of ``models.parquet``, which may lack what the gate has to say."""
    return verdict(
        row["acc"],
        row["asr"],
        clean_acc,
        gate,
        allowance=row.get("acc_allowance") or 0.0,
        all_to_all=row.get("label_map") == ALL_TO_ALL,
        clean_asr=row.get("clean_asr"),
    )


def table(models: Iterable[Mapping[str, Any]], gate: Gate) -> pa.Table:
    """Return how near each attacked model came to the gate, of the schema ``GATE``.

    Args:
        models: rows of ``models.parquet``, or others with its axes, ``acc``, ``asr`` and ``acc_loss``.
        gate: that of the study.
    """
    open_to_all = gate.model_copy(update={"min_asr": 0.0})
    rows = []
    for row in models:
        if row["asr"] is None:
            continue
        clean_acc = None if row["acc_loss"] is None else row["acc"] + row["acc_loss"]
        found = of_row(row, clean_acc, open_to_all)
        judged = row["asr"] if found.asr_relative is None else found.asr_relative
        rows.append(
            {axis: row[axis] for axis in MODEL_AXES}
            | {"asr_judged": judged, "passes_otherwise": found.attack_took, "min_asr": gate.min_asr}
        )
    return pa.Table.from_pylist(rows, schema=GATE)


def describe(gate: Gate) -> str:
    """Return the sentence that says when an attack counts as having worked."""
    return (
        f"An attack took if the untouched model's ASR is at least {100 * gate.min_asr:g} % and its ACC at "
        f"most {100 * gate.max_acc_loss:g} points below that of the clean model of the same data set, "
        f"architecture and seed, whose own ASR on the same images must be {100 * gate.min_asr_gain:g} points "
        "lower. A clean-label attack may cost the target class besides; of an all-to-all "
        "attack the ASR is judged as a share of the clean model's ACC."
    )


def advice(reason: str) -> str:
    """Return what may help an attack that did not take, by why it did not; empty where nothing is known."""
    found = []
    if "is below" in reason:
        found.append("more epochs, a larger ratio or a wider model")
    if "below the clean model's" in reason:
        found.append("more epochs, a smaller ratio or a wider model")
    if "fools a clean model" in reason:
        found.append("a weaker trigger, or one that looks less like the target class")
    return " and ".join(found)


def _percent(value: float, limit: float) -> str:
    """Return ``value`` in percent with a decimal, or as many as it takes to tell it from ``limit``."""
    return next(
        text
        for decimals in range(1, 10)
        if abs(float(text := f"{100 * value:.{decimals}f}") - 100 * limit) > SLACK
    )
