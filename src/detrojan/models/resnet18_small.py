"""ResNet-18 for small images.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016 (arXiv 1512.03385),
Table 1, in the shape that BackdoorBox, backdoor-toolbox and the repositories of most methods use on 32×32
images: a 3×3 stem of stride 1 and no pooling behind it, so that the last maps are 4×4 and not 1×1
(11,173,962 parameters for 10 classes). Tensors have the names that those repositories give them.
"""

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan.models.base import Architecture


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch normalization, a shortcut around them, ReLU behind the sum."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the block's maps, (N, channels, H / stride, W / stride)."""
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(inputs)))))
        return F.relu(inner + self.shortcut(inputs))


class ResNet(nn.Module):
    """Stem, four stages of two blocks, global average, linear layer."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, 1)
        self.layer2 = self._stage(width, 2 * width, 2)
        self.layer3 = self._stage(2 * width, 4 * width, 2)
        self.layer4 = self._stage(4 * width, 8 * width, 2)
        self.linear = nn.Linear(8 * width, num_classes)

    @staticmethod
    def _stage(channels_in: int, channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(BasicBlock(channels_in, channels, stride), BasicBlock(channels, channels, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, num_classes) of normalized images (N, 3, H, W)."""
        maps = F.relu(self.bn1(self.conv1(images)))
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(maps, 1).flatten(1))
        return logits


class ResNet18Small(Architecture):
    """Settings of ResNet-18 for small images."""

    width: int = Field(64, ge=1, le=512, description="channels of the first stage; 64 is the standard")

    def network(self, num_classes: int) -> nn.Module:
        """Return a fresh ResNet-18 in PyTorch's default initialization."""
        return ResNet(num_classes, self.width)
