"""CLP: channel Lipschitzness pruning, from the weights alone.

Source: Zheng, Tang, Li, Liu, "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022
(arXiv 2208.03111); u = 3 however many classes there are, as the survey (arXiv 2411.11200) runs it (the
paper takes 5 with 200). As in its code, a batch normalization belongs to the convolution
registered before it; in a pre-activation network, whose norms see residual sums, that is no strict
bound. Departures: the norm's own epsilon is added to the running variance, and bounds that are still
not finite don't count, so dead channels (VGG) no longer break a layer; singular values come from one
batched eigenvalue problem a layer in float64, not from one SVD a channel.
"""

import copy
from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from detrojan.defenses._parts.choices import outliers
from detrojan.defenses.base import Defense
from detrojan.errors import NotApplicableError
from detrojan.images import DefenderSample


class CLP(Defense):
    """Prune the channels whose Lipschitz bound lies ``u`` standard deviations above their layer's mean."""

    smoke: ClassVar[dict[str, object]] = {}

    u: float = Field(3, gt=0, description="threshold above the mean, standard deviations of the layer")

    @torch.no_grad()
    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Return a pruned copy of ``model``: a pruned channel's normalization has zero scale and shift."""
        repaired = copy.deepcopy(model).eval()
        pruned = {}
        pairs = list(_pairs(repaired))
        if not pairs:
            raise NotApplicableError("CLP needs batch normalization behind convolutions; this model has none")
        for name, convolution, norm in pairs:
            above = outliers(channel_bounds(convolution, norm), self.u)
            norm.weight[above] = 0
            norm.bias[above] = 0
            if above.any():
                pruned[name] = above.nonzero()[:, 0].tolist()
        clean.chosen["num_pruned"] = sum(map(len, pruned.values()))
        clean.chosen["pruned"] = [f"{name}:{channel}" for name, some in pruned.items() for channel in some]
        return repaired


def channel_bounds(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """Return an upper bound of each output channel's Lipschitz constant, float64 (C,).

    The largest singular value of the channel's kernel, as a matrix (C_in / groups, kh kw), times the
    normalization's gain (paper, Eq. 5 and 9).
    """
    kernels = convolution.weight.double().flatten(2)  # (C, C_in / groups, kh kw)
    if kernels.shape[1] < kernels.shape[2]:
        kernels = kernels.transpose(1, 2)
    gram = kernels.transpose(1, 2) @ kernels  # on the smaller side: at most 9×9 for 3×3 kernels
    singular: Tensor = torch.linalg.eigvalsh(gram)[:, -1].clamp(min=0).sqrt()
    assert norm.running_var is not None
    gain = norm.weight.double().abs() / (norm.running_var.double() + norm.eps).sqrt()
    return singular * gain


def _pairs(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d, nn.BatchNorm2d]]:
    """Yield each batch normalization with the convolution registered last before it."""
    convolution: nn.Conv2d | None = None
    for name, module in getattr(model, "network", model).named_modules():
        if isinstance(module, nn.Conv2d):
            convolution = module
        elif isinstance(module, nn.BatchNorm2d) and module.affine and module.running_var is not None:
            assert convolution is None or convolution.out_channels == module.num_features, name
            if convolution is not None:
                yield name, convolution, module
