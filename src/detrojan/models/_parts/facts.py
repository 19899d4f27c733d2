"""What a network is, measured without its weights: parameters, normalizations, sides, multiplications."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from detrojan.errors import NotApplicableError
from detrojan.models._parts import places

SIDES = (16, 32, 64, 96, 128, 160, 192, 224, 256, 299, 384)  # pixels; what the catalogue tries
NORMS = {
    "batch": nn.modules.batchnorm._BatchNorm,
    "layer": nn.LayerNorm,
    "group": nn.GroupNorm,
    "instance": nn.modules.instancenorm._InstanceNorm,
}


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a network without memory or values, in eval mode, as quickly as its modules can be made.

    One that computes while it is made, a RegNet say, has both.
    """
    try:
        with torch.device("meta"):
            return make().eval()
    except (NotImplementedError, RuntimeError, ValueError):
        return make().eval()


def parameters(network: nn.Module) -> int:
    """Return how many trainable values a network has."""
    return sum(parameter.numel() for parameter in network.parameters())


def norms(network: nn.Module) -> list[str]:
    """Return the kinds of normalization in a network, sorted, those of ``NORMS``."""
    return sorted(
        kind
        for kind, found in NORMS.items()
        if any(isinstance(module, found) for module in network.modules())
    )


def logits(network: nn.Module, side: int, *, train: bool = False) -> Tensor:
    """Return the output of a network for two black images of a side, in eval mode or in training mode.

    Raises:
        ValueError: it is no float tensor (2, number of classes).
    """
    first = next(network.parameters())
    images = torch.zeros(2, 3, side, side, device=first.device)
    network.train(train)
    try:
        output = network(images)
    finally:
        network.eval()
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != 2:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        mode = "training" if train else "eval"
        raise ValueError(
            f"{type(network).__name__} should map images to logits (N, classes), but in {mode} mode it "
            f"puts out {found}: set its options, such as aux_logits: false"
        )
    return output


def check(network: nn.Module, side: int, num_classes: int) -> None:
    """Try a network on two black images of a side, in both modes; its running statistics move.

    Raises:
        ValueError: it does not take them, or puts out anything but logits (2, num_classes).
    """
    for train in (False, True):
        try:
            output = logits(network, side, train=train)
        except (RuntimeError, AssertionError, TypeError, IndexError) as error:
            raise ValueError(
                f"{type(network).__name__} does not take images of {side}×{side} pixels: {error}"
            ) from error
        if output.shape[1] != num_classes:
            raise ValueError(f"{type(network).__name__} puts out {output.shape[1]} logits, not {num_classes}")


def macs(network: nn.Module, side: int) -> int:
    """Return the multiplications of one image: those of convolutions, linear layers and attention."""
    with FlopCounterMode(display=False) as counter:
        logits(network, side)
    return int(counter.get_total_flops()) // 4  # two operations a multiplication, two images


def sides(network: nn.Module) -> list[int]:
    """Return those of ``SIDES`` that a network takes."""
    return [side for side in SIDES if _takes(network, side)]


def _takes(network: nn.Module, side: int) -> bool:
    try:
        logits(network, side)
    except (RuntimeError, AssertionError, ValueError):
        return False  # what a network says of a wrong size differs from one to the next
    return True


def head(network: nn.Module, side: int) -> list[str]:
    """Return the linear layers between flat features and logits, or nothing if nobody can tell."""
    try:
        return places.head(network, torch.empty(1, 3, side, side)).layers
    except NotApplicableError:
        return []


def entry(network: nn.Module, num_classes: int) -> dict[str, Any]:
    """Return what the catalogue says of a network on the meta device, but for its library's mean and std."""
    taken = sides(network)
    found: dict[str, Any] = {"parameters": parameters(network), "classes": num_classes, "min_side": taken[0]}
    if len(taken) == 1:
        found["fixed_side"] = taken[0]
    return found | {"norms": norms(network), "logits": head(network, taken[0])}
