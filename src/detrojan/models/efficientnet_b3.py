"""EfficientNet-B3.

Source: Tan, Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019
(arXiv 1905.11946), as in torchvision, with dropout 0.3 and stochastic depth up to 0.2. Nothing is
adapted to small images: of a 32×32 image the last map is 1×1 (10,711,602 parameters for 10 classes).
"""

from torch import nn

from detrojan.models._parts.torchvision import torchvision
from detrojan.models.base import Architecture


class EfficientNetB3(Architecture):
    """Settings of EfficientNet-B3: none."""

    def network(self, num_classes: int) -> nn.Module:
        """Return a fresh EfficientNet-B3 in torchvision's initialization."""
        network: nn.Module = torchvision.models.efficientnet_b3(weights=None, num_classes=num_classes)
        return network
