"""A network's data flow, recorded while one black image passes through it.

A function mode of torch sees every call of a function of tensors, hooks see in which module it ran and
what each module returned. Which call feeds which follows from the identity of the tensors. So any
network can be read that runs at all, whatever Python its forward pass has: functions in place of
modules, modules that are called twice, branches that depend on shapes. Only one that branches on values
is refused: what it does with a black image need not be what it does with others. What torch's functions
don't show (a scripted part) counts as one call of the module around it.
"""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from detrojan.errors import NotApplicableError
from detrojan.models._parts.insertions import Insertion

NORMS = frozenset({"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"})
# Of these alone, a bound from above does the same before them as behind them, from 0 upwards.
IDENTITIES_ABOVE_ZERO = frozenset({"relu", "relu6", "hardtanh", "leaky_relu", "prelu"})
ACTIVATIONS = IDENTITIES_ABOVE_ZERO | {"silu", "hardswish", "gelu", "elu", "celu", "selu", "mish", "softplus"}
# They keep every value in its place; in eval mode dropout does too.
KEEPING = frozenset({"clone", "contiguous", "detach", "dropout", "dropout1d", "dropout2d", "feature_dropout"})
KEEPING = KEEPING | {"alpha_dropout", "float", "to", "type_as"}
# They move values, or copy them, and change none.
MOVING = frozenset({"expand", "expand_as", "flatten", "get", "movedim", "permute", "reshape", "squeeze"})
MOVING = MOVING | {"reshape_as", "transpose", "unflatten", "unsqueeze", "view", "view_as"}
POOLINGS = frozenset({"adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "max_pool2d", "mean"})

# They take from their second argument its shape or type alone.
ALIKE = frozenset({"expand_as", "reshape_as", "type_as", "view_as"})

# By these a program learns values, and can go one way or the other.
REVEALING = frozenset({"__bool__", "__float__", "__index__", "__int__", "item", "tolist"})

SIDES = (32, 64, 96, 128, 160, 192, 224, 256, 384)  # pixels; tried where no images are at hand


@dataclasses.dataclass(eq=False)
class Node:
    """One call of a function, with what it put out.

    Attributes:
        index: its place in the order of calls.
        operation: the function's name, the same for ``x + y``, ``x.add_(y)`` and ``torch.add``.
        shape: of its output, of the first if it has several.
        stack: the modules in whose forward pass it was called, outer to inner; the network is ``""``.
        inputs: the calls whose outputs it read, in the order of its arguments.
        readers: the calls that read its output, each once.
        outputs: the modules that were called once and returned its output, inner to outer, among
            those of ``stack``.
        replay: calls the function again: maps what ``inputs`` put out, by their indexes, to its output.
    """

    index: int
    operation: str
    shape: tuple[int, ...]
    stack: tuple[str, ...]
    inputs: list["Node"] = dataclasses.field(repr=False)
    readers: list["Node"] = dataclasses.field(default_factory=list, repr=False)
    outputs: list[str] = dataclasses.field(default_factory=list)
    replay: Callable[[dict[int, Any]], Any] | None = dataclasses.field(default=None, repr=False)

    @property
    def layer(self) -> str:
        """The innermost module in which it was called: of a convolution, the convolution."""
        return self.stack[-1]

    @property
    def passes(self) -> bool:
        """Whether its output has the values of its input, and no others."""
        return self.operation in KEEPING or self.operation in MOVING

    @property
    def sources(self) -> list["Node"]:
        """Its inputs, or what reached them unchanged."""
        found = []
        for node in self.inputs:
            while node.passes:
                node = node.inputs[0]  # noqa: PLW2901  # a walk
            found.append(node)
        return found

    @property
    def uses(self) -> list["Node"]:
        """Its readers, or what reads these where they pass its output on unchanged."""
        found: dict[Node, None] = {}
        for node in self.readers:
            found.update(dict.fromkeys(node.uses if node.passes else [node]))
        return list(found)


@dataclasses.dataclass(frozen=True)
class Flow:
    """The calls that lead from an image to its logits.

    Attributes:
        network: whose they are.
        modules: its modules by name.
        nodes: all calls in order, the image as the first.
        output: the call that puts out the logits.
    """

    network: nn.Module
    modules: dict[str, nn.Module]
    nodes: list[Node]
    output: Node

    @functools.cached_property
    def ancestors(self) -> list[int]:
        """Of each node, by index, a set as bits: the node itself and all that it depends on."""
        sets: list[int] = []
        for node in self.nodes:
            bits = 1 << node.index
            for source in node.inputs:
                bits |= sets[source.index]
            sets.append(bits)
        return sets

    @functools.cached_property
    def unavoidable(self) -> list[int]:
        """Of each node, by index, a set as bits: the nodes on every path from the image to it."""
        sets: list[int] = []
        for node in self.nodes:
            common = functools.reduce(lambda a, b: a & b, [sets[n.index] for n in node.inputs] or [0])
            sets.append(common | 1 << node.index)
        return sets

    @functools.cached_property
    def gates(self) -> frozenset[Node]:
        """What computes factors for a tensor from that tensor itself, as squeeze-and-excitation does.

        Where a product's one factor depends on the other, it is all on the way between the two.
        """
        bits = 0
        for node in self.nodes:
            if node.operation == "mul" and len(node.inputs) == 2:
                for gated, gate in (node.inputs, node.inputs[::-1]):
                    if self.depends(gate, gated):
                        bits |= self.ancestors[gate.index] & ~self.ancestors[gated.index]
        return frozenset(node for node in self.nodes if bits >> node.index & 1)

    def depends(self, node: Node, on: Node) -> bool:
        """Return whether ``node`` is ``on``, or reads it, directly or not."""
        return bool(self.ancestors[node.index] >> on.index & 1)


def trace(network: nn.Module, images: Tensor | None = None) -> Flow:
    """Return the data flow of ``network`` in eval mode. The network stays as it was.

    Args:
        network: maps normalized images (N, 3, H, W) to logits (N, num_classes); on any device, ``meta``
            too. What a defense has inserted is looked through. A classifier's network: a pass of the
            classifier itself would count among the costs of a method.
        images: (N, 3, H, W); their size alone counts. None takes the smallest of ``SIDES`` that the
            network takes: good for all that does not depend on the size.

    Raises:
        NotApplicableError: the output is no tensor, nobody can tell how it comes from the image, or the
            network branches on values. Without ``images``: it takes none of ``SIDES``.
        RuntimeError, AssertionError, ValueError: of the network, if it can't take such ``images``.
    """
    if images is not None:
        return _trace(network, tuple(images.shape[2:]))
    for side in SIDES:
        try:
            return _trace(network, (side, side))
        except NotApplicableError:
            raise
        except (RuntimeError, AssertionError, ValueError):
            continue  # what a network says of a wrong size differs from one to the next
    raise NotApplicableError(
        "the method reads from the data flow which layer feeds which, and "
        f"{type(network).__name__} takes images of none of the sizes {', '.join(map(str, SIDES))}"
    )


@torch.no_grad()
def _trace(network: nn.Module, size: tuple[int, ...]) -> Flow:
    example = next(network.parameters(), torch.empty(0))
    image = torch.zeros(1, 3, *size, device=example.device, dtype=example.dtype)
    recorder = _Recorder(image)
    with _eval_mode(network), recorder.watching(network), recorder:
        output = network(image)
    found = recorder.made.get(id(output)) if isinstance(output, Tensor) else None
    if found is None:
        raise NotApplicableError(
            "the method reads from the data flow which layer feeds which, and can't follow that of "
            f"{type(network).__name__} from the image to its output, a {type(output).__name__}"
        )
    for node in recorder.nodes:
        node.outputs = [name for name in node.outputs if recorder.calls[name] == 1]
    return Flow(network, dict(network.named_modules()), recorder.nodes, found)


@contextlib.contextmanager
def _eval_mode(network: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Recorder(TorchFunctionMode):
    """Makes a node of each call that reads what depends on the image.

    Attributes:
        nodes: all of them, in order.
        made: by the identity of a tensor, the call that gave it its present values.
        calls: how often each module was called.
    """

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.made: dict[int, Node] = {}
        self.calls: collections.Counter[str] = collections.Counter()
        self._stack: list[str] = []
        self._known: dict[int, Tensor] = {}  # kept, so that no other tensor gets its identity
        self._inside = 0  # layers that were inserted
        self._add("image", [], (image,), None)

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``function`` and note what it read and put out."""
        kwargs = kwargs or {}
        name = _name(function)
        read, replay = self._read(function, args, kwargs)
        if name in ALIKE:
            read = self._makers(_tensors(args[0]))
        if read and not self._inside and getattr(function, "__name__", "") in REVEALING:
            raise NotApplicableError(
                "the method reads from the data flow which layer feeds which, and that of this network may "
                f"depend on the values of an image: {self._stack[-1] or 'it'} asks for some"
            )
        result = function(*args, **kwargs)
        put_out = _tensors(args[0] if name == "setitem" else result)
        if put_out and not self._inside:
            # Of what only takes its shape from the image, no value depends on it.
            if read and not name.startswith("new_") and not name.endswith("_like"):
                self._add(name, read, put_out, replay)
            else:
                self._known.update((id(tensor), tensor) for tensor in put_out)
        return result

    @contextlib.contextmanager
    def watching(self, network: nn.Module) -> Iterator[None]:
        """Follow which module of ``network`` runs, while the block does."""
        inserted = {
            m for module in network.modules() if isinstance(module, Insertion) for m in module.modules()
        }
        handles = []
        for name, module in network.named_modules():
            if isinstance(module, Insertion):
                enter: Callable[..., None] = self._enter_inserted
                leave: Callable[..., None] = self._leave_inserted
            elif module in inserted:
                continue
            else:
                enter, leave = functools.partial(self._enter, name), functools.partial(self._leave, name)
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, *_: object) -> None:
        self._stack.append(name)
        self.calls[name] += 1

    def _leave(self, name: str, _module: nn.Module, args: Any, kwargs: Any, output: object) -> None:
        unseen = tuple(t for t in _tensors(output) if id(t) not in self.made and id(t) not in self._known)
        read = self._makers(_tensors((args, *kwargs.values())))
        if unseen and read:
            self._add("module", read, unseen, None)
        if isinstance(output, Tensor) and (node := self.made.get(id(output))) and name in node.stack:
            node.outputs.append(name)
        self._stack.pop()

    def _enter_inserted(self, *_: object) -> None:
        self._inside += 1

    def _leave_inserted(self, _module: nn.Module, args: Any, _kwargs: Any, output: Tensor) -> None:
        self._inside -= 1
        self._known[id(output)] = output
        self.made[id(output)] = self.made[id(args[0])]

    def _add(
        self,
        operation: str,
        inputs: list[Node],
        put_out: tuple[Tensor, ...],
        replay: Callable[[dict[int, Any]], Any] | None,
    ) -> None:
        shape = tuple(put_out[0].shape)
        node = Node(len(self.nodes), operation, shape, tuple(self._stack), inputs, replay=replay)
        self.nodes.append(node)
        for source in dict.fromkeys(inputs):
            source.readers.append(node)
        for tensor in put_out:
            self.made[id(tensor)] = node
            self._known[id(tensor)] = tensor

    def _makers(self, tensors: tuple[Tensor, ...]) -> list[Node]:
        return [self.made[id(tensor)] for tensor in tensors if id(tensor) in self.made]

    def _read(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Node], Callable[[dict[int, Any]], Any]]:
        """Return the makers of what a call reads, and how to call it again."""
        template = _mapped(lambda t: self.made.get(id(t), t), (args, kwargs))

        def replay(values: dict[int, Any]) -> Any:
            again, named = _mapped(lambda n: values[n.index] if isinstance(n, Node) else n, template)
            return function(*again, **named)

        return self._makers(_tensors((args, *kwargs.values()))), replay


def _name(function: Callable[..., Any]) -> str:
    """Return one name for all forms of an operation: ``add`` for ``add_``, ``__iadd__``, ``__radd__``."""
    name = getattr(function, "__name__", type(function).__name__)
    plain = name.strip("_")
    if name.startswith("__") and plain[1:] in {"add", "mul", "sub"}:
        plain = plain[1:]
    return {"multiply": "mul"}.get(plain, plain)


def _tensors(value: object) -> tuple[Tensor, ...]:
    """Return the tensors in ``value`` and in tuples and lists within it."""
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, tuple | list):
        return tuple(tensor for item in value for tensor in _tensors(item))
    return ()


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Return ``value`` with ``change`` applied to tensors and nodes, within containers too."""
    if isinstance(value, Tensor | Node):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(change, item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_mapped(change, item) for item in value)
    return value
