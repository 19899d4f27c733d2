"""The classifier that every stage handles: raw images in, logits out, normalization inside."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from detrojan import registry
from detrojan.models._parts import insertions, pretrained
from detrojan.models._parts.insertions import Insertion
from detrojan.models._parts.named import NamedNetwork


class Architecture(BaseModel):
    """Base of the architectures; a subclass's fields are what a study may set of it.

    Class variables:
        min_side: of the images that it can take, pixels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_side: ClassVar[int] = 1

    def network(self, num_classes: int) -> nn.Module:
        """Return a fresh network from normalized images (N, 3, H, W) to logits (N, num_classes)."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Build:
    """All that is needed to build a classifier again, but for its weights.

    Attributes:
        architecture: the file's name in ``models/``, or the name that a study gives to a network of others.
        settings: that architecture's fields that differ from their defaults; a network of others has
            the field ``network`` among them.
        num_classes: the length of a row of logits.
        mean, std: per channel (RGB), of pixels in [0, 1].
        inserted: the kind of each layer that a defense has added, by the name of its host.
    """

    architecture: str
    settings: dict[str, Any]
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    inserted: dict[str, str] = dataclasses.field(default_factory=dict)


class Classifier(nn.Module):
    """A network behind its normalization.

    Maps float images (N, 3, H, W) in [0, 1] to logits (N, num_classes). Mean and standard deviation
    belong to ``build`` and not to the weights, so ``network.state_dict()`` has the architecture's
    published names, those of inserted layers, and nothing else.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, build: Build) -> None:
        super().__init__()
        self.network = network
        self.build = build
        self.register_buffer("mean", torch.tensor(build.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(build.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, num_classes) of float images (N, 3, H, W) in [0, 1]."""
        normalized = (images - self.mean) / self.std
        logits: Tensor = self.network(normalized.contiguous(memory_format=memory_format(images.device)))
        return logits

    def place(self, device: torch.device) -> "Classifier":
        """Move the classifier to ``device``, in the memory order that is right there, and return it."""
        self.to(device)
        self.to(memory_format=memory_format(device))  # type: ignore[call-overload]  # missing in torch's stub
        return self

    def insert(self, host: str, layer: Insertion) -> None:
        """Add ``layer`` beside the network's module ``host``, for good: it is copied and saved with it.

        Raises:
            ValueError: there is no such module, or the layer doesn't fit there.
        """
        insertions.attach(self.network, host, layer)
        inserted = self.build.inserted | {host: layer.kind}
        self.build = dataclasses.replace(self.build, inserted=inserted)


def memory_format(device: torch.device) -> torch.memory_format:
    """Return how images and kernels should lie in memory: channels_last on a GPU, else channels first.

    On a CPU, torch 2.13 writes past its buffers in the backward pass of a channels_last 1×1
    convolution of stride 2 with few channels: at 64×64 pixels and 4 channels it crashed at once.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def build(spec: Build) -> Classifier:
    """Return a classifier on the CPU, in eval mode; its weights come from torch's global stream.

    A fresh one: layers that a defense inserts have sizes and values of their own, see :func:`restore`.
    """
    assert not spec.inserted, "only its weights tell how large an inserted layer is: restore it with them"
    network = _network(spec)
    if spec.settings.get("pretrained"):
        pretrained.load(network, str(spec.settings["pretrained"]), spec.num_classes)
    return Classifier(network, spec).eval()


def restore(spec: Build, weights: Mapping[str, Tensor]) -> Classifier:
    """Return a classifier as :func:`build` does, with ``weights`` for its network's state.

    Raises:
        ValueError: the names or shapes of ``weights`` are not those of the architecture and of the
            layers inserted in it.
    """
    if registry.NETWORK in spec.settings:
        # Others keep tables beside the weights, which are computed while a network is made.
        with torch.random.fork_rng(devices=[]):
            network = _network(spec)
    else:
        # Without storage: initializing VGG takes seconds, and would move torch's global stream.
        with torch.device("meta"):
            network = _network(spec)
    with torch.device("meta"):
        insertions.rebuild(network, spec.inserted, weights)
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if expected != found:
        name = min(set(expected.items()) ^ set(found.items()))[0]
        raise ValueError(
            f"no {spec.architecture} of its settings: tensor {name} is {found.get(name, 'missing')} in the "
            f"file and {expected.get(name, 'absent')} in the architecture"
        )
    network.load_state_dict(weights, assign=True)
    return Classifier(network, spec).eval()


def _network(spec: Build) -> nn.Module:
    if registry.NETWORK in spec.settings:
        return NamedNetwork(**spec.settings).build(spec.num_classes)
    architecture: Architecture = registry.load("models", spec.architecture, spec.settings)
    return architecture.network(spec.num_classes)
