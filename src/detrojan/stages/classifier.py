"""Trains the models that defenses are tried on: backdoored ones, and the clean ones beside them."""

import copy
import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from detrojan import models, registry
from detrojan import rng as streams
from detrojan.cells import Model
from detrojan.errors import DivergedError
from detrojan.images import Batch, ImageSet
from detrojan.learning import training
from detrojan.learning.meter import meter
from detrojan.learning.on_the_fly import Control, Poisoner, drawn
from detrojan.learning.training import HISTORY, Checkpoint, Part, Prepare
from detrojan.models._parts import facts
from detrojan.settings import Augmentation, Optimization
from detrojan.storage import provenance

__all__ = ["HISTORY", "Trained", "train"]

logger = logging.getLogger(__name__)


class Trained(NamedTuple):
    """What training leaves.

    Attributes:
        model: the classifier, on the CPU.
        history: rows of ``HISTORY``.
        card: what is worth knowing of the run.
        trigger: of an attack that controlled it, as it is in the end; else empty.
        checkpoint: to remove once all this is written.
    """

    model: models.Classifier
    history: list[dict[str, Any]]
    card: dict[str, Any]
    trigger: dict[str, Tensor]
    checkpoint: Checkpoint


def train(
    images: ImageSet,
    name: Model,
    *,
    architecture: dict[str, Any],
    optimization: dict[str, Any],
    code: str,
    folder: Path,
    device: torch.device,
    control: Control | None = None,
) -> Trained:
    """Train one classifier from scratch on ``images``, poisoned or not; resume it if it was killed.

    Args:
        images: the training set, poisoned rows in place, on the CPU.
        name: keys the random streams.
        architecture: settings of the architecture.
        optimization: settings of the training loop.
        code: digest of the code that runs; a checkpoint that another code left is not resumed.
        folder: where the checkpoint lies until training is done.
        device: where to train.
        control: an attack that poisons the batches; ``images`` are clean then.

    Raises:
        DivergedError: the loss is not finite; the message names the cell.
        ValueError: a network of others does not take the images, or puts out no logits for them.
    """
    info = images.info
    mean, std = (architecture.get(key) or getattr(info, key) for key in ("mean", "std"))
    build = models.Build(name.architecture, architecture, images.num_classes, tuple(mean), tuple(std))
    with streams.global_stream(streams.stream("init", *name)):
        model = models.build(build)
        if registry.NETWORK in architecture:
            # What its library makes of it is unknown until it runs: in seconds, not after an epoch.
            facts.check(copy.deepcopy(model.network), info.height, images.num_classes)
    model.place(device)
    decides = {
        "name": name,
        "build": dataclasses.asdict(build),
        "optimization": optimization,
        "augmentation": info.augmentation.model_dump(),
        "attack": control.decides if control else None,
        "images": _digest(images),
        "code": code,
    }
    checkpoint = Checkpoint(folder / ".checkpoint.safetensors", json.dumps(decides, sort_keys=True))
    on_device = images.to(device)
    poisoner = control.begin(on_device, streams.stream("poisoner", *name)) if control else None
    batches: BatchOptions = {"augmentation": info.augmentation}
    if poisoner:
        batches = poisoned_batches(poisoner, name.ratio)
    with meter(device) as cost:
        try:
            history = training.fit(
                model,
                on_device,
                Optimization(**optimization),
                rng=streams.stream("train", *name),
                checkpoint=checkpoint,
                **batches,
            )
        except DivergedError as error:
            raise DivergedError(f"training of {name} diverged: {error}") from error
    seconds = sum(epoch.seconds for epoch in history)  # of all epochs, those before a kill included
    card = {
        "num_train": len(images),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "architecture_settings": architecture,
        "optimization": optimization,
        "epochs": len(history),
        "train_loss": history[-1].loss,
        "train_accuracy": history[-1].accuracy,
        "seconds": seconds,
        "images_per_second": len(history) * len(images) / seconds,
        "peak_memory_bytes": cost.peak_memory_bytes,
        "device": cost.device,
        **provenance.origin(code),
    }
    if poisoner:
        poisoned = sum(epoch.num_poisoned for epoch in history)
        card["num_poisoned"] = round(poisoned / len(history))
        card["effective_ratio"] = poisoned / (len(history) * len(images))
    return Trained(
        model.place(torch.device("cpu")),
        [dataclasses.asdict(epoch) for epoch in history],
        card,
        poisoner.trigger() if poisoner else {},
        checkpoint,
    )


class BatchOptions(TypedDict, total=False):
    """Options of :func:`detrojan.learning.training.fit` that say how batches come about."""

    augmentation: Augmentation
    prepare: Prepare
    beside: Mapping[str, Part]


def poisoned_batches(poisoner: Poisoner, ratio: float) -> BatchOptions:
    """Return what has a share ``ratio`` of each batch poisoned, in expectation."""

    def poison(batch: Batch, rng: torch.Generator) -> Batch:
        return poisoner.poison(batch, drawn(ratio * len(batch.rows), rng), rng=rng)

    return {"augmentation": poisoner.augmentation, "prepare": poison, "beside": poisoner.parts}


def _digest(images: ImageSet) -> str:
    total = hashlib.sha256(images.images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
    total.update(images.labels.numpy().tobytes())
    return total.hexdigest()
