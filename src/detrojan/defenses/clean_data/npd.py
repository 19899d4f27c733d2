"""NPD: Neural Polarizer Defense, one small layer that turns perturbed features back.

Source: Zhu, Wei, Zha, Wu, "Neural Polarizer: A Lightweight and Effective Backdoor Defense via
Purifying Poisoned Features", NeurIPS 2023 (arXiv 2306.16697). The network is frozen. Before a late
convolution stands a 1×1 convolution with batch normalization, which alone is trained, on clean images
and on perturbed ones that stand in for triggered images. Values and places are those of the survey's
benchmark (arXiv 2411.11200), which uses CIFAR-10's values on Tiny-ImageNet. On PreAct-ResNet-18 the layer
stands inside the last block, so what the block's shortcut carries goes round it, whatever the settings.

The protocol ``paper`` is the authors' port in BackdoorBench: images that aren't augmented, at least its
steps on 5 % of each data set, and on Tiny-ImageNet a larger radius, other weights, an attack along the
gradient itself, and a layer that normalizes by the batch and follows clean images. That gradient is of a
mean over the batch, and steps of 0.1 along it hardly move an image.

Departures from both codes:

- The convolution starts as the identity and the normalization with scale 1, shift 0 and the statistics of
  the clean images, from one pass over them: where the codes get to in a warm-up of five epochs of 20 steps,
  which start with statistics 0 and 1. Where an epoch is one batch, their warm-up has come 41 % of the way.
  Nothing is left for it to do, at its rate of 1e-4, so there is none. ``start: identity`` sets scale and
  shift so that they undo the statistics, and the network starts as it came.
- A channel's variance counts as a hundredth of the mean of all channels' if it is smaller; where scale and
  shift undo it, as that mean. A channel that few clean images leave dead would else be amplified by
  1 / sqrt(epsilon), 316, once a perturbation wakes it.
- The attack's loss is not cut off at 80, where the attack would stand still.
- Where no convolution is late, as in transformers, the layer stands before the first normalization of the
  last block, and is a linear one that each token passes by itself: ours, no paper has it, and ``adapted`` in
  ``chosen`` says so.
- The repaired model has the layer inside. The benchmark saves the backdoored model without it.

Clean images pass the frozen layers anew in each step. To keep what these put out would spare one forward
pass of four, and take 0.26 MB an image of 64×64 pixels: 5 GB for 100 images of each of 200 classes.
"""

import copy
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan.defenses._parts import adversarial
from detrojan.defenses._parts.normalization import frozen_statistics
from detrojan.defenses.base import Defense
from detrojan.errors import NotApplicableError
from detrojan.images import Batch, DefenderSample, ImageSet, num_batches, passes
from detrojan.learning import inference, training
from detrojan.learning.training import Objective, Part
from detrojan.models import Classifier
from detrojan.models._parts import places, structure
from detrojan.models._parts.insertions import Polarizer, TokenPolarizer
from detrojan.settings import NO_AUGMENTATION

DEAD = 0.01  # a variance below this share of the mean of all channels' is lifted to it


class NPD(Defense):
    """Neural Polarizer Defense."""

    smoke: ClassVar[dict[str, object]] = {"epochs": 1}

    host: str = Field(
        "",
        description="name of the convolution, or in a transformer the layer normalization, that the layer "
        "stands before; none: a late one is found",
    )
    start: Literal["whitened", "identity"] = Field(
        "whitened",
        description="how the layer starts: normalizing by the clean images' statistics, or changing nothing",
    )
    epochs: int = Field(50, ge=1, description="passes over the clean images")
    min_steps: int = Field(
        0, ge=0, description="fewest optimizer steps; passes are added until they are taken; 0: none"
    )
    augmented: bool = Field(True, description="whether clean images are cropped and flipped")
    batch_size: int = Field(128, ge=2, description="clean images a step; as many perturbed ones join them")
    lr: float = Field(0.01, gt=0, description="learning rate of SGD, constant")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    weight_decay: float = Field(5e-4, ge=0, description="on all parameters of the layer")
    eps: float = Field(3.0, gt=0, description="largest L2 norm of an image's perturbation, pixels in [0, 1]")
    attack_steps: int = Field(2, ge=1, description="gradient steps towards a perturbation, at most")
    attack_step: float = Field(
        0.1, gt=0, description="size of a step along the sign, pixels in [0, 1]; or the gradient's factor"
    )
    attack_along: Literal["sign", "gradient"] = Field("sign", description="what a step of the attack follows")
    fooled: float = Field(0.6, ge=0, le=1, description="share of images at their aim that ends the attack")
    keep_weight: float = Field(0.4, ge=0, description="of keeping what was predicted")
    rival_weight: float = Field(0.4, ge=0, description="of leaving the likeliest wrong class")
    aim_weight: float = Field(0.4, ge=0, description="of leaving the attack's aim")
    by_batch: bool = Field(
        False, description="whether the layer normalizes by each batch, and its statistics follow clean ones"
    )

    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Return a copy of ``model`` with a trained polarizer; its other tensors are as they were.

        Raises:
            NotApplicableError: there is no layer of the name that is set, or none late enough.
        """
        repaired = copy.deepcopy(model).eval().requires_grad_(False)
        assert isinstance(repaired, Classifier)
        images = clean.everything
        host = self.host or places.late_layer(repaired.network, images.images)
        polarizer = insert(repaired, host, images, self.start)
        clean.chosen["host"] = host
        if isinstance(polarizer, TokenPolarizer):
            clean.chosen["adapted"] = True
        optimizer = torch.optim.SGD(
            polarizer.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
        # Only the polarizer is a part: the loop would put the network around it into training mode too.
        training.descend(
            {"polarizer": Part(polarizer, optimizer, lambda _: self.lr)},
            images,
            self._objective(repaired, polarizer),
            epochs=passes(self.epochs, self.min_steps, num_batches(len(images), self.batch_size)),
            batch_size=self.batch_size,
            rng=rng,
            augmentation=images.info.augmentation if self.augmented else NO_AUGMENTATION,
        )
        return repaired.requires_grad_(True)

    def _objective(self, model: nn.Module, polarizer: Polarizer | TokenPolarizer) -> Objective:
        def objective(batch: Batch) -> tuple[Tensor, Tensor]:
            polarizer.eval()  # the loop sets training mode, but perturbed images must not move statistics
            perturbed, predicted, aim = self._perturb(model, batch.images, batch.labels)
            if self.by_batch:
                polarizer.train()
                logits = model(batch.images)
                with frozen_statistics(polarizer):
                    turned = model(perturbed)
            else:
                logits, turned = model(torch.cat([batch.images, perturbed])).chunk(2)
            loss = (
                F.cross_entropy(logits, batch.labels)
                + self.keep_weight * F.cross_entropy(turned, predicted)
                + self.rival_weight * _presence(turned, _rival(turned, batch.labels))
                + self.aim_weight * _presence(turned, aim)
            )
            return loss, (logits.detach().argmax(1) == batch.labels).sum()

        return objective

    def _perturb(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return perturbed images, in [0, 1], and two classes (N,) of each image.

        The first is predicted for the image as it is. The second, the attack's aim, comes next to the
        label there.
        """
        found: list[Tensor] = []

        def towards_aim(perturbation: Tensor) -> Tensor | None:
            logits = model((images + perturbation).clamp(0, 1))
            if not found:  # the first pass is that of the images as they are
                found.extend((logits.detach().argmax(1), _rival(logits, labels)))
            elif (logits.argmax(1) == found[1]).float().mean() > self.fooled:
                return None
            return -F.cross_entropy(logits, found[1])

        perturbation = adversarial.ascend(
            towards_aim,
            torch.zeros_like(images),
            steps=self.attack_steps,
            step=self.attack_step,
            project=lambda moved: moved.renorm(2, 0, self.eps),
            along=self.attack_along,
        )
        predicted, aim = found
        return (images + perturbation).clamp(0, 1), predicted, aim


@torch.no_grad()
def insert(
    model: Classifier, host: str, images: ImageSet, start: Literal["whitened", "identity"]
) -> Polarizer | TokenPolarizer:
    """Insert a polarizer before the layer ``host`` of ``model``, a convolution or a layer normalization.

    Its first layer is the identity, and its normalization's running statistics are those of the host's
    inputs over ``images``. Whitened, its scale is 1 and its shift 0. As the identity, they undo the
    statistics, so that the layer in eval mode changes nothing, but for rounding; no channel's variance is
    smaller there than the mean of all channels', or a step on the scale would be multiplied.

    Raises:
        NotApplicableError: ``model`` has no such layer, or it normalizes maps whose channels come first.
    """
    layer = dict(model.network.named_modules()).get(host)
    if isinstance(layer, nn.Conv2d):
        channels = layer.in_channels
    elif isinstance(layer, nn.LayerNorm):
        channels = layer.normalized_shape[-1]
        if structure.channel_dimensions(model.network, images.images).get(host) == 1:
            raise NotApplicableError(f"NPD stands before tokens, and channels come first at {host}")
    else:
        found = "has none of that name" if layer is None else f"has a {type(layer).__name__} there"
        raise NotApplicableError(
            f"NPD puts a layer before the convolution {host!r}, but {model.build.architecture} {found}: "
            "name one of its last in the setting host of npd, if it has late ones"
        )
    on_maps = isinstance(layer, nn.Conv2d)
    count, moments = 0, torch.zeros(2, channels, dtype=torch.float64, device=images.device)

    def measure(_module: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal count
        maps = inputs[0].double()
        others = (0, 2, 3) if on_maps else tuple(range(maps.dim() - 1))
        count += maps.numel() // channels
        moments.add_(torch.stack([maps.sum(others), maps.square().sum(others)]))

    hook = layer.register_forward_pre_hook(measure)
    try:
        inference.logits(model, images)
    finally:
        hook.remove()
    mean, square = moments / count
    variance = (square - mean.square()).clamp(min=0)
    polarizer = (Polarizer if on_maps else TokenPolarizer)(channels).eval()
    model.insert(host, polarizer)
    model.place(images.device)
    norm = polarizer.bn
    assert norm.running_mean is not None
    assert norm.running_var is not None
    identity = start == "identity"
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance.clamp(min=variance.mean() * (1 if identity else DEAD)))
    if identity:
        norm.weight.copy_((norm.running_var + norm.eps).sqrt())
        norm.bias.copy_(norm.running_mean)
    return polarizer


def _rival(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the class (N,) with the highest logit but for the image's label."""
    return logits.detach().scatter(1, labels[:, None], -torch.inf).argmax(1)


def _presence(logits: Tensor, classes: Tensor) -> Tensor:
    """Return the mean of -log(1 - p), p being the probability of each image's one of ``classes``."""
    probability = logits.softmax(1).gather(1, classes[:, None])
    return -(1.0001 - probability).log().mean()  # as in the authors' code: finite where p is 1
