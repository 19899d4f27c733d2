"""The classifier that every stage handles: raw images in, logits out, normalization inside."""

import dataclasses
from collections.abc import Mapping

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from detrojan import registry


class Architecture(BaseModel):
    """Base of the architectures; a subclass's fields are what a study may set of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def network(self, num_classes: int) -> nn.Module:
        """Return a fresh network from normalized images (N, 3, H, W) to logits (N, num_classes).

        Its last child maps flat features to logits: methods that read features hook that child.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Build:
    """All that is needed to build a classifier again, but for its weights.

    Attributes:
        architecture: the file's name in ``models/``.
        settings: that architecture's fields that differ from their defaults.
        num_classes: the length of a row of logits.
        mean, std: per channel (RGB), of pixels in [0, 1].
    """

    architecture: str
    settings: dict[str, object]
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Classifier(nn.Module):
    """A network behind its normalization.

    Maps float images (N, 3, H, W) in [0, 1] to logits (N, num_classes). Mean and standard deviation
    belong to ``build`` and not to the weights, so ``network.state_dict()`` has the architecture's
    published names and nothing else.
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
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits

    @property
    def head(self) -> nn.Module:
        """The last child: flat features (N, D) to logits. Hook it to read the features."""
        return list(self.network.children())[-1]


def build(spec: Build) -> Classifier:
    """Return a classifier on the CPU, in eval mode and channels_last; weights from torch's global stream."""
    return _finished(_network(spec), spec)


def restore(spec: Build, weights: Mapping[str, Tensor]) -> Classifier:
    """Return a classifier as :func:`build` does, with ``weights`` for its network's state.

    Raises:
        ValueError: the names or shapes of ``weights`` are not those of the architecture.
    """
    # Without storage: initializing VGG takes seconds, and would move torch's global stream.
    with torch.device("meta"):
        network = _network(spec)
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if expected != found:
        name = min(set(expected.items()) ^ set(found.items()))[0]
        raise ValueError(
            f"no {spec.architecture} of its settings: tensor {name} is {found.get(name, 'missing')} in the "
            f"file and {expected.get(name, 'absent')} in the architecture"
        )
    network.load_state_dict(weights, assign=True)
    return _finished(network, spec)


def _network(spec: Build) -> nn.Module:
    architecture: Architecture = registry.load("models", spec.architecture, spec.settings)
    return architecture.network(spec.num_classes)


def _finished(network: nn.Module, spec: Build) -> Classifier:
    # torch's stub lacks this overload.
    classifier = Classifier(network, spec)
    classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return classifier.eval()
