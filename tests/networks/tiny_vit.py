"""A vision transformer of torchvision's, small: 4,000 parameters and some."""

from typing import ClassVar

from pydantic import Field
from torch import nn

from detrojan.models._parts.torchvision import torchvision
from detrojan.models.base import Architecture


class TinyVit(Architecture):
    """Settings of it."""

    min_side: ClassVar[int] = 16

    side: int = Field(32, ge=16, description="of images, pixels")
    blocks: int = Field(3, ge=1, description="encoder blocks")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability")

    def network(self, num_classes: int) -> nn.Module:
        """Return a fresh one; its head is drawn as well, where torchvision's starts at zero."""
        network: nn.Module = torchvision.models.VisionTransformer(
            self.side, 8, self.blocks, 2, 16, 32, dropout=self.dropout, num_classes=num_classes
        )
        network.heads.head.reset_parameters()
        return network
