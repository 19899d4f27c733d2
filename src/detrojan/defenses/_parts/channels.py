"""The channels that normalizations scale: gated while a method learns, pruned when it has chosen."""

import copy
from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from detrojan.errors import NotApplicableError
from detrojan.images import ImageSet
from detrojan.learning import inference
from detrojan.learning.meter import count_step


class Channels:
    """The channels of all normalizations of a model, side by side in one vector.

    Of its batch normalizations; where it has none, as transformers, of its layer and group
    normalizations. They stand in the order of registration, layer by layer.

    Attributes:
        names: of the layers, as ``named_modules()`` of the network has them.
        norms: the layers.
        sizes: how many channels each has.
        kind: ``batch`` or ``layer``.

    Raises:
        NotApplicableError: the model has no normalization with a scale of each channel, or with
            ``statistics`` no batch normalization with running statistics besides.
    """

    def __init__(self, model: nn.Module, *, statistics: bool = False) -> None:
        network = getattr(model, "network", model)
        found = {
            name: module
            for name, module in network.named_modules()
            if isinstance(module, nn.BatchNorm2d) and module.affine and module.running_var is not None
        }
        self.kind = "batch" if found else "layer"
        if not found and not statistics:
            found = {name: module for name, module in network.named_modules() if _scales_channels(module)}
        if not found:
            instead = "" if statistics else ", or on layer normalization in its place"
            raise NotApplicableError(f"the method works on batch normalization{instead}; this model has none")
        self.names = list(found)
        self.norms = list(found.values())
        self.sizes = [len(norm.weight) for norm in self.norms]
        paths = {id(module): name for name, module in model.named_modules()}
        self._paths = [paths[id(norm)] for norm in self.norms]

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def adapted(self) -> dict[str, object]:
        """What to note of a method that no paper or code has on layer normalization, where it is on such."""
        return {"adapted": True} if self.kind == "layer" else {}

    def logits(self, model: nn.Module, images: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        """Return what ``model`` makes of ``images`` with its channels gated; gradients reach the gates.

        Args:
            model: of the structure that this was made from, a copy of it for example, in any mode: in
                training mode its running statistics follow the batch.
            images: float (N, 3, H, W) in [0, 1].
            scale: multiplies each channel's scale, (channels,).
            shift: multiplies each channel's shift, likewise; None leaves the shifts alone.
        """
        gated: dict[str, Tensor] = {}
        parts = torch.split(shift, self.sizes) if shift is not None else [None] * len(self.sizes)
        for path, gate, tilt in zip(self._paths, torch.split(scale, self.sizes), parts, strict=True):
            norm = cast("nn.BatchNorm2d", model.get_submodule(path))
            gated[f"{path}.weight"] = norm.weight * gate
            if tilt is not None and norm.bias is not None:
                gated[f"{path}.bias"] = norm.bias * tilt
        logits: Tensor = functional_call(model, gated, (images,))
        return logits

    @torch.no_grad()
    def multiply(self, scale: Tensor) -> None:
        """Multiply each channel's scale in place by ``scale``, (channels,)."""
        for norm, gate in zip(self.norms, torch.split(scale, self.sizes), strict=True):
            norm.weight.mul_(gate)

    @torch.no_grad()
    def prune(self, pruned: Tensor, *, shift: bool) -> None:
        """Set the scale of the channels where ``pruned``, bool (channels,), to zero; with ``shift`` that too.

        With its shift left, a channel puts out a constant; without, nothing.
        """
        for norm, gone in zip(self.norms, torch.split(pruned, self.sizes), strict=True):
            norm.weight[gone] = 0
            if shift and norm.bias is not None:
                norm.bias[gone] = 0

    def named(self, chosen: Tensor) -> list[str]:
        """Return the channels where ``chosen``, bool (channels,), as ``layer:channel``."""
        return [
            f"{name}:{channel}"
            for name, part in zip(self.names, torch.split(chosen, self.sizes), strict=True)
            for channel in part.nonzero()[:, 0].tolist()
        ]


def _scales_channels(module: nn.Module) -> bool:
    """Return whether ``module`` is a layer or group normalization with a scale of each channel."""
    if isinstance(module, nn.LayerNorm):
        return module.elementwise_affine and len(module.normalized_shape) == 1
    return isinstance(module, nn.GroupNorm) and module.affine


def pruned_right(model: nn.Module, sets: Iterable[Tensor], images: ImageSet) -> Iterator[int]:
    """Yield how many of ``images`` ``model`` has right with each of ``sets`` pruned, scales only.

    A set no larger than the one before has as many, without a pass. ``model`` stays as it was.

    Args:
        model: a classifier; it judges in eval mode.
        sets: bool (channels,), each within the next.
        images: with labels.
    """
    trial = copy.deepcopy(model).eval()
    channels = Channels(trial)
    right, num_pruned = 0, -1
    for pruned in sets:
        if int(pruned.sum()) > num_pruned:
            num_pruned = int(pruned.sum())
            channels.prune(pruned, shift=False)
            right = inference.num_right(trial, images)
        yield right


def step_masks(loss: Tensor, masks: Tensor, optimizer: torch.optim.Optimizer, num_images: int) -> None:
    """Take a step of ``optimizer`` down ``loss``, of so many images; ``masks`` stay in [0, 1]."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    count_step(num_images)
    with torch.no_grad():
        masks.clamp_(0, 1)
