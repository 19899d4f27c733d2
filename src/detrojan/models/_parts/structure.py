"""How a network's layers are wired, read from its data flow."""

import collections

import torch.fx
from torch import nn

from detrojan.errors import NotApplicableError

ACTIVATIONS = (nn.ReLU, nn.SiLU, nn.Hardswish)


def convolution_norms(network: nn.Module) -> dict[str, str | None]:
    """Return each convolution's name with that of the batch normalization that alone reads its output.

    None where something else reads it too (a residual sum, say), or no normalization does.
    Convolutions of squeeze-and-excitation gates are left out: what they put out is no channel of the
    network, and zeroing one leaves its gate half open. Names are those of ``named_modules()``.

    Raises:
        NotApplicableError: the data flow can't be read.
    """
    modules = dict(network.named_modules())
    pairs: dict[str, str | None] = {}
    for node in _graph(network).nodes:
        name = str(node.target)
        if node.op != "call_module" or not isinstance(modules[name], nn.Conv2d) or _in_gate(name, modules):
            continue
        readers = list(node.users)
        only = readers[0] if len(readers) == 1 else None
        is_norm = (
            only is not None
            and only.op == "call_module"
            and isinstance(modules[str(only.target)], nn.BatchNorm2d)
        )
        pairs[name] = str(only.target) if only is not None and is_norm else None
    return pairs


def _graph(network: nn.Module) -> torch.fx.Graph:
    try:
        return torch.fx.symbolic_trace(network).graph
    except torch.fx.proxy.TraceError as error:
        raise NotApplicableError(
            "the method reads from the data flow which layer feeds which, and torch.fx can't follow that of "
            f"{type(network).__name__}: {error}"
        ) from error


def _in_gate(name: str, modules: dict[str, nn.Module]) -> bool:
    # By its class's name, so that a network without gates doesn't cost the import of torchvision.
    parent = modules[name.rpartition(".")[0]]
    return type(parent).__name__ == "SqueezeExcitation"


def norm_activations(network: nn.Module) -> dict[str, str]:
    """Return the name of each activation that reads a batch normalization, with that normalization's.

    These are the trunk's: activations of gates and of the head follow other layers. One that is called
    twice has no channels of its own and is left out. The order is that of the data flow.

    Raises:
        NotApplicableError: the data flow can't be read.
    """
    modules = dict(network.named_modules())
    calls = [n for n in _graph(network).nodes if n.op == "call_module"]
    norms = {node for node in calls if isinstance(modules[str(node.target)], nn.BatchNorm2d)}
    times = collections.Counter(str(node.target) for node in calls)
    return {
        str(node.target): str(node.args[0].target)
        for node in calls
        if isinstance(modules[str(node.target)], ACTIVATIONS)
        and node.args[0] in norms
        and times[str(node.target)] == 1
    }
