"""How a network's layers are wired, read from its data flow."""

import torch.fx
from torch import nn


def convolution_norms(network: nn.Module) -> dict[str, str | None]:
    """Return each convolution's name with that of the batch normalization that alone reads its output.

    None where something else reads it too (a residual sum, say), or no normalization does.
    Convolutions of squeeze-and-excitation gates are left out: what they put out is no channel of the
    network, and zeroing one leaves its gate half open. Names are those of ``named_modules()``.
    """
    modules = dict(network.named_modules())
    pairs: dict[str, str | None] = {}
    for node in torch.fx.symbolic_trace(network).graph.nodes:
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


def _in_gate(name: str, modules: dict[str, nn.Module]) -> bool:
    # By its class's name, so that a network without gates doesn't cost the import of torchvision.
    parent = modules[name.rpartition(".")[0]]
    return type(parent).__name__ == "SqueezeExcitation"
