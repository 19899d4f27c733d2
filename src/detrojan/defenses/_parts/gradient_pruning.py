"""Gradient-based pruning: remove the filters that most want to unlearn a trigger, then fine-tune.

Source: Dunnett, Arablouei, Miller, Dedeoglu, Jurdak, "Unlearning Backdoor Attacks through
Gradient-Based Model Pruning", 2024 (arXiv 2405.03918), and its authors' code. What stamps the
defender's images, the real trigger or an estimate of it, is the affair of the methods that use this.

Each step that the code takes in a way of its own is a setting, and three sets of them are declared in
``config/defenses/``. ``paper`` is the code as it is. ``survey``, the class's own values, mends its slips:
scores are taken in eval mode (there the first batch updates the running statistics with triggered images);
a removed filter is never scored again and can't grow back; removing it zeroes the filter, its bias and the
batch normalization that alone reads it, read from the data flow (there: whatever tensor is registered
next); gates of squeeze-and-excitation are no candidates; a loss of exactly the tolerance is tolerated,
counted in whole images. ``ours`` mends besides why the tuning leaves backdoors in. In a batch that is
triggered throughout, batch normalization subtracts much of the trigger, so the tuning learns to be right
under statistics that no test image meets: clean and triggered images go through the network together. The
clean validation loss is near zero from the start, so its minimum tells little of the backdoor: the loss of
triggered validation images counts too. And where ten validation images allow one error, all clean images
of a sample of a hundred allow ten; nothing was fitted to them yet.
In networks of layer normalization the hidden units of multilayer perceptrons are candidates beside the
filters, which is ours: a unit's row of the first layer, its bias and its column of the second are zeroed.
``docs/grad_prune.md`` measures what each of these does. Caps on rounds and epochs are ours, the code has
none.
"""

import math
from collections.abc import Callable, Iterator
from typing import ClassVar, Literal, NamedTuple, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan import rng as streams
from detrojan.defenses._parts.choices import accepted, allowed_errors
from detrojan.defenses._parts.subsets import stratified
from detrojan.defenses.base import Defense
from detrojan.errors import DivergedError, NotApplicableError
from detrojan.images import Batch, DefenderSample, ImageSet, TriggeredSample, to_float
from detrojan.learning import inference, training
from detrojan.models._parts.structure import units
from detrojan.settings import Optimization

BATCH_SIZE = 512  # images a pass that takes no step; it bounds the memory, not the result


class Limit(NamedTuple):
    """How many clean images pruning may lose.

    Attributes:
        images: clean, on which it is judged.
        right: those of them that the model as it came has right.
        allowed: how many fewer are tolerated.
    """

    images: ImageSet
    right: int
    allowed: int

    def allows(self, model: nn.Module) -> bool:
        """Return whether ``model``, in eval mode, has enough images right."""
        return accepted(inference.num_right(model, self.images), self.right, self.allowed)


class Tuned(NamedTuple):
    """How a fine-tuning ended.

    Attributes:
        epoch: that of the lowest validation loss, whose weights were kept; 0 is the model before tuning.
        capped: whether the cap on epochs ended it, so that a longer one might have found a lower loss.
    """

    epoch: int
    capped: bool


class GradientPruning(Defense):
    """Hyperparameters and the two phases of gradient-based pruning, given stamped images."""

    min_spc: ClassVar[int] = 2

    scores: Literal["eval", "train"] = Field(
        "eval",
        description="mode in which filters are scored; train: the first batch of a round in training mode, "
        "which moves the running statistics, the others in eval mode",
    )
    # At SPC 100 on 200 classes a round scores on 18,000 images, for a mean that fewer tell nearly as well: of
    # eight removals on GTSRB (1,935 images) a thousand made six alike, the others by near ties.
    score_images: int = Field(
        0,
        ge=0,
        description="triggered images that score the filters, balanced, the same all along; 0: all",
    )
    reselect: bool = Field(False, description="whether a removed filter may be picked again")
    removal: Literal["filter", "next_tensor"] = Field(
        "filter",
        description="what is zeroed; filter: kernel, bias, and the batch normalization that alone reads it, "
        "gates being no candidates; next_tensor: kernel, and its row of the parameter registered next",
    )
    max_drop: float = Field(
        0.1, gt=0, le=1, description="drop of the accuracy on clean images that is tolerated"
    )
    accuracy_images: Literal["validation", "all"] = Field(
        "validation", description="clean images on which that accuracy is judged"
    )
    ties: Literal["counted", "float"] = Field(
        "counted",
        description="counted: a drop of exactly the tolerance is tolerated, in whole images; float: only a "
        "smaller one, as a subtraction of rounded shares has it",
    )
    patience: int = Field(10, ge=1, description="rounds without a better unlearning loss that end pruning")
    max_rounds: int = Field(500, ge=1, description="cap on filters removed, one a round")
    lr: float = Field(1e-3, gt=0, description="learning rate of the fine-tuning, constant")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    weight_decay: float = Field(5e-4, ge=0, description="on all parameters")
    batch_size: int = Field(
        128, ge=2, description="clean images a step of the fine-tuning, and as many triggered ones"
    )
    tuning_batch: Literal["two_passes", "mixed"] = Field(
        "two_passes",
        description="how a step's images pass the network: clean ones, then triggered ones; or together",
    )
    regrow: bool = Field(False, description="whether the fine-tuning may move what was removed")
    tuning_patience: int = Field(10, ge=1, description="epochs without a lower validation loss that end it")
    max_epochs: int = Field(200, ge=1, description="cap on epochs of fine-tuning")
    # The code looks at clean images only, so where these are fitted already it returns a model that
    # is as backdoored as before, however well the tuning did.
    criterion: Literal["clean", "joint"] = Field(
        "clean", description="validation loss that picks the epoch: of clean images, or of triggered ones too"
    )

    def limit(self, model: nn.Module, clean: DefenderSample) -> Limit:
        """Return what pruning may lose of what ``model``, as it came and in eval mode, has right."""
        images = clean.everything if self.accuracy_images == "all" else clean.validation
        right = inference.num_right(model, images)
        if self.ties == "counted":
            allowed = allowed_errors(self.max_drop, len(images))
        else:
            shares = [count / len(images) for count in range(right + 1)]
            # The shares fall with the count, so the last that is near enough is the most that may be lost.
            allowed = sum(shares[right] - share < self.max_drop for share in shares) - 1
        return Limit(images, right, allowed)

    def prune(
        self,
        model: nn.Module,
        filters: "Filters",
        limit: Limit,
        triggered: TriggeredSample,
        scored: Tensor | None = None,
        *,
        rng: torch.Generator,
    ) -> None:
        """Remove filters one by one; leave ``model`` and ``filters`` at the best unlearning loss.

        Args:
            model: in eval mode.
            filters: its filters; those removed before stay so.
            limit: bounds the loss of accuracy.
            triggered: stamped copies with true labels; the training split scores the filters, the
                validation split tells when to stop.
            scored: rows of the training split that score the filters, as :meth:`scored_rows` returns them.
            rng: drives dropout where filters are scored in training mode.
        """
        scoring = triggered.train if scored is None else triggered.train[scored]
        _, best_loss = inference.evaluate(model, triggered.validation)
        best, best_count, waited = _snapshot(model), len(filters.removed), 0
        rounds = self.max_rounds
        if not self.reselect:
            rounds = min(rounds, len(filters) - len(filters.removed))
        for number in range(rounds):
            filters.remove(self._scores(model, filters, scoring, streams.child(rng, number)))
            drop_allowed = limit.allows(model)
            _, loss = inference.evaluate(model, triggered.validation)
            if loss < best_loss and drop_allowed:
                best_loss, best, best_count, waited = loss, _snapshot(model), len(filters.removed), 0
            else:
                waited += 1
            if not drop_allowed or waited >= self.patience:
                break
        model.load_state_dict(best)
        del filters.removed[best_count:]

    def scored_rows(self, images: ImageSet, *, rng: torch.Generator) -> Tensor | None:
        """Return the rows of training images that score the filters of a cell, int64; None for all."""
        if not 0 < self.score_images < len(images):
            return None
        return stratified(images.labels, self.score_images, rng)

    def _scores(
        self, model: nn.Module, filters: "Filters", triggered: ImageSet, rng: torch.Generator
    ) -> Tensor:
        """Return the scores of a round, (filters,): minus infinity for what may not be picked again."""
        if self.scores == "eval":
            scores = filters.scores(model, triggered)
        else:
            with streams.global_stream(rng):
                scores = filters.training_scores(model, triggered, self.batch_size)
        return scores if self.reselect else filters.without_removed(scores)

    def tune(
        self,
        model: nn.Module,
        filters: "Filters",
        clean: DefenderSample,
        triggered: TriggeredSample,
        *,
        rng: torch.Generator,
    ) -> Tuned:
        """Fine-tune on clean and triggered images; leave ``model`` at its lowest validation loss."""
        stamped_images = triggered.train.images
        best, best_loss, best_epoch = _snapshot(model), self.tuning_loss(model, clean, triggered), 0
        capped = True

        def both(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
            logits, stamped = self.logits(network, batch.images, to_float(stamped_images[batch.rows]))
            loss = F.cross_entropy(logits, batch.labels) + F.cross_entropy(stamped, batch.labels)
            return loss, logits

        def keep_best(epoch: training.Epoch) -> bool:
            nonlocal best, best_loss, best_epoch, capped
            loss = self.tuning_loss(model.eval(), clean, triggered)
            if loss < best_loss:
                best, best_loss, best_epoch = _snapshot(model), loss, epoch.epoch
            stop = epoch.epoch - best_epoch >= self.tuning_patience
            capped = not stop
            return stop

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
            after_step=None if self.regrow else filters.keeper(),
            after_epoch=keep_best,
        )
        model.load_state_dict(best)
        return Tuned(best_epoch, capped)

    def logits(self, network: nn.Module, clean: Tensor, stamped: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of a step's clean images and of their triggered copies, as many."""
        if self.tuning_batch == "mixed":
            # One batch for batch normalization, whose statistics are then near those of clean images.
            together = network(torch.cat([clean, stamped]))
            return together[: len(clean)], together[len(clean) :]
        # Batch normalization sees a clean batch and then a triggered one.
        return network(clean), network(stamped)

    def tuning_loss(self, model: nn.Module, clean: DefenderSample, triggered: TriggeredSample) -> float:
        """Return the validation loss by which the epoch is picked."""
        loss = inference.evaluate(model, clean.validation)[1]
        if self.criterion == "joint":
            loss += inference.evaluate(model, triggered.validation)[1]
        return loss

    def candidates(self, model: nn.Module, images: ImageSet) -> "Filters":
        """Return the filters of ``model`` that may be removed, and what goes with each.

        Args:
            model: takes ``images``.
            images: of the size that its data flow is read at.
        """
        kind = Filters if self.removal == "filter" else NextTensorFilters
        return kind(model, images.images)


class Filter(NamedTuple):
    """Output channel ``channel`` of the layer at place ``layer`` of :attr:`Filters.layers`."""

    layer: int
    channel: int


class Zeroed(NamedTuple):
    """A tensor that loses a row with a filter, or a column: ``dimension`` is 0 or 1."""

    tensor: Tensor
    dimension: int


Part = int | tuple[slice, int]  # of a tensor: a row, or a column


class Filters:
    """The filters of all candidate layers of a model, scored together and removed one by one.

    Which layers are candidates, and what goes with a filter, is read from the data flow. Candidates are
    convolutions and, in multilayer perceptrons on tokens or maps, linear layers, of which a hidden unit
    counts as a filter.

    Attributes:
        names: of the layers, as ``named_modules()`` of the network has them.
        layers: convolutions and linear layers, whose weights have a row a filter.
        zeroed: of each layer the tensors that lose something with a filter, and along which dimension.
        sizes: how many filters each layer has.
        removed: what was removed, in order.

    Raises:
        NotApplicableError: there are none, or none but those that cut images into patches: what would be
            left of the method is fine-tuning.
    """

    def __init__(self, model: nn.Module, images: Tensor | None = None) -> None:
        network = getattr(model, "network", model)
        found = self._find(network, images)
        if not found:
            raise NotApplicableError("gradient-based pruning needs convolutions; this model has none")
        self.names = list(found)
        self.layers = [cast("nn.Conv2d | nn.Linear", network.get_submodule(name)) for name in found]
        if all(map(_cuts_patches, self.layers)):
            raise NotApplicableError(
                f"gradient-based pruning needs filters to choose from, and the only candidate here is "
                f"{', '.join(self.names)}, which cuts images into patches"
            )
        self.zeroed = list(found.values())
        self.sizes = [len(layer.weight) for layer in self.layers]
        self.removed: list[Filter] = []

    @staticmethod
    def _find(network: nn.Module, images: Tensor | None) -> dict[str, list[Zeroed]]:
        """Return the candidates by name, with the tensors that are zeroed in part with a filter."""
        found = {}
        for unit in units(network, images):
            modules = [network.get_submodule(part) for part in (unit.layer, unit.norm) if part]
            # Kernel, bias, its norm's scale and shift.
            tensors = [cast("Tensor | None", t) for m in modules for t in (m.weight, m.bias)]
            zeroed = [Zeroed(tensor, 0) for tensor in tensors if tensor is not None]
            if unit.reader and isinstance(modules[0], nn.Linear):
                zeroed.append(Zeroed(cast("nn.Linear", network.get_submodule(unit.reader)).weight, 1))
            found[unit.layer] = zeroed
        return found

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def adapted(self) -> dict[str, object]:
        """What to note where hidden units are candidates, which the paper does not have."""
        return {"adapted": True} if any(isinstance(layer, nn.Linear) for layer in self.layers) else {}

    def scores(self, model: nn.Module, triggered: ImageSet) -> Tensor:
        """Return each filter's mean absolute gradient of the unlearning loss, (filters,), layer by layer.

        The unlearning loss is the mean cross-entropy of triggered images against their true labels.
        One pass over the images, no optimizer step.
        """
        losses = (
            F.cross_entropy(model(images), labels, reduction="sum") / len(triggered)
            for images, labels in _batches(triggered, BATCH_SIZE)
        )
        return self._of_losses(losses)

    def training_scores(self, model: nn.Module, triggered: ImageSet, batch_size: int) -> Tensor:
        """Return the scores as the authors' code takes them: of the sum of the batches' mean losses.

        The first batch passes ``model`` in training mode, and moves its running statistics; the others
        pass in eval mode, in which ``model`` is left. Batches are in the order of the images.
        """

        def losses() -> Iterator[Tensor]:
            model.train()
            for images, labels in _batches(triggered, batch_size):
                yield F.cross_entropy(model(images), labels)
                model.eval()

        return self._of_losses(losses())

    def _of_losses(self, losses: Iterator[Tensor]) -> Tensor:
        weights = [layer.weight for layer in self.layers]
        totals = [torch.zeros_like(weight) for weight in weights]
        for loss in losses:
            for total, gradient in zip(totals, torch.autograd.grad(loss, weights), strict=True):
                total.add_(gradient)
        return torch.cat([total.abs().flatten(1).mean(1) for total in totals])

    def without_removed(self, scores: Tensor) -> Tensor:
        """Return ``scores`` with minus infinity for the removed filters."""
        scores = scores.clone()
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
        with torch.no_grad():
            for tensor, part in self.parts(self.removed[-1]):
                tensor[part] = 0

    def parts(self, removed: Filter) -> list[tuple[Tensor, Part]]:
        """Return the tensors, and of each the row or column, that are zero once a filter is removed."""
        channel = removed.channel
        # Only the next tensor of any kind may have fewer rows than there are filters.
        return [
            (tensor, (slice(None), channel) if dimension else channel)
            for tensor, dimension in self.zeroed[removed.layer]
            if channel < tensor.shape[dimension]
        ]

    def keeper(self) -> Callable[[], None]:
        """Return a function that sets all that removing has zeroed to zero again, after a step moved it."""
        masks: dict[Tensor, Tensor] = {}
        for removed in self.removed:
            for tensor, part in self.parts(removed):
                masks.setdefault(tensor, torch.ones_like(tensor))[part] = 0

        @torch.no_grad()
        def clear() -> None:
            for parameter, keep in masks.items():
                parameter.mul_(keep)

        return clear

    def removed_names(self) -> list[str]:
        """Return the removed filters, each once and in order, as ``layer:channel``."""
        return [f"{self.names[f.layer]}:{f.channel}" for f in dict.fromkeys(self.removed)]


class NextTensorFilters(Filters):
    """Filters as the authors' code has them: every convolution's, each with a row of what is registered next.

    That is the normalization's scale in most places, but a bias, another convolution or the classifier in
    others. Where the next tensor has no such row, the code stops with an error; here it stays as it is.
    """

    @staticmethod
    def _find(network: nn.Module, images: Tensor | None) -> dict[str, list[Zeroed]]:
        parameters = dict(network.named_parameters())
        names = list(parameters)
        following = {name: names[place + 1 : place + 2] for place, name in enumerate(names)}
        return {
            name: [Zeroed(parameters[part], 0) for part in (f"{name}.weight", *following[f"{name}.weight"])]
            for name, module in network.named_modules()
            if isinstance(module, nn.Conv2d)
        }


def _cuts_patches(layer: nn.Conv2d | nn.Linear) -> bool:
    """Return whether a layer is the first of a transformer: it reads the image, each pixel once."""
    if not isinstance(layer, nn.Conv2d) or layer.in_channels != 3:
        return False
    return tuple(layer.stride) == tuple(layer.kernel_size) and max(layer.kernel_size) > 1


def _batches(images: ImageSet, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images as float in [0, 1] and labels, in order."""
    parts = (torch.split(part, batch_size) for part in (images.images, images.labels))
    for pixels, labels in zip(*parts, strict=True):
        yield to_float(pixels), labels


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
