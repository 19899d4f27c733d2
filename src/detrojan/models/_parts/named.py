"""Networks that a study names: of torchvision, of timm, or of a file of one's own.

An entry of the study's section ``architectures`` with a field ``network`` is one. Nothing is ever
downloaded: weights come from the random stream, or from a file that the study names.
"""

import functools
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan import registry


class NamedNetwork(BaseModel):
    """Settings of a network that a study names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: str = Field(
        description="torchvision:NAME, timm:NAME, or the path of a file with one subclass of Architecture"
    )
    options: dict[str, bool | int | float | str | list[int] | list[float] | list[str]] = Field(
        {}, description="handed to what makes the network, such as img_size, patch_size or drop_rate"
    )
    resize: int | None = Field(
        None,
        ge=16,
        le=1024,
        description="side to which the classifier enlarges its images, pixels; triggers and perturbations "
        "stay at the data set's side; none: as they are",
    )
    pretrained: str | None = Field(
        None, description="safetensors file of the weights to start from; none: they are drawn"
    )
    mean: tuple[float, float, float] | None = Field(
        None, description="of red, green, blue in [0, 1], in place of the data set's; with std"
    )
    std: tuple[float, float, float] | None = Field(None, description="likewise")

    def build(self, num_classes: int) -> nn.Module:
        """Return a fresh network from normalized images (N, 3, H, W) to logits (N, num_classes).

        Its tensors have the names that its library gives them, with ``resize`` too.

        Raises:
            ValueError: there is no such network, or it has no such option.
            ImportError: timm is not installed.
        """
        network = self._fresh(num_classes)
        if self.resize is not None:
            network.register_forward_pre_hook(functools.partial(_enlarge, self.resize))
        return network

    def _fresh(self, num_classes: int) -> nn.Module:
        source, _, name = self.network.rpartition(":")
        if not source:
            own: nn.Module = registry.load("models", self.network, self.options).network(num_classes)
            return own
        try:
            return _MAKERS[source](name, num_classes, self.options)
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            # A library says no to names and options in errors of all kinds.
            raise ValueError(f"{self.network} can't be made with options {self.options}: {error}") from error


def _torchvision(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    from detrojan.models._parts.torchvision import torchvision

    network: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    return network


def _timm(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    # It imports torchvision, which has to come from here.
    from detrojan.models._parts import torchvision  # noqa: F401

    try:
        import timm
    except ImportError as error:
        raise ImportError(f"timm:{name}: {registry.NO_TIMM}") from error

    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, **options)
    return network


_MAKERS = {"torchvision": _torchvision, "timm": _timm}


def _enlarge(side: int, _network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return a network's inputs with images (N, 3, side, side): bilinear, gradients pass through.

    A hook of this module, so copying a network copies it whole, and no tensor's name changes.
    """
    images = F.interpolate(inputs[0], size=(side, side), mode="bilinear", align_corners=False)
    return (images, *inputs[1:])
