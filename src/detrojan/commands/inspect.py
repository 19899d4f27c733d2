"""Says what a checkpoint holds that somebody else wrote: nothing in it is run."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click

from detrojan import foreign
from detrojan.foreign import Checkpoint, Known, mapping
from detrojan.foreign.checkpoints import shown
from detrojan.foreign.mapping import Fit

WIDTH = 15  # of the names of lines
MAX_SHOWN = 8  # of a list


def main(path: Path, key: str | None) -> None:
    """Print what the file at ``path`` holds, whose state dict is under ``key`` or is looked for.

    Raises:
        ValueError: it is not read, and why.
    """
    for name, text in lines(foreign.read(path, key)):
        click.echo(f"{name:{WIDTH}} {shown(text)}".rstrip())


def lines(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Yield what a checkpoint holds: a name and a text each."""
    yield "file", str(checkpoint.path)
    yield "kind", checkpoint.kind + (f", {checkpoint.module}" if checkpoint.module else "")
    if checkpoint.place:
        yield "found under", ".".join(checkpoint.place)
    yield "tensors", _tensors(checkpoint)
    yield from _known(checkpoint.known)
    if checkpoint.beside:
        yield "beside them", _some([f"{key} ({_short(value)})" for key, value in checkpoint.beside.items()])
    if checkpoint.names:
        yield "names", _some(list(checkpoint.names), len(checkpoint.names))
    found, refused = mapping.fits(checkpoint.tensors)
    for fit in found:
        yield "fits", _fit(fit)
    if not found:
        yield "fits", "no architecture of ours"
        for name, why in refused.items():
            yield f"  {name}", why


def _tensors(checkpoint: Checkpoint) -> str:
    tensors = checkpoint.tensors.values()
    kinds = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    numbers = sum(tensor.numel() for tensor in tensors)
    return f"{len(tensors)} of {numbers:,} numbers: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}"


def _known(known: Known) -> Iterator[tuple[str, str]]:
    if known.network:
        yield "says network", known.network
    if known.num_classes:
        names = f": {_some(list(known.class_names))}" if known.class_names else ""
        yield "says classes", f"{known.num_classes}{names}"
    if known.mean or known.std:
        yield "says pixels", f"mean {known.mean}, std {known.std}"
    if known.image_size:
        crop = f", of which a crop keeps {known.crop_share:g}" if known.crop_share else ""
        by = f" by {known.interpolation}" if known.interpolation else ""
        yield "says size", f"{known.image_size}{by}{crop}"


def _short(value: object) -> str:
    """Return what a value is: itself if it is a word or a number, else its kind."""
    if isinstance(value, str | int | float | bool) or value is None:
        return f"{value!s:.60}"
    length = f" of {len(value)}" if isinstance(value, dict | list | tuple) else ""
    shape = f" {list(value.shape)}" if hasattr(value, "shape") else ""
    return f"{type(value).__name__}{length}{shape}"


def _fit(fit: Fit) -> str:
    settings = "".join(f", {key} {value}" for key, value in fit.settings.items())
    text = f"{fit.architecture} ({fit.num_classes} classes{settings})"
    renamed = fit.renamed
    if renamed:
        theirs, ours = next(iter(renamed.items()))
        text += f"; {len(renamed)} names change, as {theirs} to {ours}"
    changed = Counter(part.operation for part in fit.parts.values() if part.operation != mapping.SAME)
    return text + "".join(f"; {count} {operation}" for operation, count in changed.items())


def _some(texts: list[str], most: int = MAX_SHOWN) -> str:
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more
