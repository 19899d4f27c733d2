"""What a model makes of a set of images: the one pass without gradients that stages and defenses share."""

import torch
from torch import Tensor, nn

from detrojan import data
from detrojan.data import ImageSet

BATCH_SIZE = 512


@torch.inference_mode()
def logits(model: nn.Module, images: ImageSet) -> Tensor:
    """Return the logits of all ``images``, float32 (N, num_classes), on their device.

    The mode of ``model`` is the caller's: a defense may want batch statistics.
    """
    return torch.cat([model(data.to_float(batch)) for batch in torch.split(images.images, BATCH_SIZE)])
