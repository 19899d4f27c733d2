"""Trains the models that defenses are tried on: backdoored ones, and the clean ones beside them."""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch

from detrojan import models, provenance, training
from detrojan import rng as streams
from detrojan.cells import Model
from detrojan.cost import meter
from detrojan.data import ImageSet
from detrojan.errors import DivergedError
from detrojan.settings import Optimization
from detrojan.training import HISTORY, Checkpoint

__all__ = ["HISTORY", "Trained", "train"]

logger = logging.getLogger(__name__)


class Trained(NamedTuple):
    """What training leaves: the classifier, rows of ``HISTORY``, a card, and the checkpoint to remove."""

    model: models.Classifier
    history: list[dict[str, Any]]
    card: dict[str, Any]
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

    Raises:
        DivergedError: the loss is not finite; the message names the cell.
    """
    info = images.info
    build = models.Build(name.architecture, architecture, images.num_classes, info.mean, info.std)
    with streams.global_stream(streams.stream("init", *name)):
        model = models.build(build)
    model.place(device)
    decides = {
        "name": name,
        "build": dataclasses.asdict(build),
        "optimization": optimization,
        "augmentation": info.augmentation.model_dump(),
        "images": _digest(images),
        "code": code,
    }
    checkpoint = Checkpoint(folder / ".checkpoint.safetensors", json.dumps(decides, sort_keys=True))
    with meter(device) as cost:
        try:
            history = training.fit(
                model,
                images.to(device),
                Optimization(**optimization),
                rng=streams.stream("train", *name),
                augmentation=info.augmentation,
                checkpoint=checkpoint,
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
    return Trained(
        model.place(torch.device("cpu")), [dataclasses.asdict(epoch) for epoch in history], card, checkpoint
    )


def _digest(images: ImageSet) -> str:
    total = hashlib.sha256(images.images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
    total.update(images.labels.numpy().tobytes())
    return total.hexdigest()
