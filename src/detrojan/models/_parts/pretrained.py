"""Weights that a network starts from: of a local safetensors file, whose names are the network's own."""

import logging
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

PREFIXES = (
    1,
    0,
    2,
)  # tokens before those of the map, the likeliest first: class, none, class and distillation
MOST_NAMED = 5


def load(network: nn.Module, path: str | Path, num_classes: int) -> None:
    """Give ``network`` the weights of a safetensors file.

    What maps to logits stays as it was drawn where the file has another number of classes. Position
    embeddings of another number of tokens are resampled.

    Raises:
        ValueError: the file is missing or broken, or its names or shapes are not those of the network.
    """
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"pretrained: {path} is no whole safetensors file ({error})") from None
    expected = network.state_dict()
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    wrong = sorted((expected.keys() - counters) ^ (found.keys() - counters))
    if wrong:
        shown = ", ".join(
            f"{name} ({'missing in the file' if name in expected else 'not in the network'})"
            for name in wrong[:MOST_NAMED]
        )
        raise ValueError(
            f"pretrained: {path} and the network differ in {len(wrong)} tensors, such as {shown}: take the "
            "weights of this very network, with its own names"
        )
    fitted = {}
    for name, value in found.items():
        if name not in expected:
            continue
        if not bool(value.isfinite().all()):
            raise ValueError(f"pretrained: {path}: tensor {name} is not finite")
        fitted[name] = _fitted(name, value, expected[name], num_classes, path)
    network.load_state_dict(expected | fitted)


def _fitted(name: str, value: Tensor, own: Tensor, num_classes: int, path: str | Path) -> Tensor:
    """Return what the tensor ``own`` of a network should be, by ``value`` of the file."""
    if value.shape == own.shape:
        return value
    if own.dim() and len(own) == num_classes and value.shape[1:] == own.shape[1:]:
        logger.info("pretrained: %s has %d classes: %s is drawn anew", path, len(value), name)
        return own
    if "pos_embed" in name and value.dim() == 3 and value.shape[2] == own.shape[2]:
        for prefix in PREFIXES:
            sides = [math.isqrt(max(tokens.shape[1] - prefix, 0)) for tokens in (value, own)]
            if [side * side + prefix for side in sides] == [value.shape[1], own.shape[1]]:
                logger.info("pretrained: %s is resampled from %d² to %d² positions", name, *sides)
                return resampled(value, prefix, *sides)
    raise ValueError(
        f"pretrained: {path}: tensor {name} is {tuple(value.shape)}, the network's {tuple(own.shape)}"
    )


def resampled(embedding: Tensor, prefix: int, side: int, new_side: int) -> Tensor:
    """Return position embeddings (1, prefix + new_side², C) of those of another map.

    Bicubic, antialiased on the way down; those of the tokens before the map stay.

    Args:
        embedding: (1, prefix + side², C).
        prefix: tokens before those of the map.
        side: of its map.
        new_side: of the map wanted.
    """
    before, tokens = embedding[:, :prefix], embedding[:, prefix:]
    maps = tokens.reshape(1, side, side, -1).movedim(-1, 1).float()
    maps = F.interpolate(
        maps, size=(new_side, new_side), mode="bicubic", align_corners=False, antialias=new_side < side
    )
    return torch.cat([before, maps.flatten(2).transpose(1, 2).to(embedding.dtype)], 1)
