"""I-BAU: implicit backdoor adversarial unlearning, a minimax game against one perturbation for all images.

Source: Zeng, Chen, Park, Mao, Jin, Jia, "Adversarial Unlearning of Backdoors via Implicit
Hypergradient", ICLR 2022 (arXiv 2110.03735), and its authors' code; hyperparameters of the survey's
benchmark (arXiv 2411.11200). A round finds a perturbation that changes predictions, then takes a step a
batch on images of which a share carries it. The step's gradient includes how the best perturbation
would follow the weights, by the fixed-point iteration of Grazzi et al., ICML 2020 (arXiv 2006.16218).
The curvature of the inner problem is always that of the first batch, as there.

Both codes move the perturbation by steps of 10 and 0.1 under a penalty of 0.001, but not in the same units.
The benchmark adds it behind the normalization (``units: normalized``, the class's own): with standard
deviation s there, a step of size a is a s² here, where it is added to pixels in [0, 1], and a penalty p is
p / s². The images of a data set say what s² is, the mean over red, green and blue. The authors' images are
not normalized, so their numbers are pixels' on every data set (``units: pixels``). As in both, nothing but
the penalty bounds the perturbation, and pixels may leave [0, 1].

The benchmark's rate is 1e-4 and its half-rounds are one pass over the images each, which with few images is
one step: the perturbation stays small (``perturbation_norms``), and there is little to unlearn. The authors
have 1e-3 and, in the one round that their notebooks run, 50 steps of each kind; ``paper`` goes
over the images until there are 50 in five rounds. Much of what these do is the rate and the steps alone: with
``share: 0``, which stamps no image, it is fine-tuning in eval mode, a control that belongs beside.

Departures: at least one image of a batch is stamped (there 1 % of fewer than 100 images is none, and the
method becomes fine-tuning in eval mode); the squared norm is a sum of squares (the derivative of a norm
at zero is NaN); the fixed-point iteration has no early stop, which would wait for the GPU to save
products that change nothing; hard sigmoids (MobileNetV3), which in torch have no second derivative, are
rewritten while the method runs.
"""

import contextlib
import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from detrojan import rng as streams
from detrojan.defenses.base import Defense
from detrojan.errors import DivergedError
from detrojan.images import Batch, DatasetInfo, DefenderSample, ImageSet, Loader, passes, to_device
from detrojan.learning import inference
from detrojan.learning.meter import count_step
from detrojan.settings import NO_AUGMENTATION


class IBAU(Defense):
    """Unlearn a universal perturbation, with the gradient that knows how the perturbation answers."""

    smoke: ClassVar[dict[str, object]] = {"rounds": 1, "iterations": 2, "inner_images": 4}

    rounds: int = Field(5, ge=1, description="times that a perturbation is found and then unlearned")
    min_steps: int = Field(
        0,
        ge=0,
        description="fewest optimizer steps a round on the perturbation, and as many on the weights; "
        "passes are added until they are taken; 0: one pass each",
    )
    batch_size: int = Field(256, ge=2, description="images a step, of both")
    augment: bool = Field(True, description="whether images are cropped and flipped as the data set's are")
    fixed_batches: bool = Field(
        False,
        description="whether the perturbation is found on the batches that unlearn it, in their order; "
        "else on new ones each round",
    )
    lr: float = Field(1e-4, gt=0, description="of Adam on the weights, constant")
    amsgrad: bool = Field(True, description="whether Adam keeps the largest second moment")
    share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="of a batch's images that are stamped, rounded down; if above 0, one at least",
    )
    units: Literal["normalized", "pixels"] = Field(
        "normalized",
        description="of inner_lr, penalty and fixed_point_step: pixel values in [0, 1], or these divided by "
        "the data set's standard deviation",
    )
    inner_lr: float = Field(
        10.0, gt=0, description="step of gradient ascent on the perturbation, squared units per nat"
    )
    penalty: float = Field(
        0.001, ge=0, description="on the perturbation's sum of squares, nats per squared unit"
    )
    iterations: int = Field(
        5, ge=0, description="of the fixed point behind the hypergradient; 0: perturbation as given"
    )
    fixed_point_step: float = Field(
        0.1, gt=0, description="step of the map behind the hypergradient, squared units per nat"
    )
    inner_images: int = Field(
        256, ge=1, description="cap on images of the first batch in the inner loss; bounds the memory"
    )

    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Return an unlearned copy of ``model``; it chooses nothing, so it uses every image.

        ``clean.chosen`` gets the numbers of images stamped in a round's batches and used in the inner
        loss, each round's L2 norm of the perturbation (pixel values), and the accuracy on the images
        before and after, with ``collapsed`` set where it fell below half.
        """
        repaired = copy.deepcopy(model).eval()
        images = clean.everything
        before, _ = inference.evaluate(repaired, images)
        with twice_differentiable(repaired):
            self.in_pixels(images.info)._unlearn(repaired, images, clean.chosen, rng)
        after, _ = inference.evaluate(repaired, images)
        clean.chosen.update({"sample_accuracy": [before, after], "collapsed": after < before / 2})
        return repaired

    def in_pixels(self, info: DatasetInfo) -> "IBAU":
        """Return the same settings for a data set, with steps and penalty in pixel values."""
        if self.units == "pixels":
            return self
        variance = sum(deviation**2 for deviation in info.std) / len(info.std)
        converted = {
            "units": "pixels",
            "inner_lr": self.inner_lr * variance,
            "penalty": self.penalty / variance,
            "fixed_point_step": self.fixed_point_step * variance,
        }
        return self.model_copy(update=converted)

    def _unlearn(
        self, model: nn.Module, images: ImageSet, chosen: dict[str, object], rng: torch.Generator
    ) -> None:
        """Run all rounds on ``model``, in place; ``self`` is in pixels."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=self.lr, amsgrad=self.amsgrad)
        loader = Loader(
            images, self.batch_size, images.info.augmentation if self.augment else NO_AUGMENTATION
        )
        num_passes = passes(1, self.min_steps, loader.num_batches)

        def outer_batches() -> Iterator[Batch]:
            # From one stream, so these are the same batches whenever they are asked for.
            return loader.epoch(streams.child(rng, "outer"))

        def inner_batches(number: int) -> Iterator[Batch]:
            stream = streams.child(rng, "perturb", number)
            for _ in range(num_passes):
                yield from outer_batches() if self.fixed_batches else loader.epoch(stream)

        first = next(outer_batches())
        inner_images, inner_labels = first.images[: self.inner_images], first.labels[: self.inner_images]
        inner = functools.partial(self.inner_loss, model, inner_images, inner_labels)
        stamped = [self.num_stamped(len(batch.rows)) for batch in outer_batches()]
        norms: list[float] = []
        chosen.update(
            {"num_stamped": stamped, "inner_images": len(inner_images), "perturbation_norms": norms}
        )
        for number in range(self.rounds):
            perturbation = self.perturb(model, inner_batches(number))
            stamp_rng = streams.child(rng, "stamp", number)
            # Summed on the device and read once a round.
            total = torch.zeros((), device=images.device)
            batches = itertools.chain.from_iterable(outer_batches() for _ in range(num_passes))
            for batch, count in zip(batches, stamped * num_passes, strict=True):
                mask = to_device(_mask(len(batch.rows), count, stamp_rng), images.device)
                outer = functools.partial(_outer_loss, model, batch, mask)
                loss, gradients = hypergradient(
                    outer,
                    inner,
                    perturbation,
                    parameters,
                    iterations=self.iterations,
                    step=self.fixed_point_step,
                )
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                count_step(len(batch.rows))
                total += loss + nn.utils.get_total_norm(gradients)
            norms.append(float(perturbation.norm()))
            if not math.isfinite(float(total)):
                raise DivergedError(
                    f"the loss of round {number + 1} or its gradient is not finite (perturbation of norm "
                    f"{norms[-1]:.3g}): lower inner_lr ({self.inner_lr:.3g} in pixel values) or lr "
                    f"({self.lr:.3g})"
                )
        optimizer.zero_grad(set_to_none=True)

    def num_stamped(self, count: int) -> int:
        """Return how many images of a batch of ``count`` carry the perturbation."""
        # The small term makes 0.29 of 100 images 29 and not 28.
        return max(1, math.floor(self.share * count + 1e-9)) if self.share else 0

    def inner_loss(self, model: nn.Module, images: Tensor, labels: Tensor, perturbation: Tensor) -> Tensor:
        """Return what the perturbation descends: minus the cross-entropy, plus the penalty on its size.

        Here and in :meth:`perturb` steps and penalty are taken as pixels', see :meth:`in_pixels`.

        Args:
            model: in eval mode; gradients reach its weights too.
            images: float (N, 3, H, W) in [0, 1].
            labels: int64 (N,), what the perturbation leads away from.
            perturbation: float (1, 3, H, W), pixel values.
        """
        # Not the norm, squared: its derivatives at zero are NaN.
        size = perturbation.square().sum()
        return self.penalty * size - F.cross_entropy(model(images + perturbation), labels)

    def perturb(self, model: nn.Module, batches: Iterable[Batch]) -> Tensor:
        """Return one perturbation for all images, (1, 3, H, W), pixel values, after a step a batch from zero.

        It leads away from what ``model`` makes of the clean images, be that right or wrong.
        """
        perturbation: Tensor | None = None
        for batch in batches:
            with torch.no_grad():
                predicted = model(batch.images).argmax(1)
            if perturbation is None:
                perturbation = torch.zeros_like(batch.images[:1])
            moving = perturbation.clone().requires_grad_()
            loss = self.inner_loss(model, batch.images, predicted, moving)
            (gradient,) = torch.autograd.grad(loss, moving)
            perturbation = perturbation - self.inner_lr * gradient
            count_step(len(batch.rows))
        assert perturbation is not None
        return perturbation


def hypergradient(
    outer: Callable[[Tensor], Tensor],
    inner: Callable[[Tensor], Tensor],
    perturbation: Tensor,
    parameters: Sequence[Tensor],
    *,
    iterations: int,
    step: float,
) -> tuple[Tensor, list[Tensor]]:
    """Return the outer loss, detached, and its gradient through the inner minimum, one tensor a parameter.

    At a minimum d of the inner loss L, d is a fixed point of the map d - step ∇L(d). With J that map's
    derivatives, the gradient is that of the outer loss with d held, plus (J_parameters)ᵀ v, where
    v = (J_d)ᵀ v + ∇_d outer. Each iteration sets v to the right side, beginning with zero (Zeng et al.,
    Algorithm 1). All products reuse one graph of ∇L.

    Args:
        outer: maps a perturbation to the loss to descend; reaches ``parameters`` by itself.
        inner: maps a perturbation to the loss that it minimizes, likewise; twice differentiable.
        perturbation: the minimum, or what stands for it; any shape.
        parameters: leaves that require gradients; their ``.grad`` stays as it is.
        iterations: 0 holds the perturbation; more come closer, if ``step`` times the curvature is
            between 0 and 2.
        step: of the map.
    """
    at = perturbation.detach().clone().requires_grad_()
    loss = outer(at)
    pull, *gradients = torch.autograd.grad(loss, [at, *parameters], materialize_grads=True)
    if iterations:
        (slope,) = torch.autograd.grad(inner(at), at, create_graph=True)
        v = pull  # the first iteration, from zero
        for _ in range(iterations - 1):
            (bent,) = torch.autograd.grad(slope, at, v, retain_graph=True)
            v = v - step * bent + pull
        answers = torch.autograd.grad(slope, parameters, v, materialize_grads=True)
        gradients = [
            gradient.sub(answer, alpha=step) for gradient, answer in zip(gradients, answers, strict=True)
        ]
    return loss.detach(), gradients


@contextlib.contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Let the hard sigmoids of ``model`` have second derivatives while the block runs.

    Of torch's activations these alone have none, and of the ways in which torch computes attention, only
    the plain one has them. All is as before when the block ends.
    """
    places = [
        (parent, name, module)
        for parent in model.modules()
        for name, module in parent.named_children()
        if isinstance(module, nn.Hardsigmoid)
    ]
    for parent, name, _ in places:
        setattr(parent, name, _HardSigmoid())
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for parent, name, module in places:
            setattr(parent, name, module)


class _HardSigmoid(nn.Module):
    """The hard sigmoid, written with a function that can be differentiated twice."""

    def forward(self, inputs: Tensor) -> Tensor:
        return F.relu6(inputs + 3) / 6


def _mask(count: int, stamped: int, rng: torch.Generator) -> Tensor:
    """Return ones for ``stamped`` of ``count`` images, drawn at random, else zeros, (count, 1, 1, 1)."""
    mask = torch.zeros(count, 1, 1, 1)
    mask[torch.randperm(count, generator=rng)[:stamped]] = 1
    return mask


def _outer_loss(model: nn.Module, batch: Batch, mask: Tensor, perturbation: Tensor) -> Tensor:
    """Return the cross-entropy of the true labels, with the perturbation where ``mask`` is one."""
    return F.cross_entropy(model(batch.images + mask * perturbation), batch.labels)
