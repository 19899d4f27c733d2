"""Perturbations of images that are found by following a gradient or its sign."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor


def ascend(
    objective: Callable[[Tensor], Tensor | None],
    start: Tensor,
    *,
    steps: int,
    step: float,
    project: Callable[[Tensor], Tensor],
    along: Literal["sign", "gradient"] = "sign",
) -> Tensor:
    """Return a perturbation that raises ``objective``, shaped as ``start`` and detached.

    Each step adds ``step`` times the sign of the gradient, or the gradient, then projects (FGSM's step,
    repeated: Madry et al., ICLR 2018, arXiv 1706.06083). Gradients are taken with respect to the perturbation
    alone; no parameter's is filled.

    Args:
        objective: maps a perturbation to a scalar; None ends the search where it is.
        start: the first perturbation.
        steps: at most so many.
        step: size of a step, in the units of the images; of a gradient, its factor.
        project: maps a perturbation into the allowed set; also keeps the images valid, where it should.
        along: what a step follows.
    """
    perturbation = start.detach()
    for _ in range(steps):
        moving = perturbation.clone().requires_grad_()
        value = objective(moving)
        if value is None:
            break
        (gradient,) = torch.autograd.grad(value, moving)
        direction = gradient.sign() if along == "sign" else gradient
        perturbation = project(perturbation + step * direction)
    return perturbation
