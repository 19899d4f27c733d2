"""Brings a checkpoint's tensors under the names of a network: exactly, or not at all.

Names are changed by rules alone, and then all names and all shapes must be equal. Tensors are never paired
by their order, as BackdoorBench does where names differ: two kernels of one shape that changed places load
so without an error.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from detrojan import registry

# Put before all names by DataParallel, torch.compile, wrappers, and BackdoorBench's Sequential(Resize, ViT).
PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "1.")
COUNTER = "num_batches_tracked"  # of batch normalization; files of old versions lack it, and nothing needs it
MAX_SHOWN = 10  # of the tensors that differ
# What torch's weight and spectral normalization leave in place of a weight.
REPARAMETRIZED = ("weight_g", "weight_v", "weight_u")
SAME, MASKED, JOINED, FILLED = "same", "masked", "joined", "filled with 0"


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor under its new name.

    Attributes:
        tensor: its values.
        sources: the file's names that it came from; none if the file lacks it.
        operation: how: ``SAME``, ``MASKED`` (the first times the second), ``JOINED`` (their rows, one below
            the other) or ``FILLED``.
    """

    tensor: Tensor
    sources: tuple[str, ...]
    operation: str = SAME


Parts = dict[str, Part]
Shapes = dict[str, tuple[int, ...]]
Rule = Callable[[Parts], Parts]


@dataclasses.dataclass(frozen=True)
class Fit:
    """An architecture of ours that a checkpoint fits.

    Attributes:
        architecture: its name.
        settings: those of its fields that the tensors tell.
        num_classes: the length of a row of logits.
        parts: all tensors of its state, in its order. Their types are those of the file.
    """

    architecture: str
    settings: dict[str, object]
    num_classes: int
    parts: Parts

    @property
    def renamed(self) -> dict[str, str]:
        """Return our names by the file's, where a tensor has another name and nothing else changed."""
        same = {part.sources[0]: name for name, part in self.parts.items() if part.operation == SAME}
        return {theirs: ours for theirs, ours in same.items() if theirs != ours}


def match(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> Parts:
    """Return ``tensors`` under the names of ``shapes``, in its order.

    Args:
        tensors: by a file's names.
        shapes: of the state of the network that they should fit, by its names.

    Raises:
        ValueError: they do not fit; it says which differ where fewest do.
    """
    return _first(tensors, lambda _: shapes)


def fit(tensors: Mapping[str, Tensor], architecture: str) -> Fit:
    """Return how ``tensors`` fit an architecture of ours.

    The number of classes, and settings such as a width, are read from their shapes.

    Raises:
        ValueError: they do not fit; it says which differ where fewest do.
    """
    try:
        parts = _first(
            tensors, lambda parts: dict(_shapes(architecture, *_told_by_shapes(parts, architecture)))
        )
    except ValueError as error:
        raise ValueError(f"{architecture}: {error}") from error
    settings, num_classes = _told_by_shapes(parts, architecture)
    return Fit(architecture, dict(settings), num_classes, parts)


def fits(tensors: Mapping[str, Tensor]) -> tuple[list[Fit], dict[str, str]]:
    """Return the architectures of ours that ``tensors`` fit; and why not, by the names of the others."""
    found, refused = [], {}
    for name in registry.names("models"):
        try:
            found.append(fit(tensors, name))
        except ValueError as error:
            refused[name] = str(error).removeprefix(f"{name}: ")
    return found, refused


def _first(tensors: Mapping[str, Tensor], wanted: Callable[[Parts], Mapping[str, tuple[int, ...]]]) -> Parts:
    """Return the first candidate that has the names and shapes that are wanted of it, in their order.

    Raises:
        ValueError: none has.
    """
    wrong: list[list[str]] = []
    for parts in candidates(tensors):
        shapes = wanted(parts)
        filled = _filled(parts, shapes)
        wrong.append(differences(filled, shapes))
        if not wrong[-1]:
            return {name: filled[name] for name in shapes}
    raise ValueError(_told(min(wrong, key=len)))


def differences(parts: Mapping[str, Part], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return a text a tensor that is missing, unexpected or of another shape; nothing if all are equal."""
    wrong = []
    for name in [*shapes, *(name for name in parts if name not in shapes)]:
        found = tuple(parts[name].tensor.shape) if name in parts else None
        if name not in shapes:
            wrong.append(f"unexpected {name} {list(found or ())}")
        elif found is None:
            wrong.append(f"missing {name} {list(shapes[name])}")
        elif found != shapes[name]:
            wrong.append(f"{name} is {list(found)} and not {list(shapes[name])}")
    return wrong


def _told(wrong: list[str]) -> str:
    more = f"; and {len(wrong) - MAX_SHOWN} more" if len(wrong) > MAX_SHOWN else ""
    return f"{len(wrong)} tensors differ: {'; '.join(wrong[:MAX_SHOWN])}{more}"


# --- names -----------------------------------------------------------------------------------------


def candidates(tensors: Mapping[str, Tensor]) -> Iterator[Parts]:
    """Yield the tensors under each set of names that the rules give, from the file's own on.

    Raises:
        ValueError: a weight is not there itself, but as what weight or spectral normalization made of it.
    """
    parts = _unmasked({name: Part(tensor, (name,)) for name, tensor in tensors.items()})
    for name in parts:
        if name.endswith(REPARAMETRIZED) or "parametrizations." in name or name.endswith("_orig"):
            raise ValueError(
                f"{name} is left by weight or spectral normalization: take these off before you save "
                "(torch.nn.utils.parametrize.remove_parametrizations)"
            )
    prefix: str | None = ""
    while prefix is not None:
        parts = {name.removeprefix(prefix): part for name, part in parts.items()}
        yield parts
        for rule in RULES:
            changed = rule(parts)
            # All of it: two names that would become one leave the rule aside.
            if changed.keys() != parts.keys() and _num_sources(changed) == _num_sources(parts):
                yield changed
        prefix = next((each for each in PREFIXES if all(name.startswith(each) for name in parts)), None)


def _num_sources(parts: Parts) -> int:
    return sum(len(part.sources) for part in parts.values())


def _unmasked(parts: Parts) -> Parts:
    """Return pruned weights times their masks: torch's pruning saves ``X_orig`` and ``X_mask``."""
    done: Parts = {}
    for name, part in parts.items():
        stem = name.removesuffix("_orig")
        mask = parts.get(f"{stem}_mask")
        if stem != name and stem not in parts and mask is not None and mask.tensor.shape == part.tensor.shape:
            done[stem] = Part(part.tensor * mask.tensor, (*part.sources, *mask.sources), MASKED)
        elif not name.endswith("_mask") or f"{name.removesuffix('_mask')}_orig" not in parts:
            done[name] = part
    return done


def _shortcut(parts: Parts) -> Parts:
    """Return a shortcut's convolution as ours is called: BackdoorBench's lies in a Sequential.

    Where the Sequential has a normalization besides (``shortcut.1``), as in ResNet-18, ours does too.
    """
    if any(".shortcut.1." in name for name in parts):
        return parts
    return {name.replace(".shortcut.0.", ".shortcut."): part for name, part in parts.items()}


# Hugging Face's names of a ViT and timm's, ends aside; "*" is the number of a block.
VIT = {
    "vit.embeddings.cls_token": "cls_token",
    "vit.embeddings.position_embeddings": "pos_embed",
    "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "vit.encoder.layer.*.layernorm_before": "blocks.*.norm1",
    "vit.encoder.layer.*.attention.output.dense": "blocks.*.attn.proj",
    "vit.encoder.layer.*.layernorm_after": "blocks.*.norm2",
    "vit.encoder.layer.*.intermediate.dense": "blocks.*.mlp.fc1",
    "vit.encoder.layer.*.output.dense": "blocks.*.mlp.fc2",
    "vit.layernorm": "norm",
    "classifier": "head",
}
QKV = ("query", "key", "value")  # which timm has as one layer, in this order
ATTENTION = re.compile(
    r"vit\.encoder\.layer\.(\d+)\.attention\.attention\.(?:query|key|value)\.(weight|bias)"
)


def _timm_vit(parts: Parts) -> Parts:
    """Return a ViT of Hugging Face's under timm's names; its queries, keys and values become one layer."""
    if not any(name.startswith("vit.embeddings.") for name in parts):
        return parts
    done: Parts = {}
    for name, part in parts.items():
        attention = ATTENTION.fullmatch(name)
        if attention is None:
            done[_timm_name(name)] = part
            continue
        block, end = attention.groups()
        stem = f"vit.encoder.layer.{block}.attention.attention"
        three = [parts.get(f"{stem}.{which}.{end}") for which in QKV]
        rows = [one for one in three if one is not None and one.tensor.shape == part.tensor.shape]
        if len(rows) == len(QKV):
            sources = tuple(source for one in rows for source in one.sources)
            joined = f"blocks.{block}.attn.qkv.{end}"
            done[joined] = done.get(joined) or Part(torch.cat([o.tensor for o in rows]), sources, JOINED)
        else:
            done[name] = part
    return done


def _timm_name(name: str) -> str:
    number = re.search(r"\.(\d+)\.", name)
    general = re.sub(r"\.\d+\.", ".*.", name, count=1)
    stem, dot, end = general.rpartition(".")
    renamed = VIT.get(general) or (f"{VIT[stem]}{dot}{end}" if stem in VIT else "")
    return renamed.replace("*", number[1] if number else "") or name


RULES: tuple[Rule, ...] = (_shortcut, _timm_vit)


def _filled(parts: Parts, shapes: Mapping[str, tuple[int, ...]]) -> Parts:
    """Return the tensors with 0 for counters of batches that a file lacks."""
    lacking = [name for name in shapes if name.endswith(COUNTER) and name not in parts]
    return parts | {name: Part(torch.zeros((), dtype=torch.int64), (), FILLED) for name in lacking}


# --- our architectures -----------------------------------------------------------------------------

# By which tensor's rows a setting of an architecture is known.
TELLING = {"preactresnet18": {"width": "conv1.weight"}}


def _told_by_shapes(parts: Parts, architecture: str) -> tuple[tuple[tuple[str, int], ...], int]:
    """Return an architecture's settings and its number of classes, as far as shapes tell them.

    Settings that it can't have are left out: the shapes then differ.
    """
    settings = []
    for setting, name in TELLING.get(architecture, {}).items():
        rows = _num_rows(parts, name)
        if rows is not None and _may_have(architecture, setting, rows):
            settings.append((setting, rows))
    classes = [_num_rows(parts, name) for name in _head(architecture)]
    return tuple(settings), next((rows for rows in classes if rows), 1)


def _num_rows(parts: Parts, name: str) -> int | None:
    """Return the rows of a tensor; None if there is no such tensor, or it is a single number."""
    return len(parts[name].tensor) if name in parts and parts[name].tensor.ndim else None


def _may_have(architecture: str, setting: str, value: int) -> bool:
    try:
        registry.load("models", architecture, {setting: value})
    except ValueError:
        return False
    return True


@functools.cache
def _head(architecture: str) -> tuple[str, ...]:
    """Return the names of the tensors that have a row a class."""
    two, three = (dict(_shapes(architecture, (), num_classes)) for num_classes in (2, 3))
    return tuple(name for name in two if two[name] != three[name])


@functools.lru_cache(maxsize=64)
def _shapes(
    architecture: str, settings: tuple[tuple[str, int], ...], num_classes: int
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return the shape of each tensor of an architecture's state, by name, in its order."""
    with torch.device("meta"):
        network = registry.load("models", architecture, dict(settings)).network(num_classes)
    return tuple((name, tuple(tensor.shape)) for name, tensor in network.state_dict().items())
