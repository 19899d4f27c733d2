"""NAD: Neural Attention Distillation, learn from a fine-tuned copy where to look.

Source: Li, Lyu, Koren, Lyu, Li, Ma, "Neural Attention Distillation: Erasing Backdoor Triggers from Deep
Neural Networks", ICLR 2021 (arXiv 2101.05930), with the attention maps of Zagoruyko, Komodakis,
ICLR 2017 (arXiv 1612.03928), and its authors' code, bboylyg/NAD. Epochs, rates and weights are those of the
survey's benchmark (arXiv 2411.11200), where the student's rate is constant and the teacher's falls by
2 % (here not at all).

The protocol ``paper`` has the settings of the authors' code, which trains teacher and student alike: a
tenth of the passes at 0.1 and the rest at 0.01, Nesterov, a black square in each image, which that code's
``Cutout(1, 3)`` makes 2×2 pixels large; and at least its steps on 5 % of CIFAR-10. It has their pull, too.
Their loss is a mean over the positions of a map, as the benchmark's is, so equal weights pull less the
larger the map. On their WideResNet's maps of 32×32, 16×16 and 8×8 the weights 500, 1000 and 1000 are 0.488,
3.906 and 15.625 of a sum over positions, which no size of map changes. The rate of 0.1 was set on that
network: where another diverges, the row says so.

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
import dataclasses
from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan import rng as streams
from detrojan.defenses.base import Defense
from detrojan.errors import NotApplicableError
from detrojan.images import Batch, DefenderSample, ImageSet, num_batches, passes, to_device
from detrojan.learning import inference, training
from detrojan.models import Classifier
from detrojan.models._parts import places
from detrojan.models._parts.places import Layout

PROBES = 16  # images that show whether a layer's maps differ from place to place


class NAD(Defense):
    """Fine-tune a copy, then fine-tune the model itself to look where the copy does."""

    smoke: ClassVar[dict[str, object]] = {"teacher_epochs": 1, "epochs": 1}

    layers: list[str] = Field(
        [],
        max_length=3,
        description="three modules of the network whose output maps are compared, shallow to deep; "
        "none: the ends of its last three stages",
    )
    positions: Literal["mean", "sum"] = Field(
        "mean", description="of the squared difference of two attentions, over the positions of a map"
    )
    beta1: float = Field(500, ge=0, description="weight of the first layer's attention loss")
    beta2: float = Field(1000, ge=0, description="weight of the second layer's")
    beta3: float = Field(1000, ge=0, description="weight of the third layer's")
    power: float = Field(2, ge=1, description="p of the attention map, the sum over channels of |map|^p")
    teacher_epochs: int = Field(10, ge=1, description="passes over the images that make the teacher")
    epochs: int = Field(10, ge=1, description="passes over the images that make the student")
    teacher_min_steps: int = Field(
        0, ge=0, description="fewest steps of the teacher; passes are added until they are taken; 0: none"
    )
    min_steps: int = Field(
        0, ge=0, description="fewest optimizer steps; passes are added until they are taken; 0: none"
    )
    batch_size: int = Field(256, ge=2, description="images a step")
    first_lr: float = Field(
        0.01, gt=0, description="learning rate of teacher and student, in their first passes"
    )
    first_share: float = Field(0, ge=0, le=1, description="share of all passes that are the first ones")
    lr: float = Field(0.01, gt=0, description="learning rate in the passes after these")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    nesterov: bool = Field(False, description="whether the momentum is Nesterov's")
    weight_decay: float = Field(5e-4, ge=0, description="on all parameters")
    hole: int = Field(
        0,
        ge=0,
        description="side of a black square somewhere in each image, pixels; 0: none",
    )

    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Return the student, a distilled copy of ``model`` that has learned from every image.

        Raises:
            NotApplicableError: a layer is missing, has no maps, or its maps are the same everywhere; or
                no layers are named, and the network has no three stages.
        """
        if len(self.layers) not in (0, 3):
            raise NotApplicableError(
                f"name three layers, or none to have them found: there are {len(self.layers)}"
            )
        images = clean.everything
        student = copy.deepcopy(model).eval()
        assert isinstance(student, Classifier)
        layers = self.layers or places.stages(student.network, images.images)
        layouts = places.layouts(student.network, images.images, layers)
        _check_maps(student, images, layers, layouts)
        clean.chosen["layers"] = layers
        if any(layout.channels == 2 for layout in layouts.values()):
            clean.chosen["adapted"] = True  # of tokens; the benchmark's code would compare nothing there
        teacher = copy.deepcopy(model)
        batches = num_batches(len(images), self.batch_size)
        epochs = passes(self.teacher_epochs, self.teacher_min_steps, batches)
        self._fit(teacher, images, epochs, training.cross_entropy, streams.child(rng, "teacher"))
        teacher.zero_grad()
        teacher.requires_grad_(False)
        with _recorded(teacher, layers) as taught, _recorded(student, layers) as seen:

            def distillation(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
                value, logits = training.cross_entropy(network, batch)
                with torch.no_grad():
                    teacher(batch.images)
                for layer, beta in zip(layers, (self.beta1, self.beta2, self.beta3), strict=True):
                    value = value + beta * attention_loss(
                        _maps(seen[layer], layouts.get(layer)),
                        _maps(taught[layer], layouts.get(layer)),
                        self.power,
                        self.positions,
                    )
                return value, logits

            epochs = passes(self.epochs, self.min_steps, batches)
            self._fit(student, images, epochs, distillation, streams.child(rng, "student"))
        return student

    def _fit(
        self, network: nn.Module, images: ImageSet, epochs: int, loss: training.Loss, rng: torch.Generator
    ) -> None:
        """Train ``network`` in place; teacher and student differ by their losses alone."""
        optimizer = torch.optim.SGD(
            network.parameters(),
            lr=self.first_lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )

        def objective(batch: Batch) -> tuple[Tensor, Tensor]:
            value, logits = loss(network, batch)
            return value, (logits.detach().argmax(1) == batch.labels).sum()

        training.descend(
            {"network": training.Part(network, optimizer, lambda epoch: self.lr_at(epoch, epochs))},
            images,
            objective,
            epochs=epochs,
            batch_size=self.batch_size,
            rng=rng,
            augmentation=images.info.augmentation,
            prepare=self._with_hole if self.hole else None,
            bfloat16=True,
        )

    def lr_at(self, epoch: int, epochs: int) -> float:
        """Return the learning rate of ``epoch``, the first being 0, of ``epochs``."""
        return self.first_lr if epoch < round(self.first_share * epochs) else self.lr

    def _with_hole(self, batch: Batch, rng: torch.Generator) -> Batch:
        return dataclasses.replace(batch, images=punched(batch.images, self.hole, rng))


def _check_maps(network: nn.Module, images: ImageSet, layers: list[str], layouts: dict[str, Layout]) -> None:
    """Raise unless each of ``layers`` has maps that differ from place to place.

    Else its attention is constant, its loss zero, and what is left would be plain fine-tuning.
    """
    with _recorded(network, layers) as seen:
        inference.logits(network, images[torch.arange(min(len(images), PROBES), device=images.device)])
    advice = "name others in NAD's setting 'layers'"
    for layer in layers:
        maps = _maps(seen[layer], layouts.get(layer)) if layer in seen else None
        if maps is None or maps.dim() != 4:
            found = "is never called" if maps is None else f"puts out shape {tuple(maps.shape)}"
            raise NotApplicableError(f"NAD compares maps (N, C, H, W), but layer {layer!r} {found}: {advice}")
        if (maps == maps[:, :, :1, :1]).all():
            size = f"{maps.shape[2]}×{maps.shape[3]}"
            raise NotApplicableError(
                f"NAD compares where maps are large, but those of layer {layer!r} ({size}) are the same "
                f"at every position, so its attention loss is zero whatever the weights: {advice}, with "
                "larger maps"
            )


def _maps(output: Tensor, layout: Layout | None) -> Tensor:
    """Return what a layer put out as maps (N, C, H, W), or as it is where its layout is not known."""
    return layout.maps(output) if layout else output


def punched(images: Tensor, side: int, rng: torch.Generator) -> Tensor:
    """Return ``images`` (N, C, H, W), each with a black square of ``side`` pixels of its own.

    Its centre is drawn from all pixels, and what leaves the image is cut off.
    """

    def within(length: int) -> Tensor:
        first = torch.randint(length, (len(images), 1), generator=rng) - side // 2
        offsets = torch.arange(length) - first
        return to_device((offsets >= 0) & (offsets < side), images.device)

    rows, columns = within(images.shape[2]), within(images.shape[3])
    return images * ~(rows[:, None, :, None] & columns[:, None, None, :])


def attention_loss(
    student: Tensor, teacher: Tensor, power: float, positions: Literal["mean", "sum"]
) -> Tensor:
    """Return how far apart two attentions are: their squared difference, a mean over the images.

    Zero for equal maps; maps of one position are always equal. Gradients reach both. As an attention has
    length 1 whatever its size, the sum over positions lies in [0, 2], and their mean falls with the
    number of positions: equal weights then pull less on larger maps.

    Args:
        student: maps (N, C, H, W).
        teacher: maps (N, C', H, W) of the same images.
        power: as in :func:`attention`.
        positions: whether the positions of a map are added up or averaged.
    """
    seen, taught = attention(student, power), attention(teacher, power)
    if positions == "sum":
        return F.mse_loss(seen, taught, reduction="sum") / len(seen)
    return F.mse_loss(seen, taught)


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
