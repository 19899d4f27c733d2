"""How a network's layers are wired, read from its data flow.

Where nothing depends on the size of the images, none need be given: see :func:`flow.trace`.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from detrojan.models._parts.flow import ACTIVATIONS, IDENTITIES_ABOVE_ZERO, NORMS, Flow, Node, trace

LAYERS = frozenset({"conv2d", "linear"})


class Unit(NamedTuple):
    """A layer's output channels, with what alone scales them, activates them and reads them.

    Attributes:
        layer: a convolution or a linear layer, by the name that ``named_modules()`` has for it.
        norm: the normalization that alone reads it; None if another layer does, or several.
        activation: the function behind both, ``relu`` say, where nothing else reads them.
        reader: the linear layer that alone reads what the activation puts out.
    """

    layer: str
    norm: str | None
    activation: str | None
    reader: str | None


class Site(NamedTuple):
    """An activation of the trunk, and where a bound from above of its channels can work.

    Attributes:
        host: the module behind which the bound stands: the activation, a module with the activation in
            it, or the layer before. The last only for an activation that is the identity above zero,
            so that any bound of 0 or more does the same there; and in case the activation has no module
            of its own, is called as a function or by several layers.
        feeder: the layer that alone feeds it, a normalization, convolution or linear layer.
        channels: how many it has.
        last: whether they are the last dimension; else they are the second.
    """

    host: str
    feeder: str
    channels: int
    last: bool


def units(network: nn.Module, images: Tensor | None = None) -> list[Unit]:
    """Return the filters of all convolutions and the hidden units of all multilayer perceptrons, in order.

    Convolutions of gates, squeeze-and-excitation say, are left out: what they put out is no channel of
    the network, and zeroing one leaves its gate half open. Of linear layers there are those whose output
    an activation alone reads, whose output a linear layer alone reads, both on tokens or maps: a unit's
    row, its bias and its column of ``reader`` can go. The head is left out. A layer in two places is one
    unit, with what both places have in common.

    Raises:
        NotApplicableError: the data flow can't be read.
    """
    flow = trace(network, images)
    found: dict[str, Unit] = {}
    for node in flow.nodes:
        if node.operation not in LAYERS or node in flow.gates:
            continue
        unit = _unit(flow, node)
        if node.operation == "conv2d" and isinstance(flow.modules[unit.layer], nn.Conv2d):
            found[unit.layer] = _common(unit, found.get(unit.layer, unit))
        elif node.operation == "linear" and len(node.shape) > 2 and unit.norm is None and unit.reader:
            found[unit.layer] = unit
    return list(found.values())


def convolution_norms(network: nn.Module, images: Tensor | None = None) -> dict[str, str | None]:
    """Return each convolution's name with that of the normalization that alone reads its output.

    None where something else reads it too (a residual sum, say), or no normalization does. A layer that
    normalizes and activates counts as a normalization. Convolutions of gates are left out, see
    :func:`units`. Names are those of ``named_modules()``.

    Raises:
        NotApplicableError: the data flow can't be read.
    """
    modules = dict(network.named_modules())
    return {
        unit.layer: unit.norm for unit in units(network, images) if isinstance(modules[unit.layer], nn.Conv2d)
    }


def norm_activations(network: nn.Module, images: Tensor | None = None) -> dict[str, str]:
    """Return the hosts of the sites that follow a batch normalization, each with that normalization.

    See :class:`Site`. The order is that of the data flow.

    Raises:
        NotApplicableError: the data flow can't be read.
    """
    modules = dict(network.named_modules())
    return {
        site.host: site.feeder
        for site in activations(network, images)
        if isinstance(modules[site.feeder], nn.BatchNorm2d)
    }


def activations(network: nn.Module, images: Tensor | None = None) -> list[Site]:
    """Return the activations of the trunk that a layer alone feeds, in the order of the data flow.

    Neither gates have any, nor the head. Those of sums, behind the blocks of a ResNet, have no layer of
    their own and are left out; so is one whose values no module puts out, if a bound would have to
    stand before it and would not be the same there (SiLU or GELU, called as a function).

    Raises:
        NotApplicableError: the data flow can't be read.
    """
    return [site for _, site in sites(trace(network, images))]


def channel_dimensions(network: nn.Module, images: Tensor | None = None) -> dict[str, int]:
    """Return the dimension of the channels, 1 or the last, of what modules put out, by their names.

    Modules that are no part of the flow, are called twice or put out flat features are left out.

    Raises:
        NotApplicableError: the data flow can't be read.
    """
    nodes = [node for node in trace(network, images).nodes if len(node.shape) > 2]
    return {name: channel_dimension(node) for node in nodes for name in node.outputs}


def sites(flow: Flow) -> Iterator[tuple[Node, Site]]:
    """Yield each activation of the trunk as a node, and as what :func:`activations` returns."""
    for node in flow.nodes:
        if node.operation not in ACTIVATIONS or node in flow.gates or len(node.shape) < 3:
            continue
        feeder = node.sources[0]
        if feeder.operation not in NORMS | LAYERS or feeder.uses != [node]:
            continue
        host = next(iter(node.outputs), None)
        if host is None and node.operation in IDENTITIES_ABOVE_ZERO:
            host = next(iter(feeder.outputs), None)
        if host is not None:
            dimension = channel_dimension(node)
            yield node, Site(host, feeder.layer, node.shape[dimension], dimension != 1)


def channel_dimension(node: Node) -> int:
    """Return which dimension of what ``node`` puts out is that of the channels, 1 or the last.

    The layers around it tell, across all that works on each value alone: convolutions, batch
    normalizations and poolings have them second, linear layers and layer normalizations last.
    """
    last = len(node.shape) - 1
    waiting, seen = [node], {node}
    while waiting:
        here = waiting.pop(0)
        for one in (here, *here.readers):
            if one.operation.endswith("pool2d") or one.operation in {"conv2d", "batch_norm", "group_norm"}:
                return 1
            if one.operation in {"linear", "layer_norm", "rms_norm", "multi_head_attention_forward"}:
                return last
        for other in (*here.inputs, *here.readers):
            between = here if other in here.inputs else other
            if other not in seen and other.shape == node.shape and elementwise(between):
                seen.add(other)
                waiting.append(other)
    return 1 if last == 3 else last


def elementwise(node: Node) -> bool:
    """Return whether each value that ``node`` puts out stands where those stood from which it comes."""
    return node.operation in {"add", "mul"} | ACTIVATIONS or node.operation.startswith("dropout")


def _unit(flow: Flow, node: Node) -> Unit:
    norm = activation = reader = None
    last = node
    if (user := _only_use(last)) and user.operation in NORMS:
        norm, last = user.layer, user
    if (user := _only_use(last)) and user.operation in ACTIVATIONS:
        activation, last = user.operation, user
        if (user := _only_use(last)) and user.operation == "linear":
            reader = user.layer if isinstance(flow.modules[user.layer], nn.Linear) else None
    if not isinstance(flow.modules[node.layer], nn.Conv2d | nn.Linear):
        reader = None
    return Unit(node.layer, norm, activation, reader)


def _common(one: Unit, other: Unit) -> Unit:
    """Return what a layer in two places has in both."""
    return Unit(
        one.layer,
        one.norm if one.norm == other.norm else None,
        one.activation if one.activation == other.activation else None,
        one.reader if one.reader == other.reader else None,
    )


def _only_use(node: Node) -> Node | None:
    uses = node.uses
    return uses[0] if len(uses) == 1 else None
