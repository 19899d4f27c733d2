"""What keeps the contract tests quick: networks with few channels, which are wired as the real ones."""

import functools
import itertools

import pytest
import torch
from torch import nn

from detrojan import registry
from detrojan.models._parts.torchvision import torchvision

# A block of the real one has 64, 128, 256, 512 or 512 channels. The last stays: the head counts on it.
NARROW = [
    *(8, 8, "M"),
    *(16, 16, "M"),
    *(32, 32, 32, 32, "M"),
    *(64, 64, 64, 64, "M"),
    *(64, 64, 64, 512, "M"),
]
HIDDEN = 64  # features between the layers of the head, where the real one has 4,096


def narrow_settings(architecture, width=4):
    """Return settings of an architecture that make it quick: few channels in its first stage, if it says."""
    has_width = "width" in registry.declared("models", architecture).settings.model_fields
    return {"width": width} if has_width else {}


def narrow(real, *, num_classes, **settings):
    """Return torchvision's VGG-19-BN with 2 million weights where it has 140; training that takes seconds."""
    with torch.device("meta"):
        network = real(num_classes=num_classes, **settings)
        sizes = [network.classifier[0].in_features, HIDDEN, HIDDEN, num_classes]
        linear = [at for at, layer in enumerate(network.classifier) if isinstance(layer, nn.Linear)]
        for at, (inputs, outputs) in zip(linear, itertools.pairwise(sizes), strict=True):
            network.classifier[at] = nn.Linear(inputs, outputs)
    network.to_empty(device="cpu")
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return network


@pytest.fixture(scope="module", autouse=True)
def _narrow_vgg():
    # No longer than a module: tests of the real network may follow in the same process.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(torchvision.models.vgg.cfgs, "E", NARROW)
        patch.setattr(torchvision.models, "vgg19_bn", functools.partial(narrow, torchvision.models.vgg19_bn))
        yield
