"""Gradient-based pruning: remove the filters that most want to unlearn a trigger, then fine-tune.

Source: Dunnett, Arablouei, Miller, Dedeoglu, Jurdak, "Unlearning Backdoor Attacks through
Gradient-Based Model Pruning", 2024 (arXiv 2405.03918), and its authors' code. What stamps the
defender's images, the real trigger or an estimate of it, is the affair of the methods that use this.
Departures from the code, each a slip there: scores are taken in eval mode (there the first batch
updates the running statistics with triggered images); a removed filter is never scored again and
can't grow back; removing it zeroes the filter, its bias and the batch normalization that alone reads
it, read from the data flow (there: whatever tensor is registered next); gates of squeeze-and-
excitation are no candidates. Caps on rounds and epochs are ours, the code has none.
"""

import math
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan.defenses.base import Defense
from detrojan.errors import DivergedError, NotApplicableError
from detrojan.images import Batch, DefenderSample, ImageSet, TriggeredSample, to_float
from detrojan.learning import inference, training
from detrojan.models._parts.structure import convolution_norms
from detrojan.settings import Optimization

BATCH_SIZE = 512  # images a pass that takes no step; it bounds the memory, not the result


class GradientPruning(Defense):
    """Hyperparameters and the two phases of gradient-based pruning, given stamped images."""

    min_spc: ClassVar[int] = 2

    max_drop: float = Field(0.1, gt=0, le=1, description="drop of validation accuracy that ends pruning")
    patience: int = Field(10, ge=1, description="rounds without a better unlearning loss that end pruning")
    max_rounds: int = Field(500, ge=1, description="cap on filters removed, one a round")
    lr: float = Field(1e-3, gt=0, description="learning rate of the fine-tuning, constant")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    weight_decay: float = Field(5e-4, ge=0, description="on all parameters")
    batch_size: int = Field(128, ge=2, description="clean images a step of the fine-tuning")
    tuning_patience: int = Field(10, ge=1, description="epochs without a lower validation loss that end it")
    max_epochs: int = Field(200, ge=1, description="cap on epochs of fine-tuning")
    # The code looks at clean images only, so where these are fitted already it returns a model that
    # is as backdoored as before, however well the tuning did.
    criterion: Literal["clean", "joint"] = Field(
        "clean", description="validation loss that picks the epoch: of clean images, or of triggered ones too"
    )

    def prune(
        self,
        model: nn.Module,
        filters: "Filters",
        clean: DefenderSample,
        triggered: TriggeredSample,
        *,
        accuracy: float,
    ) -> None:
        """Remove filters one by one; leave ``model`` and ``filters`` at the best unlearning loss.

        Args:
            model: in eval mode.
            filters: its filters; those removed before stay so.
            clean: whose validation images bound the loss of accuracy.
            triggered: stamped copies with true labels; the training split scores the filters, the
                validation split tells when to stop.
            accuracy: on validation images, in [0, 1], from which the allowed drop counts.
        """
        _, best_loss = inference.evaluate(model, triggered.validation)
        # Shares of a few images: the small term keeps 1.0 - 0.9 a drop of 0.1 and not of less.
        lowest, best = accuracy - self.max_drop + 1e-9, _snapshot(model)
        best_count, waited = len(filters.removed), 0
        for _ in range(min(self.max_rounds, len(filters) - len(filters.removed))):
            filters.remove(filters.scores(model, triggered.train))
            drop_allowed = inference.evaluate(model, clean.validation)[0] > lowest
            _, loss = inference.evaluate(model, triggered.validation)
            if loss < best_loss and drop_allowed:
                best_loss, best, best_count, waited = loss, _snapshot(model), len(filters.removed), 0
            else:
                waited += 1
            if not drop_allowed or waited >= self.patience:
                break
        model.load_state_dict(best)
        del filters.removed[best_count:]

    def tune(
        self,
        model: nn.Module,
        filters: "Filters",
        clean: DefenderSample,
        triggered: TriggeredSample,
        *,
        rng: torch.Generator,
    ) -> int:
        """Fine-tune on clean and triggered images; leave ``model`` at its lowest validation loss.

        Returns the epoch of that loss; 0 is the model before tuning.
        """
        stamped_images = triggered.train.images
        best, best_loss, best_epoch = _snapshot(model), self.tuning_loss(model, clean, triggered), 0

        def both(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
            # Two passes, so that batch normalization sees a clean batch and then a triggered one.
            logits = network(batch.images)
            stamped = network(to_float(stamped_images[batch.rows]))
            loss = F.cross_entropy(logits, batch.labels) + F.cross_entropy(stamped, batch.labels)
            return loss, logits

        def keep_best(epoch: training.Epoch) -> bool:
            nonlocal best, best_loss, best_epoch
            loss = self.tuning_loss(model.eval(), clean, triggered)
            if loss < best_loss:
                best, best_loss, best_epoch = _snapshot(model), loss, epoch.epoch
            return epoch.epoch - best_epoch >= self.tuning_patience

        optimization = Optimization(
            epochs=self.max_epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule="constant",
        )
        training.fit(
            model,
            clean.train,
            optimization,
            rng=rng,
            loss=both,
            after_step=filters.keeper(),
            after_epoch=keep_best,
        )
        model.load_state_dict(best)
        return best_epoch

    def tuning_loss(self, model: nn.Module, clean: DefenderSample, triggered: TriggeredSample) -> float:
        """Return the validation loss by which the epoch is picked."""
        loss = inference.evaluate(model, clean.validation)[1]
        if self.criterion == "joint":
            loss += inference.evaluate(model, triggered.validation)[1]
        return loss


class Filter(NamedTuple):
    """Output channel ``channel`` of the convolution at place ``layer`` of :attr:`Filters.layers`."""

    layer: int
    channel: int


class Filters:
    """The filters of all candidate convolutions of a model, scored together and removed one by one."""

    def __init__(self, model: nn.Module) -> None:
        network = getattr(model, "network", model)
        pairs = convolution_norms(network)
        if not pairs:
            raise NotApplicableError("gradient-based pruning needs convolutions; this model has none")
        self.names = list(pairs)
        self.layers = [cast("nn.Conv2d", network.get_submodule(name)) for name in pairs]
        self.norms = [
            cast("nn.BatchNorm2d", network.get_submodule(norm)) if norm else None for norm in pairs.values()
        ]
        self.sizes = [len(layer.weight) for layer in self.layers]
        self.removed: list[Filter] = []

    def __len__(self) -> int:
        return sum(self.sizes)

    def scores(self, model: nn.Module, triggered: ImageSet) -> Tensor:
        """Return each filter's mean absolute gradient of the unlearning loss, (filters,), layer by layer.

        The unlearning loss is the mean cross-entropy of triggered images against their true labels;
        removed filters score minus infinity. One pass over the images, no optimizer step.
        """
        weights = [layer.weight for layer in self.layers]
        totals = [torch.zeros_like(weight) for weight in weights]
        batches = (torch.split(part, BATCH_SIZE) for part in (triggered.images, triggered.labels))
        for images, labels in zip(*batches, strict=True):
            loss = F.cross_entropy(model(to_float(images)), labels, reduction="sum") / len(triggered)
            for total, gradient in zip(totals, torch.autograd.grad(loss, weights), strict=True):
                total.add_(gradient)
        scores = torch.cat([total.abs().flatten(1).mean(1) for total in totals])
        if self.removed:
            scores[[sum(self.sizes[: f.layer]) + f.channel for f in self.removed]] = -math.inf
        return scores

    def remove(self, scores: Tensor) -> None:
        """Remove the filter with the highest of ``scores``."""
        place = int(scores.argmax())
        if not math.isfinite(float(scores[place])):
            raise DivergedError("the gradient of the unlearning loss is not finite")
        for layer, size in enumerate(self.sizes):
            if place < size:
                self.removed.append(Filter(layer, place))
                break
            place -= size
        self._clear(self.removed[-1:])

    def keeper(self) -> Callable[[], None]:
        """Return a function that sets all that removing has zeroed to zero again, after a step moved it."""
        masks = []
        for layer, channels in self._by_layer(self.removed).items():
            for parameter in self._parameters(layer):
                keep = torch.ones_like(parameter)
                keep[channels] = 0
                masks.append((parameter, keep))

        @torch.no_grad()
        def clear() -> None:
            for parameter, keep in masks:
                parameter.mul_(keep)

        return clear

    def removed_names(self) -> list[str]:
        """Return the removed filters, in order, as ``layer:channel``."""
        return [f"{self.names[f.layer]}:{f.channel}" for f in self.removed]

    @torch.no_grad()
    def _clear(self, filters: list[Filter]) -> None:
        for layer, channels in self._by_layer(filters).items():
            for parameter in self._parameters(layer):
                parameter[channels] = 0

    @staticmethod
    def _by_layer(filters: list[Filter]) -> dict[int, list[int]]:
        return {
            layer: [f.channel for f in filters if f.layer == layer] for layer in {f.layer for f in filters}
        }

    def _parameters(self, layer: int) -> list[Tensor]:
        """Return the tensors whose row is zeroed with a filter: kernel, bias, its norm's scale and shift."""
        modules = (self.layers[layer], self.norms[layer])
        tensors = [
            tensor for module in modules if module is not None for tensor in (module.weight, module.bias)
        ]
        return [tensor for tensor in tensors if tensor is not None]


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
