"""Measures saved weights on the test images, clean and triggered, in a process of its own."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from detrojan.attacks.base import Attack, Trigger
from detrojan.cells import Shard
from detrojan.images import ImageSet
from detrojan.learning import inference, metrics
from detrojan.learning.meter import Cost, device_name
from detrojan.stages.poisoning import originals
from detrojan.stages.rows import run_row
from detrojan.storage import artifacts
from detrojan.storage.columns import OK, PREDICTIONS


def predict(model: nn.Module, images: ImageSet) -> Tensor:
    """Return the predicted class of each image, int64 (N,), of a model in eval mode."""
    return inference.logits(model, images).argmax(1)


def evaluate(
    runs: list[dict[str, Any]],
    weights: Callable[[int], Path],
    test: ImageSet,
    triggered: ImageSet | None,
    device: torch.device,
) -> tuple[list[dict[str, Any]], pa.Table]:
    """Return rows of ``METRICS`` and a table of ``PREDICTIONS``.

    Args:
        runs: rows of ``RUNS``; only those with status ``ok`` have weights.
        weights: the file of a draw's weights.
        test: the clean test set.
        triggered: the triggered test set; None for a clean model, whose ASR and RA are undefined.
        device: where to predict.
    """
    rows, tables = [], []
    test = test.to(device)
    triggered = triggered.to(device) if triggered is not None else None
    for run in runs:
        row = run | {
            "num_test": len(test),
            "num_triggered": 0 if triggered is None else len(triggered),
            "acc": None,
            "asr": None,
            "ra": None,
        }
        if run["status"] == OK:
            model = artifacts.read_model(weights(run["draw"])).place(device)
            clean = predict(model, test)
            row["acc"] = metrics.accuracy(clean, test.labels)
            tables.append(_predictions(run["draw"], test, clean, triggered=False))
            if triggered is not None:
                stamped = predict(model, triggered)
                row["asr"] = metrics.accuracy(stamped, triggered.labels)
                row["ra"] = metrics.accuracy(stamped, triggered.true_labels)
                tables.append(_predictions(run["draw"], triggered, stamped, triggered=True))
        rows.append(row)
    return rows, pa.concat_tables([PREDICTIONS.empty_table(), *tables])


def check_trigger(
    model: nn.Module, clean: nn.Module, attack: Attack, trigger: Trigger, triggered: ImageSet, test: ImageSet
) -> dict[str, float | int | None]:
    """Return what a trigger does where it should do nothing, shares in [0, 1].

    ``clean_asr`` and ``clean_ra`` are the clean model's on the triggered images: what of the ASR is no
    backdoor's. ``decoy_asr`` is the attacked model's on decoys, see :meth:`Attack.decoy`; None where there
    are none.

    Args:
        model: the attacked one, in eval mode.
        clean: of the same data set, architecture and seed, in eval mode, on the same device.
        attack: the attack.
        trigger: what it stamps.
        triggered: the triggered test set.
        test: the clean one, sorted by index.
    """
    answers = predict(clean, triggered)
    decoys = attack.decoy(originals(triggered, test).images, trigger)
    fooled = None
    if decoys is not None:
        shown = dataclasses.replace(triggered, images=decoys)
        fooled = metrics.accuracy(predict(model, shown), triggered.labels)
    return {
        "num_triggered": len(triggered),
        "clean_asr": metrics.accuracy(answers, triggered.labels),
        "clean_ra": metrics.accuracy(answers, triggered.true_labels),
        "decoy_asr": fooled,
    }


def _predictions(draw: int, images: ImageSet, predicted: Tensor, *, triggered: bool) -> pa.Table:
    return pa.table(
        {
            "draw": np.full(len(images), draw, np.int32),
            "triggered": np.full(len(images), triggered),
            "index": images.index.cpu().numpy().astype(np.int32),
            "predicted": predicted.cpu().numpy().astype(np.int16),
        },
        schema=PREDICTIONS,
    )


def untouched_run(shard: Shard, device: torch.device, code: str) -> list[dict[str, Any]]:
    """Return the row of ``RUNS`` of a model to which nothing was done, at no cost."""
    cost = Cost(device=device_name(device))
    return [run_row(shard, 0, {"status": OK, "reason": None}, {}, {}, cost, code)]
