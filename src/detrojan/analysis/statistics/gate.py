"""Tells whether an attack took: a defense of a model without a working backdoor shows nothing."""

from typing import NamedTuple

from detrojan.settings import Gate

# Shares of test images differ by far more than this, and 0.8 - 0.7 exceeds 0.1 by far less.
SLACK = 1e-9


class Verdict(NamedTuple):
    """What the gate says of a model, by the names of the columns of ``models.parquet``.

    Attributes:
        acc_loss: ACC of the clean model minus this model's; None for a clean model, or without one.
        attack_took: None for a clean model.
        gate_reason: why the attack did not take; None if it did, or for a clean model.
    """

    acc_loss: float | None
    attack_took: bool | None
    gate_reason: str | None


def verdict(acc: float, asr: float | None, clean_acc: float | None, gate: Gate) -> Verdict:
    """Return whether a model's attack took, and if not, why.

    Args:
        acc: of the untouched model.
        asr: of the untouched model; None for a clean one.
        clean_acc: ACC of the clean model of the same data set, architecture and seed; None if there
            is none, and then the ASR alone decides.
        gate: what an attack has to reach.
    """
    if asr is None:
        return Verdict(None, None, None)
    acc_loss = None if clean_acc is None else clean_acc - acc
    reasons = []
    if asr < gate.min_asr - SLACK:
        reasons.append(f"ASR {_percent(asr, gate.min_asr)} % is below {100 * gate.min_asr:g} %")
    if acc_loss is not None and acc_loss > gate.max_acc_loss + SLACK:
        points = _percent(acc_loss, gate.max_acc_loss)
        reasons.append(f"ACC {points} points below the clean model's, more than {100 * gate.max_acc_loss:g}")
    return Verdict(acc_loss, not reasons, " and ".join(reasons) or None)


def describe(gate: Gate) -> str:
    """Return the sentence that says when an attack counts as having worked."""
    return (
        f"An attack took if the untouched model's ASR is at least {100 * gate.min_asr:g} % and its ACC at "
        f"most {100 * gate.max_acc_loss:g} points below that of the clean model of the same data set, "
        "architecture and seed."
    )


def _percent(value: float, limit: float) -> str:
    """Return ``value`` in percent with a decimal, or as many as it takes to tell it from ``limit``."""
    return next(
        text
        for decimals in range(1, 10)
        if abs(float(text := f"{100 * value:.{decimals}f}") - 100 * limit) > SLACK
    )
