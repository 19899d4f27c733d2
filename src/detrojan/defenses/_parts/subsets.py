"""Part of a sample, in which all classes have their share."""

import torch
from torch import Tensor

from detrojan.images import to_device


def stratified(labels: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Return ``count`` rows, on the device of ``labels``, drawn at random from all classes in proportion.

    With fewer rows than classes, it is random which classes get one.
    """
    order = torch.randperm(len(labels), generator=rng)
    shuffled = labels.cpu()[order]
    sizes = torch.bincount(shuffled)
    # Each row's place within its class, first come first, as a share of the class: 0, 1/n, 2/n, ...
    by_class = shuffled.argsort(stable=True)
    starts = (sizes.cumsum(0) - sizes)[shuffled[by_class]]
    share = torch.empty(len(labels))
    share[by_class] = (torch.arange(len(labels)) - starts) / sizes[shuffled[by_class]]
    return to_device(order[share.argsort(stable=True)[:count]], labels.device)
