"""What a model makes of a set of images: the one pass without gradients that stages and defenses share."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan.images import ImageSet, to_float

BATCH_SIZE = 512


@torch.inference_mode()
def logits(model: nn.Module, images: ImageSet) -> Tensor:
    """Return the logits of all ``images``, float32 (N, num_classes), on their device.

    The mode of ``model`` is the caller's: a defense may want batch statistics.
    """
    return torch.cat([model(to_float(batch)) for batch in torch.split(images.images, BATCH_SIZE)])


def num_right(model: nn.Module, images: ImageSet) -> int:
    """Return how many of ``images`` get their label; the mode is the caller's."""
    return int((logits(model, images).argmax(1) == images.labels).sum())


def evaluate(model: nn.Module, images: ImageSet) -> tuple[float, float]:
    """Return accuracy in [0, 1] and mean cross-entropy of ``images``; the mode is the caller's."""
    predicted = logits(model, images)
    right = (predicted.argmax(1) == images.labels).double().mean()
    return float(right), float(F.cross_entropy(predicted, images.labels))
