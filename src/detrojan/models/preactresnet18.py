"""PreAct-ResNet-18 for small images.

Source: He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks", ECCV 2016
(arXiv 1603.05027), in the shape that backdoor benchmarks use on 32×32 images: a 3×3 stem without
pooling, the shortcut convolution applied to the activated input, and neither batch normalization
nor ReLU after the last block (11,171,146 parameters for 10 classes).
"""

from pydantic import Field
from torch import Tensor, nn

from detrojan.models.base import Architecture


class PreActBlock(nn.Module):
    """Two 3×3 convolutions, each behind batch normalization and ReLU, and a shortcut around them."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        # Modules of their own, so that a defense can put a layer behind one of them.
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        # Registered last: methods that pair each norm with the convolution before it rely on that.
        self.shortcut = (
            nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            if stride != 1 or channels_in != channels
            else None
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the block's maps, (N, channels, H / stride, W / stride)."""
        active = self.relu1(self.bn1(inputs))
        shortcut = inputs if self.shortcut is None else self.shortcut(active)
        result: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(active)))) + shortcut
        return result


class PreActResNet(nn.Module):
    """Stem, four stages of two blocks, global average, linear layer."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(PreActBlock(width, width, 1), PreActBlock(width, width, 1))
        self.layer2 = self._stage(width, 2 * width)
        self.layer3 = self._stage(2 * width, 4 * width)
        self.layer4 = self._stage(4 * width, 8 * width)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(8 * width, num_classes)

    @staticmethod
    def _stage(channels_in: int, channels: int) -> nn.Sequential:
        return nn.Sequential(PreActBlock(channels_in, channels, 2), PreActBlock(channels, channels, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, num_classes) of normalized images (N, 3, H, W)."""
        maps = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(images)))))
        logits: Tensor = self.linear(self.avgpool(maps).flatten(1))
        return logits


class PreActResNet18(Architecture):
    """Settings of PreAct-ResNet-18."""

    width: int = Field(64, ge=1, le=512, description="channels of the first stage; 64 is the standard")

    def network(self, num_classes: int) -> nn.Module:
        """Return a fresh PreAct-ResNet-18 in PyTorch's default initialization."""
        return PreActResNet(num_classes, self.width)
