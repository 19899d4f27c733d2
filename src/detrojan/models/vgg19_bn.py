"""VGG-19 with batch normalization.

Source: Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
ICLR 2015 (arXiv 1409.1556), configuration E, with batch normalization as in torchvision. Nothing is
adapted to small images: of a 32×32 image the last map is 1×1, which the average pool copies to 7×7
(139,622,218 parameters for 10 classes, 119.6 million of them in the head).
"""

from typing import ClassVar

from torch import nn

from detrojan.models._parts.torchvision import torchvision
from detrojan.models.base import Architecture


class Vgg19Bn(Architecture):
    """Settings of VGG-19-BN: none."""

    min_side: ClassVar[int] = 32  # five poolings halve it

    def network(self, num_classes: int) -> nn.Module:
        """Return a fresh VGG-19-BN in torchvision's initialization."""
        network: nn.Module = torchvision.models.vgg19_bn(weights=None, num_classes=num_classes)
        return network
