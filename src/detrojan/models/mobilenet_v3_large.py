"""MobileNetV3-Large.

Source: Howard et al., "Searching for MobileNetV3", ICCV 2019 (arXiv 1905.02244), as in torchvision,
with dropout 0.2. Its batch normalization has epsilon 1e-3 and momentum 0.01, not PyTorch's 1e-5 and
0.1: running statistics follow slowly. Nothing is adapted to small images: of a 32×32 image the last
map is 1×1 (4,214,842 parameters for 10 classes).
"""

from torch import nn

from detrojan.models._parts.torchvision import torchvision
from detrojan.models.base import Architecture


class MobileNetV3Large(Architecture):
    """Settings of MobileNetV3-Large: none."""

    def network(self, num_classes: int) -> nn.Module:
        """Return a fresh MobileNetV3-Large in torchvision's initialization."""
        network: nn.Module = torchvision.models.mobilenet_v3_large(weights=None, num_classes=num_classes)
        return network
