"""NAD: Neural Attention Distillation, learn from a fine-tuned copy where to look.

Source: Li, Lyu, Koren, Lyu, Li, Ma, "Neural Attention Distillation: Erasing Backdoor Triggers from Deep
Neural Networks", ICLR 2021 (arXiv 2101.05930), with the attention maps of Zagoruyko, Komodakis,
ICLR 2017 (arXiv 1612.03928). Epochs, rates and weights are those of the survey's benchmark
(arXiv 2411.11200), where the student's rate is constant and the teacher's falls by 2 % (here not at
all); the paper's student starts at 0.1.

Departures from that benchmark. It attends to pooled maps too. These are 1×1, or copies of a 1×1 map, and
then the attention loss is zero whatever the weights: on VGG, EfficientNet and MobileNet at 32×32 pixels
it so measures ten epochs of fine-tuning. Here the layers of each architecture have maps of 2×2 or more,
and a map without positions to compare is refused. It also runs the student several times a batch, once
a map, which moves the running statistics several times; here one pass yields all maps. So where an epoch is
one step, the statistics that are left from before keep a weight of 0.9^10, a third, while the attention loss
moves the weights fast: the repaired model may lose accuracy by that alone (docs/defenses.md has numbers).
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan import rng as streams
from detrojan.defenses.base import Defense
from detrojan.errors import NotApplicableError
from detrojan.images import Batch, DefenderSample, ImageSet
from detrojan.learning import inference, training
from detrojan.settings import Optimization

PROBES = 16  # images that show whether a layer's maps differ from place to place


class NAD(Defense):
    """Fine-tune a copy, then fine-tune the model itself to look where the copy does."""

    smoke: ClassVar[dict[str, object]] = {"teacher_epochs": 1, "epochs": 1}

    layers: list[str] = Field(
        ["layer2", "layer3", "layer4"],
        min_length=3,
        max_length=3,
        description="modules of the network whose output maps are compared, shallow to deep",
    )
    beta1: float = Field(500, ge=0, description="weight of the first layer's attention loss")
    beta2: float = Field(1000, ge=0, description="weight of the second layer's")
    beta3: float = Field(1000, ge=0, description="weight of the third layer's")
    power: float = Field(2, ge=1, description="p of the attention map, the sum over channels of |map|^p")
    teacher_epochs: int = Field(10, ge=1, description="passes over the images that make the teacher")
    epochs: int = Field(10, ge=1, description="passes over the images that make the student")
    batch_size: int = Field(256, ge=2, description="images a step")
    lr: float = Field(0.01, gt=0, description="learning rate of teacher and student, constant")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD, without Nesterov")
    weight_decay: float = Field(5e-4, ge=0, description="on all parameters")

    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Return the student, a distilled copy of ``model`` that has learned from every image.

        Raises:
            NotApplicableError: a layer is missing, has no maps, or its maps are the same everywhere.
        """
        images = clean.everything
        student = copy.deepcopy(model).eval()
        self._check_maps(student, images)
        teacher = copy.deepcopy(model)
        self._fit(teacher, images, self.teacher_epochs, training.cross_entropy, streams.child(rng, "teacher"))
        teacher.zero_grad()
        teacher.requires_grad_(False)
        with _recorded(teacher, self.layers) as taught, _recorded(student, self.layers) as seen:

            def distillation(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
                value, logits = training.cross_entropy(network, batch)
                with torch.no_grad():
                    teacher(batch.images)
                for layer, beta in zip(self.layers, (self.beta1, self.beta2, self.beta3), strict=True):
                    value = value + beta * attention_loss(seen[layer], taught[layer], self.power)
                return value, logits

            self._fit(student, images, self.epochs, distillation, streams.child(rng, "student"))
        return student

    def _fit(
        self, network: nn.Module, images: ImageSet, epochs: int, loss: training.Loss, rng: torch.Generator
    ) -> None:
        """Train ``network`` in place; teacher and student differ by their losses alone."""
        optimization = Optimization(
            epochs=epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule="constant",
        )
        augmentation = images.info.augmentation
        training.fit(network, images, optimization, rng=rng, augmentation=augmentation, loss=loss)

    def _check_maps(self, network: nn.Module, images: ImageSet) -> None:
        """Raise unless every layer has maps that differ from place to place.

        Else its attention is constant, its loss zero, and what is left would be plain fine-tuning.
        """
        with _recorded(network, self.layers) as seen:
            inference.logits(network, images[torch.arange(min(len(images), PROBES), device=images.device)])
        advice = "name others in NAD's setting 'layers'"
        for layer in self.layers:
            maps = seen.get(layer)
            if maps is None or maps.dim() != 4:
                found = "is never called" if maps is None else f"puts out shape {tuple(maps.shape)}"
                raise NotApplicableError(
                    f"NAD compares maps (N, C, H, W), but layer {layer!r} {found}: {advice}"
                )
            if (maps == maps[:, :, :1, :1]).all():
                size = f"{maps.shape[2]}×{maps.shape[3]}"
                raise NotApplicableError(
                    f"NAD compares where maps are large, but those of layer {layer!r} ({size}) are the same "
                    f"at every position, so its attention loss is zero whatever the weights: {advice}, with "
                    "larger maps"
                )


def attention_loss(student: Tensor, teacher: Tensor, power: float) -> Tensor:
    """Return how far apart two attentions are: their mean squared difference over images and positions.

    Zero for equal maps; maps of one position are always equal. Gradients reach both.

    Args:
        student: maps (N, C, H, W).
        teacher: maps (N, C', H, W) of the same images.
        power: as in :func:`attention`.
    """
    return F.mse_loss(attention(student, power), attention(teacher, power))


def attention(maps: Tensor, power: float) -> Tensor:
    """Return where ``maps`` (N, C, H, W) are large: (N, H*W), of length 1 for each image.

    The sum over channels of |map|^power, divided by its norm over all positions; to scale the maps
    changes nothing.
    """
    total = maps.float().abs().pow(power).sum(1).flatten(1)
    norm: Tensor = torch.linalg.vector_norm(total, dim=1, keepdim=True)
    return total / (norm + 1e-6)


@contextlib.contextmanager
def _recorded(model: nn.Module, layers: list[str]) -> Iterator[dict[str, Tensor]]:
    """Yield a record of what ``layers`` of the network put out in the latest pass, by name.

    Raises:
        NotApplicableError: the network has no module of such a name.
    """
    network = getattr(model, "network", model)
    modules = dict(network.named_modules())
    outputs: dict[str, Tensor] = {}
    if missing := [layer for layer in layers if layer not in modules]:
        raise NotApplicableError(
            f"the network has no layer {', '.join(missing)}: name others in NAD's setting 'layers'; it has "
            f"{', '.join(name for name, _ in network.named_children())}"
        )

    def keeper(layer: str) -> Callable[[nn.Module, object, Tensor], None]:
        def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            outputs[layer] = output

        return keep

    handles = [modules[layer].register_forward_hook(keeper(layer)) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
