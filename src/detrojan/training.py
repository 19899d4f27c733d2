"""The one training loop: `train` fits backdoored models with it, defenses fine-tune with it."""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan import artifacts
from detrojan import rng as streams
from detrojan.data import Batch, ImageSet, Loader
from detrojan.errors import DivergedError
from detrojan.settings import NO_AUGMENTATION, Augmentation, Optimization

logger = logging.getLogger(__name__)

HISTORY = pa.schema(
    [
        pa.field("epoch", pa.int32(), nullable=False),
        pa.field("lr", pa.float64(), nullable=False),
        pa.field("loss", pa.float64(), nullable=False),
        pa.field("accuracy", pa.float64(), nullable=False),
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
        seconds: wall time.
    """

    epoch: int
    lr: float
    loss: float
    accuracy: float
    seconds: float


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

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, history: list[Epoch]) -> None:
        """Write the state after the last epoch of ``history``."""
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
        rows = [dataclasses.asdict(epoch) for epoch in history]
        artifacts.write_tensors(tensors, self.path, fingerprint=self.fingerprint, history=rows)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Epoch]:
        """Restore ``model`` and ``optimizer``; return the epochs done, none if there is no checkpoint."""
        if not self.path.exists():
            return []
        tensors, metadata = artifacts.read_tensors(self.path)
        if metadata.get("fingerprint") != self.fingerprint:
            logger.info("checkpoint %s belongs to other settings, code or data: starting anew", self.path)
            return []
        model.load_state_dict(_with_prefix(tensors, "model."))
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _with_prefix(tensors, "optimizer.").items():
            number, key = name.split(".", 1)
            state.setdefault(int(number), {})[key] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
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
    after_step: Callable[[], None] | None = None,
    after_epoch: Callable[[Epoch], bool] | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[Epoch]:
    """Train ``model`` in place on ``images`` and return the history; the model ends in eval mode.

    Each epoch draws from its own child of ``rng``, so a resumed run needs no generator state and
    gives the same bits. On CUDA the forward pass runs in bfloat16.

    Args:
        model: maps float images (N, 3, H, W) in [0, 1] to logits; all its parameters that require
            gradients are trained. On the same device as ``images``.
        images: what to train on.
        optimization: epochs, batch size, SGD and its schedule.
        rng: shuffles, augments, and drives dropout.
        augmentation: applied to each image anew every epoch.
        loss: returns a scalar to descend and the logits that count for the accuracy.
        after_step: called after each optimizer step, such as to keep pruned weights at zero.
        after_epoch: called after each epoch; training stops early when it returns True.
        checkpoint: read before the first epoch and written after each. It does not record an early
            stop, so a job that stops early should not have one.

    Raises:
        DivergedError: the mean loss of an epoch is not finite.
        ValueError: there are no images.
    """
    if not len(images):
        raise ValueError("no images to train on")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        parameters, lr=optimization.lr, momentum=optimization.momentum, weight_decay=optimization.weight_decay
    )
    history = checkpoint.load(model, optimizer) if checkpoint else []
    loader = Loader(images, optimization.batch_size, augmentation)
    for epoch in range(len(history), optimization.epochs):
        started = time.monotonic()
        lr = optimization.lr_at(epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        epoch_rng = streams.child(rng, "epoch", epoch)
        with streams.global_stream(streams.child(epoch_rng, "layers")):
            mean_loss, accuracy = _run_epoch(model, loader.epoch(epoch_rng), optimizer, loss, after_step)
        record = Epoch(epoch + 1, lr, mean_loss, accuracy, time.monotonic() - started)
        if not math.isfinite(mean_loss):
            raise DivergedError(
                f"the loss of epoch {record.epoch} is {mean_loss}: lower the learning rate ({lr:.3g})"
            )
        history.append(record)
        if checkpoint:
            checkpoint.save(model, optimizer, history)
            _log_progress(history, optimization.epochs, len(images))
        if after_epoch and after_epoch(record):
            break
    model.eval()
    return history


def _run_epoch(
    model: nn.Module,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    after_step: Callable[[], None] | None,
) -> tuple[float, float]:
    """Step over ``batches``; return mean loss and accuracy, read from the device once at the end."""
    model.train()
    device = next(model.parameters()).device
    total_loss = torch.zeros((), device=device)
    total_right = torch.zeros((), device=device, dtype=torch.int64)
    count = 0
    for batch in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            value, logits = loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if after_step:
            after_step()
        total_loss += value.detach() * len(batch.rows)
        total_right += (logits.detach().argmax(1) == batch.labels).sum()
        count += len(batch.rows)
    return float(total_loss) / count, int(total_right) / count


def _log_progress(history: list[Epoch], epochs: int, images: int) -> None:
    last = history[-1]
    left = (epochs - last.epoch) * sum(epoch.seconds for epoch in history) / len(history)
    logger.info(
        "epoch %d/%d  loss %.4f  accuracy %.4f  lr %.2g  %.0f images/s  %.0f s left",
        *(last.epoch, epochs, last.loss, last.accuracy, last.lr, images / last.seconds, left),
    )
