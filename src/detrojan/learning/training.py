"""The one training loop: `train` fits backdoored models with it, defenses fine-tune with it.

:func:`descend` steps any number of networks, each with its optimizer; :func:`fit` is its common case,
one classifier.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan import rng as streams
from detrojan.errors import DivergedError
from detrojan.images import Batch, ImageSet, Loader
from detrojan.learning.meter import count_step
from detrojan.settings import NO_AUGMENTATION, Augmentation, Optimization
from detrojan.storage import artifacts

logger = logging.getLogger(__name__)

# Of names of parameters that are no weights of a layer, in torchvision's and timm's transformers.
UNDECAYED = ("pos_embed", "class_token", "cls_token", "dist_token", "reg_token", "relative_position_bias")

HISTORY = pa.schema(
    [
        pa.field("epoch", pa.int32(), nullable=False),
        pa.field("lr", pa.float64(), nullable=False),
        pa.field("loss", pa.float64(), nullable=False),
        pa.field("accuracy", pa.float64(), nullable=False),
        pa.field("num_poisoned", pa.int64(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
    ]
)


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One row of a training history.

    Attributes:
        epoch: counted from 1.
        lr: learning rate of its steps.
        loss: mean over its images, each seen in the step that used it.
        accuracy: share of its augmented images given the label they were trained towards.
        num_poisoned: images that an attack triggered on the fly; 0 where they were poisoned before.
        seconds: wall time.
    """

    epoch: int
    lr: float
    loss: float
    accuracy: float
    num_poisoned: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Part:
    """A network that the loop trains, with an optimizer and a schedule of its own.

    Attributes:
        network: in training mode while it is trained, in eval mode afterwards.
        optimizer: of its parameters.
        lr_at: the learning rate of each epoch, the first being 0.
        clip: largest L2 norm of a step's gradient; None for any.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    lr_at: Callable[[int], float]
    clip: float | None = None


# Changes a batch before the step; may draw from the generator, one an epoch.
Prepare = Callable[[Batch, torch.Generator], Batch]
# Returns a scalar to descend, and over how many of the batch's images it is right, a scalar tensor.
Objective = Callable[[Batch], tuple[Tensor, Tensor]]
Loss = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]


def cross_entropy(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of a batch and its logits."""
    logits = model(batch.images)
    return F.cross_entropy(logits, batch.labels), logits


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where a training job leaves its state after each epoch, so that a killed one resumes.

    Attributes:
        path: of a safetensors file, removed when training is done.
        fingerprint: of all that decides the result; a checkpoint with another one is ignored.
    """

    path: Path
    fingerprint: str

    def save(self, parts: Mapping[str, Part], history: list[Epoch]) -> None:
        """Write the state of ``parts`` after the last epoch of ``history``."""
        tensors: dict[str, Tensor] = {}
        for name, part in parts.items():
            tensors |= {f"{name}.network.{key}": value for key, value in part.network.state_dict().items()}
            for number, state in part.optimizer.state_dict()["state"].items():
                values = {f"{name}.optimizer.{number}.{key}": value for key, value in state.items()}
                tensors |= {key: value for key, value in values.items() if isinstance(value, Tensor)}
        rows = [dataclasses.asdict(epoch) for epoch in history]
        artifacts.write_tensors(tensors, self.path, fingerprint=self.fingerprint, history=rows)

    def load(self, parts: Mapping[str, Part]) -> list[Epoch]:
        """Restore ``parts``; return the epochs done, none if there is no checkpoint."""
        if not self.path.exists():
            return []
        tensors, metadata = artifacts.read_tensors(self.path)
        if metadata.get("fingerprint") != self.fingerprint:
            logger.info("checkpoint %s belongs to other settings, code or data: starting anew", self.path)
            return []
        for name, part in parts.items():
            part.network.load_state_dict(_with_prefix(tensors, f"{name}.network."))
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in _with_prefix(tensors, f"{name}.optimizer.").items():
                number, what = key.split(".", 1)
                state.setdefault(int(number), {})[what] = value
            groups = part.optimizer.state_dict()["param_groups"]
            part.optimizer.load_state_dict({"state": state, "param_groups": groups})
        history = [Epoch(**row) for row in metadata["history"]]
        logger.info("resuming after epoch %d", len(history))
        return history

    def remove(self) -> None:
        """Delete the file, once what training made is in place."""
        self.path.unlink(missing_ok=True)


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def fit(
    model: nn.Module,
    images: ImageSet,
    optimization: Optimization,
    *,
    rng: torch.Generator,
    augmentation: Augmentation = NO_AUGMENTATION,
    loss: Loss = cross_entropy,
    prepare: Prepare | None = None,
    beside: Mapping[str, Part] | None = None,
    after_step: Callable[[], None] | None = None,
    after_epoch: Callable[[Epoch], bool] | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[Epoch]:
    """Train ``model`` in place on ``images`` and return the history; the model ends in eval mode.

    Args:
        model: maps float images (N, 3, H, W) in [0, 1] to logits; all its parameters that require
            gradients are trained. On the same device as ``images``.
        images: what to train on.
        optimization: epochs, batch size, optimizer and its schedule.
        rng: shuffles, augments, and drives dropout.
        augmentation: applied to each image anew every epoch.
        loss: returns a scalar to descend and the logits that count for the accuracy.
        prepare: changes each augmented batch; the labels that it returns are those to learn.
        beside: networks that learn from the same steps.
        after_step: as in :func:`descend`.
        after_epoch: likewise.
        checkpoint: likewise.

    Raises:
        DivergedError: the mean loss of an epoch is not finite.
        ValueError: there are no images.
    """
    optimizer = optimizer_of(model, optimization)

    def objective(batch: Batch) -> tuple[Tensor, Tensor]:
        value, logits = loss(model, batch)
        if batch.penalty is not None:
            value = value + batch.penalty
        return value, (logits.detach().argmax(1) == batch.labels).sum()

    return descend(
        {"model": Part(model, optimizer, optimization.lr_at, optimization.clip), **(beside or {})},
        images,
        objective,
        epochs=optimization.epochs,
        batch_size=optimization.batch_size,
        rng=rng,
        augmentation=augmentation,
        prepare=prepare,
        after_step=after_step,
        after_epoch=after_epoch,
        checkpoint=checkpoint,
        bfloat16=optimization.bfloat16,
    )


def optimizer_of(model: nn.Module, optimization: Optimization) -> torch.optim.Optimizer:
    """Return the optimizer of all parameters of ``model`` that require gradients."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups: list[Any] = list(named.values())
    if not optimization.decay_norms:
        free = {name for name, p in named.items() if p.dim() < 2 or any(word in name for word in UNDECAYED)}
        groups = [
            {"params": [p for name, p in named.items() if name not in free]},
            {"params": [p for name, p in named.items() if name in free], "weight_decay": 0.0},
        ]
    if optimization.optimizer == "adamw":
        return torch.optim.AdamW(
            groups, lr=optimization.lr, betas=optimization.betas, weight_decay=optimization.weight_decay
        )
    return torch.optim.SGD(
        groups, lr=optimization.lr, momentum=optimization.momentum, weight_decay=optimization.weight_decay
    )


def descend(
    parts: Mapping[str, Part],
    images: ImageSet,
    objective: Objective,
    *,
    epochs: int,
    batch_size: int,
    rng: torch.Generator,
    augmentation: Augmentation = NO_AUGMENTATION,
    prepare: Prepare | None = None,
    after_step: Callable[[], None] | None = None,
    after_epoch: Callable[[Epoch], bool] | None = None,
    checkpoint: Checkpoint | None = None,
    bfloat16: bool = False,
) -> list[Epoch]:
    """Train ``parts`` in place on ``images`` and return the history; the parts end in eval mode.

    Each epoch draws from its own child of ``rng``, so a resumed run needs no generator state and
    gives the same bits.

    Args:
        parts: the networks, by names that the checkpoint keeps; the history has the first one's
            learning rate. On the same device as ``images``.
        images: what to train on.
        objective: what to descend.
        epochs: passes over the images.
        batch_size: images a step.
        rng: shuffles, augments, prepares, and drives dropout.
        augmentation: applied to each image anew every epoch.
        prepare: changes each augmented batch, in float32, before the objective is computed.
        after_step: called after each optimizer step, such as to keep pruned weights at zero.
        after_epoch: called after each epoch; training stops early when it returns True.
        checkpoint: read before the first epoch and written after each. It does not record an early
            stop, so a job that stops early should not have one.
        bfloat16: compute the objective in bfloat16 where there is a GPU.

    Raises:
        DivergedError: the mean loss of an epoch is not finite.
        ValueError: there are no images.
    """
    if not len(images):
        raise ValueError("no images to train on")
    history = checkpoint.load(parts) if checkpoint else []
    loader = Loader(images, batch_size, augmentation)
    precision = torch.autocast(
        images.device.type, torch.bfloat16, enabled=bfloat16 and images.device.type == "cuda"
    )
    for epoch in range(len(history), epochs):
        started = time.monotonic()
        for part in parts.values():
            part.network.train()
            for group in part.optimizer.param_groups:
                group["lr"] = part.lr_at(epoch)
        epoch_rng = streams.child(rng, "epoch", epoch)
        batches: Iterable[Batch] = loader.epoch(epoch_rng)
        if prepare:
            batches = _prepared(batches, prepare, streams.child(epoch_rng, "prepare"))
        with streams.global_stream(streams.child(epoch_rng, "layers")):
            totals = _run_epoch(parts, batches, objective, after_step, precision)
        lr = next(iter(parts.values())).lr_at(epoch)
        record = Epoch(epoch + 1, lr, *totals, time.monotonic() - started)
        if not math.isfinite(record.loss):
            raise DivergedError(
                f"the loss of epoch {record.epoch} is {record.loss}: lower the learning rate ({lr:.3g})"
            )
        history.append(record)
        if checkpoint:
            checkpoint.save(parts, history)
            _log_progress(history, epochs, len(images))
        if after_epoch and after_epoch(record):
            break
    for part in parts.values():
        part.network.eval()
    return history


def _prepared(batches: Iterable[Batch], prepare: Prepare, rng: torch.Generator) -> Iterable[Batch]:
    for batch in batches:
        yield prepare(batch, rng)


def _run_epoch(
    parts: Mapping[str, Part],
    batches: Iterable[Batch],
    objective: Objective,
    after_step: Callable[[], None] | None,
    precision: torch.autocast,
) -> tuple[float, float, int]:
    """Step over ``batches``; return mean loss and accuracy, read from the device at the end, and a count."""
    total_loss: Tensor | float = 0.0
    total_right: Tensor | int = 0
    count = num_poisoned = 0
    for batch in batches:
        with precision:
            value, right = objective(batch)
        for part in parts.values():
            part.optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        for part in parts.values():
            if part.clip is not None:
                nn.utils.clip_grad_norm_(part.network.parameters(), part.clip)
            part.optimizer.step()
        count_step(len(batch.rows))
        if after_step:
            after_step()
        total_loss = total_loss + value.detach() * len(batch.rows)
        total_right = total_right + right.detach()
        count += len(batch.rows)
        num_poisoned += batch.num_poisoned
    return float(total_loss) / count, float(total_right) / count, num_poisoned


def _log_progress(history: list[Epoch], epochs: int, images: int) -> None:
    last = history[-1]
    left = (epochs - last.epoch) * sum(epoch.seconds for epoch in history) / len(history)
    logger.info(
        "epoch %d/%d  loss %.4f  accuracy %.4f  lr %.2g  %.0f images/s  %.0f s left",
        *(last.epoch, epochs, last.loss, last.accuracy, last.lr, images / last.seconds, left),
    )
