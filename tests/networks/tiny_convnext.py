"""A ConvNeXt of torchvision's, small."""

from pydantic import Field
from torch import nn

from detrojan.models._parts.torchvision import torchvision
from detrojan.models.base import Architecture


class TinyConvnext(Architecture):
    """Settings of it."""

    width: int = Field(8, ge=1, description="channels of the first stage")

    def network(self, num_classes: int) -> nn.Module:
        """Return a fresh one."""
        channels = [self.width * factor for factor in (1, 2, 3, 4)]
        blocks = [
            torchvision.models.convnext.CNBlockConfig(width, after, 1)
            for width, after in zip(channels, [*channels[1:], None], strict=True)
        ]
        return torchvision.models.ConvNeXt(blocks, num_classes=num_classes)
