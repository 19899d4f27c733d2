"""The places in a network where methods work, picked from its data flow by one rule for all networks.

A *stage* is what has maps of one size; it ends with the last residual sum of that size. Where there are
no sums, with what the next pooling reads. Names are those of ``named_modules()``, from the image to the
logits. Sizes count here, so all functions take the images that the network is used on, of which they
read the size.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from detrojan.errors import NotApplicableError
from detrojan.models._parts.flow import ACTIVATIONS, NORMS, POOLINGS, Flow, Node, trace
from detrojan.models._parts.structure import Site, channel_dimension, sites

MOST_PREFIX_TOKENS = 16  # class tokens, registers


class Layout(NamedTuple):
    """How a layer's output lies in memory, as one image showed it.

    Attributes:
        channels: the dimension of its channels.
        size: height and width of its map.
        prefix: how many tokens stand before those of the map; 0 where it has two dimensions.
    """

    channels: int
    size: tuple[int, int]
    prefix: int = 0

    def maps(self, output: Tensor) -> Tensor:
        """Return ``output`` as maps (N, C, H, W), a view: what has them already stays as it is."""
        if output.dim() == 3:
            output = output[:, self.prefix :]
            output = output.reshape(len(output), *self.size, output.shape[2])
        return output if self.channels == 1 else output.movedim(-1, 1)


class Head(NamedTuple):
    """The linear layers that end a network, and what feeds them.

    Attributes:
        layers: their names.
        channels: how many channels feed the first: each is as many neighbouring columns of its weight
            as ``in_features / channels`` says, the positions that pooling has kept.
        logits: maps the first layer's input, (N, in_features), to logits (N, num_classes), with the
            weights that the network has then.
    """

    layers: list[str]
    channels: int
    logits: Callable[[Tensor], Tensor]


def head(network: nn.Module, images: Tensor) -> Head:
    """Return the head of ``network``: the linear layers between flat features and logits.

    Raises:
        NotApplicableError: there is none, or the data flow can't be read.
    """
    flow = trace(network, images)
    found: set[Node] = set()
    waiting = [flow.output]
    while waiting:
        node = waiting.pop()
        if node not in found and len(node.shape) == 2 and node.operation not in NORMS:
            found.add(node)
            waiting += node.inputs
    layers = [n for n in _ordered(found) if n.operation == "linear" and _is(flow, n, nn.Linear)]
    if not layers:
        raise NotApplicableError(f"{type(network).__name__} has no linear layer between features and logits")
    source = layers[0].inputs[0]
    features = source.shape[1]
    while len(source.shape) == 2 and source.inputs and (source.passes or source.operation in ACTIVATIONS):
        source = source.inputs[0]
    flat = len(source.shape) == 4 and math.prod(source.shape[1:]) == features
    channels = source.shape[1] if flat else features
    return Head([n.layer for n in layers], channels, _end(flow, layers[0]))


def stages(network: nn.Module, images: Tensor) -> list[str]:
    """Return three modules that put out maps of 2×2 or more, for methods that compare where maps are large.

    They are the ends of the last three stages of such maps. In a network without residual sums a pooling
    belongs to the stage before it, as long as it leaves 2×2. A network with fewer than three sizes (a
    transformer has one) gives the blocks that end a third, two thirds and all of its residual sums.
    :func:`layouts` says how their outputs become maps.

    Raises:
        NotApplicableError: there are no three, or the data flow can't be read.
    """
    flow = trace(network, images)
    sums = [node for node in _block_ends(flow) if _large(node)]
    ends = _last_by_size(sums) if sums else [n for n in _pooled_stages(flow) if _large(n)]
    if sums and len(ends) < 3:
        ends = [sums[math.ceil(len(sums) * third / 3) - 1] for third in (1, 2, 3)]
    names = list(dict.fromkeys(name for node in ends if (name := _name(node)) is not None))[-3:]
    if len(names) < 3:
        raise NotApplicableError(
            f"{type(network).__name__} has no three stages with maps of 2×2 or more on images of "
            f"{images.shape[2]}×{images.shape[3]} pixels, but {len(names)}"
        )
    return names


def layouts(network: nn.Module, images: Tensor, names: Iterable[str]) -> dict[str, Layout]:
    """Return how the outputs of the modules ``names`` become maps, by name.

    A module that is no part of the flow, is called twice, or whose output has no maps, is left out.

    Raises:
        NotApplicableError: the data flow can't be read.
    """
    wanted = set(names)
    found = {}
    for node in trace(network, images).nodes:
        if wanted & set(node.outputs) and (layout := _layout(node)):
            found.update(dict.fromkeys(wanted & set(node.outputs), layout))
    return found


def early_activations(network: nn.Module, images: Tensor) -> list[Site]:
    """Return up to three early activations of the trunk: behind the stem, behind the first stages.

    - The first of all; then, where activations read residual sums (a ResNet of either kind), the first
      behind the first stage and the first behind the second.
    - Where none reads them, as in inverted residual blocks: the last in each of the first two stages
      whose maps are smaller than those of the first activation. What has the stem's size counts to it.
    - Where all sums have one size (a transformer): the first in blocks 1, L/4 + 1 and L/2 + 1 of L,
      fractions rounded up.
    - Without residual sums: the last before each of the first three reductions of the size, of those
      that all paths pass.

    Raises:
        NotApplicableError: no activation of the trunk can be bounded, or the data flow can't be read.
    """
    flow = trace(network, images)
    found = list(sites(flow))
    if not found:
        raise NotApplicableError(f"{type(network).__name__} has no activation that a layer alone feeds")
    return list(dict.fromkeys(_early(flow, found)))


def late_layer(network: nn.Module, images: Tensor) -> str:
    """Return the layer that a method may stand before to change what reaches the head, a convolution if any.

    The last convolution behind the last residual sum that all paths from image to logits pass; without
    one the first convolution of the innermost module that makes that sum, of those that another one there
    follows, so that no shortcut's is taken, if there are such; without one that module's first
    normalization, as in a transformer. Without residual sums it is the last convolution that all paths
    pass.

    Raises:
        NotApplicableError: there is none, or the data flow can't be read.
    """
    flow = trace(network, images)
    last = max((node.index for node in _sums(flow)), default=-1)
    candidates = [n for n in flow.nodes if n.operation == "conv2d" and n not in flow.gates]
    candidates = [n for n in candidates if _is(flow, n, nn.Conv2d)]
    if behind := [n for n in candidates if n.index > last and _unavoidable(flow, n)]:
        return behind[-1].layer
    block = flow.nodes[last].stack[-1] if last >= 0 else None
    inside = [n for n in candidates if block in n.stack]
    followed = [n for n in inside if any(flow.depends(other, n) for other in inside if other is not n)]
    norms = [n for n in flow.nodes if n.operation in NORMS and block in n.stack]
    for some in (followed, inside, norms):
        if some:
            return some[0].layer
    raise NotApplicableError(f"{type(network).__name__} has no convolution that all paths to its logits pass")


def _early(flow: Flow, found: list[tuple[Node, Site]]) -> list[Site]:
    sums = _block_ends(flow)
    ends = _last_by_size(sums)
    if not sums:
        found = [(node, site) for node, site in found if _unavoidable(flow, node)]
        smaller = [some for _, first in _reductions(flow) if (some := _before(found, first.index))]
        return [some[-1] for some in smaller[:3]]
    if len(ends) == 1:
        blocks = [math.ceil(len(sums) / parts) for parts in (4, 2)]
        behind = [sums[number - 1].index for number in blocks]
    elif any(_activated(node) for node in _sums(flow)):
        behind = [node.index for node in ends[:2]]
    else:
        narrower = [node.index for node in ends if _area(node) < _area(found[0][0])]
        return [found[0][1], *(_before(found, index)[-1] for index in narrower[:2])]
    later = [next((site for node, site in found if node.index > index), None) for index in behind]
    return [found[0][1], *(site for site in later if site)]


def _before(found: list[tuple[Node, Site]], index: int) -> list[Site]:
    return [site for node, site in found if node.index < index]


def _sums(flow: Flow) -> list[Node]:
    """Return the residual sums: of two tensors from the image that have the sum's own shape."""
    return [
        node
        for node in flow.nodes
        if node.operation == "add"
        and len(node.inputs) == 2
        and all(source.shape == node.shape for source in node.inputs)
        and len(node.shape) in (3, 4)
        and node.shape[0] == 1
        and node not in flow.gates
    ]


def _block_ends(flow: Flow) -> list[Node]:
    """Return what blocks with residual sums put out: the sum, or what alone reads it and no more changes.

    Sums inside a block are left out, such as a transformer's behind its attention.
    """
    found: dict[Node, None] = {}
    for node in _sums(flow):
        while not _name(node) and len(node.readers) == 1 and node.readers[0].shape == node.shape:
            if node.readers[0].operation not in ACTIVATIONS | NORMS and not node.readers[0].passes:
                break
            node = node.readers[0]  # noqa: PLW2901  # a walk
        if _name(node):
            found[node] = None
    return list(found)


def _activated(node: Node) -> bool:
    """Return whether an activation reads ``node``, itself or behind a normalization."""
    readers = [other for use in node.uses for other in ([use] if use.operation not in NORMS else use.uses)]
    return any(reader.operation in ACTIVATIONS for reader in readers)


def _last_by_size(nodes: list[Node]) -> list[Node]:
    """Return the last node of each size of maps, in order."""
    return _ordered({_size(node): node for node in nodes}.values())


def _reductions(flow: Flow) -> list[tuple[Node, Node]]:
    """Return where maps get smaller on what all paths pass: the last of a size, the first behind it."""
    trunk = [node for node in flow.nodes if node.inputs and len(node.shape) == 4 and _unavoidable(flow, node)]
    return [(last, first) for last, first in itertools.pairwise(trunk) if 0 < _area(first) < _area(last)]


def _pooled_stages(flow: Flow) -> list[Node]:
    """Return the ends of the stages of a network without residual sums."""
    return [
        first if first.operation in POOLINGS and first.inputs == [last] and _large(first) else last
        for last, first in _reductions(flow)
    ]


def _unavoidable(flow: Flow, node: Node) -> bool:
    """Return whether all paths from the image to the logits pass ``node``."""
    return bool(flow.unavoidable[flow.output.index] >> node.index & 1)


def _name(node: Node) -> str | None:
    """Return the outermost module that puts out ``node``: the network itself is none."""
    names = [name for name in node.outputs if name]
    return names[-1] if names else None


def _layout(node: Node) -> Layout | None:
    channels, last = channel_dimension(node), len(node.shape) - 1
    if last == 3:
        size = node.shape[2:] if channels == 1 else node.shape[1:3]
        return Layout(channels, (size[0], size[1]))
    if last != 2 or channels != 2:
        return None
    # Tokens: those of the latest convolution's map that are not too many.
    waiting, seen = [node], {node}
    while waiting:
        here = max(waiting, key=lambda other: other.index)
        waiting.remove(here)
        if here.operation == "conv2d":
            height, width = here.shape[2:]
            prefix = node.shape[1] - height * width
            if 0 <= prefix <= MOST_PREFIX_TOKENS:
                return Layout(channels, (height, width), prefix)
        fresh = [other for other in here.inputs if other not in seen]
        seen.update(fresh)
        waiting += fresh
    return None


def _size(node: Node) -> tuple[int, int] | None:
    layout = _layout(node)
    return layout.size if layout else None


def _area(node: Node) -> int:
    return math.prod(_size(node) or (0,))


def _large(node: Node) -> bool:
    return min(_size(node) or (0,)) >= 2


def _is(flow: Flow, node: Node, kind: type[nn.Module]) -> bool:
    return isinstance(flow.modules[node.layer], kind)


def _ordered(nodes: Iterable[Node]) -> list[Node]:
    return sorted(nodes, key=lambda node: node.index)


def _end(flow: Flow, first: Node) -> Callable[[Tensor], Tensor]:
    """Return what calls again all that leads from the input of ``first`` to the logits."""
    start = first.inputs[0]
    after = [
        n for n in flow.nodes if flow.depends(n, start) and flow.depends(flow.output, n) and n is not start
    ]

    def logits(features: Tensor) -> Tensor:
        values: dict[int, Any] = {start.index: features}
        for node in after:
            assert node.replay is not None
            values[node.index] = node.replay(values)
        result: Tensor = values[flow.output.index]
        return result

    return logits
