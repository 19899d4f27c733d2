"""Layers that a defense adds to a network, for good: saved, copied and moved with it.

An inserted layer is a child of the module at whose side it works, its host, so its tensors stand in
the network's state under the host's name (``layer4.1.conv1.polarizer.conv.weight``). A hook of the
host passes its input or its output through the layer. Hooks are functions of this module that find
the layer by their host, so copying a network copies them whole.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn


class Insertion(nn.Module):
    """Base of inserted layers, which are made by their number of channels.

    Class variables:
        kind: its name, in a model's file and as a child of its host.
        sized: its tensor whose first dimension is the number of channels.
        before: whether it changes what the host reads; else, what the host puts out.
    """

    kind: ClassVar[str]
    sized: ClassVar[str]
    before: ClassVar[bool]


class Polarizer(Insertion):
    """A 1×1 convolution and batch normalization before a convolution.

    Source: Zhu, Wei, Zha, Wu, "Neural Polarizer", NeurIPS 2023 (arXiv 2306.16697). A fresh one has the
    identity for a kernel and, in eval mode, changes nothing but by the normalization's epsilon.
    """

    kind = "polarizer"
    sized = "conv.weight"
    before = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The usual initialization would move torch's global stream, and be overwritten.
        device = torch.get_default_device()
        self.conv: nn.Conv2d = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            nn.Conv2d, channels, channels, 1, bias=False, device=device
        )
        nn.init.dirac_(self.conv.weight)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps of the same shape, (N, channels, H, W)."""
        polarized: Tensor = self.bn(self.conv(maps))
        return polarized


class TokenPolarizer(Insertion):
    """A linear layer and batch normalization before a layer normalization of tokens, each token by itself.

    No paper has it: what the polarizer of maps is to a convolution, it is to a block of a transformer. A
    fresh one changes nothing, in eval mode, but by the normalization's epsilon.
    """

    kind = "token_polarizer"
    sized = "linear.weight"
    before = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        device = torch.get_default_device()
        self.linear: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            nn.Linear, channels, channels, bias=False, device=device
        )
        nn.init.eye_(self.linear.weight)
        self.bn = nn.BatchNorm1d(channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens of the same shape, (N, ..., channels); statistics are over all but the channels."""
        polarized: Tensor = self.bn(self.linear(tokens).flatten(0, -2))
        return polarized.view_as(tokens)


class Ceiling(Insertion):
    """An upper bound of each channel behind an activation; a fresh one bounds nothing.

    Source: Wang, Xiang, Miller, Kesidis, "MM-BD", IEEE S&P 2024 (arXiv 2205.06900).
    """

    kind = "ceiling"
    sized = "bound"
    before = False

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Finite: weights that are not are refused when a model is read.
        self.bound = nn.Parameter(torch.full((channels,), torch.finfo(torch.float32).max))

    def forward(self, maps: Tensor) -> Tensor:
        """Return ``maps`` (N, channels, H, W), bounded; a bound's gradient comes from where it acts."""
        return maps.clamp(max=self.bound.view(-1, 1, 1))


class TokenCeiling(Ceiling):
    """A ceiling where channels are the last dimension: tokens, and what linear layers put out."""

    kind = "token_ceiling"

    def forward(self, tokens: Tensor) -> Tensor:
        """Return ``tokens`` (N, ..., channels), bounded."""
        return tokens.clamp(max=self.bound)


KINDS: dict[str, type[Insertion]] = {
    layer.kind: layer for layer in (Polarizer, TokenPolarizer, Ceiling, TokenCeiling)
}


def attach(network: nn.Module, host: str, layer: Insertion) -> None:
    """Make ``layer`` work in ``network`` from now on, before or behind its module ``host``.

    Raises:
        ValueError: there is no such module, it has an inserted layer already, or it is not what the
            layer works beside.
    """
    modules = dict(network.named_modules())
    if not host or host not in modules:
        raise ValueError(f"no module {host!r} for a {layer.kind}")
    module = modules[host]
    if any(isinstance(child, Insertion) for child in module.children()):
        raise ValueError(f"module {host} has an inserted layer already, and takes no second one")
    if layer.before:
        channels = len(layer.get_parameter(layer.sized))
        if _channels_in(module, layer) != channels:
            raise ValueError(f"a {layer.kind} of {channels} channels doesn't fit before {host}, {module}")
    module.add_module(layer.kind, layer)
    if layer.before:
        module.register_forward_pre_hook(_through_before)
    else:
        module.register_forward_hook(_through_after)


def _channels_in(module: nn.Module, layer: Insertion) -> int | None:
    """Return how many channels ``module`` reads; None if ``layer`` stands before modules of another kind."""
    if isinstance(layer, TokenPolarizer):
        return module.normalized_shape[-1] if isinstance(module, nn.LayerNorm) else None
    return module.in_channels if isinstance(module, nn.Conv2d) else None


def rebuild(network: nn.Module, inserted: Mapping[str, str], weights: Mapping[str, Tensor]) -> None:
    """Attach layers of the kinds ``inserted``, by host, of the sizes that they have in ``weights``.

    Raises:
        ValueError: as of :func:`attach`; a kind is unknown, or ``weights`` lack a layer.
    """
    for host, kind in inserted.items():
        if kind not in KINDS:
            raise ValueError(f"no inserted layer of kind {kind!r}: there are {', '.join(KINDS)}")
        name = f"{host}.{kind}.{KINDS[kind].sized}"
        if name not in weights:
            raise ValueError(f"no tensor {name}, which the {kind} at {host} should have")
        attach(network, host, KINDS[kind](len(weights[name])))


def _layer(host: nn.Module) -> Insertion:
    return next(child for child in host.children() if isinstance(child, Insertion))


def _through_before(host: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (_layer(host)(inputs[0]), *inputs[1:])


def _through_after(host: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    maps: Tensor = _layer(host)(output)
    return maps
