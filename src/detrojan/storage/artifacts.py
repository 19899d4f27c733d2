"""What jobs hand on to each other as tensors: images, triggers and models, without a pickle.

They are written whole or not at all, and read with one clear line on bad input, as what needs no torch
is in :mod:`detrojan.storage.records`.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from detrojan import models
from detrojan.errors import DivergedError
from detrojan.images import DatasetInfo, DefenderSample, ImageSet, TriggeredSample
from detrojan.settings import Augmentation
from detrojan.storage import records, seals
from detrojan.storage.records import FilePath

SPLITS = ("train", "validation")  # of a defender's sample


# --- images ----------------------------------------------------------------------------------------


def write_images(images: ImageSet, path: FilePath) -> None:
    """Write a set whose labels are the true ones (``index``, ``image``, ``label``)."""
    _write_image_table(images, {}, path)


def write_poisoned(images: ImageSet, path: FilePath) -> None:
    """Write a poisoned or triggered set (``index``, ``image``, ``label``, ``true_label``)."""
    true = pa.array(images.true_labels.cpu().numpy().astype(np.int16))
    _write_image_table(images, {"true_label": true}, path)


def read_images(path: FilePath, poisoned: FilePath | None = None) -> ImageSet:
    """Return the set at ``path``, with the rows at ``poisoned``, if any, in place of its own.

    Without a column ``true_label`` the labels are the true ones.
    """
    images = _image_set(records.read_table(path), path)
    return images.replaced(_image_set(records.read_table(poisoned), poisoned)) if poisoned else images


def read_images_if_any(path: FilePath | None) -> ImageSet | None:
    """Return the set at ``path``; None for an input that the rule does without."""
    return read_images(path) if path else None


def write_samples(samples: Mapping[int, DefenderSample], path: FilePath) -> None:
    """Write the clean images of each draw's sample (``draw``, ``split``, the data set's columns)."""
    _write_samples({draw: (sample.train, sample.validation) for draw, sample in samples.items()}, path)


def write_stamped(samples: Mapping[int, TriggeredSample], path: FilePath) -> None:
    """Write the triggered copies of each draw's sample, in the columns of :func:`write_samples`."""
    _write_samples({draw: (sample.train, sample.validation) for draw, sample in samples.items()}, path)


def read_samples(path: FilePath | None, stamped: FilePath | None = None) -> dict[int, DefenderSample]:
    """Return the defender's sample of each draw; with ``stamped``, its triggered copies too.

    Empty without a ``path``: the sample of a method that is given no data.
    """
    clean = _read_splits(path) if path else {}
    triggered = _read_splits(stamped) if stamped else {}
    if stamped:
        for draw, (train, validation) in clean.items():
            if draw not in triggered or not (
                torch.equal(triggered[draw][0].index, train.index)
                and torch.equal(triggered[draw][1].index, validation.index)
            ):
                raise ValueError(
                    f"{stamped}: not the copies of {path} (draw {draw}); delete both and run again"
                )
    return {
        draw: DefenderSample(
            train, validation, TriggeredSample(*triggered[draw]) if draw in triggered else None
        )
        for draw, (train, validation) in clean.items()
    }


def _write_samples(splits: Mapping[int, tuple[ImageSet, ImageSet]], path: FilePath) -> None:
    tables = []
    for draw, both in splits.items():
        for name, images in zip(SPLITS, both, strict=True):
            table = _image_table(images)
            columns = {
                "draw": pa.array(np.full(len(images), draw, np.int32)),
                "split": pa.array([name] * len(images), pa.string()),
            }
            tables.append(pa.table(columns | dict(zip(table.column_names, table.columns, strict=True))))
    _write(pa.concat_tables(tables), next(iter(splits.values()))[0].info, path)


def _read_splits(path: FilePath) -> dict[int, tuple[ImageSet, ImageSet]]:
    table = records.read_table(path)
    with records.readable(path, "sample"):
        draws, names = table["draw"].to_numpy(), np.asarray(table["split"].to_pylist())
    images = _image_set(table, path)
    return {
        int(draw): cast(
            "tuple[ImageSet, ImageSet]",
            tuple(images[torch.from_numpy((draws == draw) & (names == name))] for name in SPLITS),
        )
        for draw in np.unique(draws)
    }


def _write_image_table(images: ImageSet, extra: Mapping[str, pa.Array], path: FilePath) -> None:
    table = _image_table(images)
    for name, column in extra.items():
        table = table.append_column(name, column)
    _write(table, images.info, path)


def _write(table: pa.Table, info: DatasetInfo, path: FilePath) -> None:
    table = table.replace_schema_metadata(_metadata(info))
    records.write_table(table, path, table.schema)


def _image_table(images: ImageSet) -> pa.Table:
    pixels = images.images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    kind = pa.binary(pixels[0].size if len(pixels) else images.info.height * images.info.width * 3)
    column = pa.FixedSizeBinaryArray.from_buffers(kind, len(pixels), [None, pa.py_buffer(pixels.tobytes())])
    return pa.table(
        {
            "index": pa.array(images.index.cpu().numpy().astype(np.int32)),
            "image": column,
            "label": pa.array(images.labels.cpu().numpy().astype(np.int16)),
        }
    )


def _metadata(info: DatasetInfo) -> dict[str, str]:
    return {
        "detrojan": json.dumps(dataclasses.asdict(info) | {"augmentation": info.augmentation.model_dump()})
    }


def _info(metadata: Mapping[bytes, bytes] | None) -> DatasetInfo:
    raw = json.loads((metadata or {})[b"detrojan"])
    raw["augmentation"] = Augmentation(**raw["augmentation"])
    return DatasetInfo(**_with_tuples(raw))


def _with_tuples(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``raw`` with tuples in place of its lists: JSON knows lists only."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}


def _image_set(table: pa.Table, path: FilePath) -> ImageSet:
    with records.readable(path, "image table"):
        info = _info(table.schema.metadata)
        size = info.height * info.width * 3
        column, kind = table["image"], table.schema.field("image").type
        if kind != pa.binary(size):
            raise ValueError(
                f"{path}: column image is {kind}, but {info.height}×{info.width} RGB is {size} bytes"
            )
        index = torch.from_numpy(table["index"].to_numpy().astype(np.int64))
        labels = torch.from_numpy(table["label"].to_numpy().astype(np.int64))
        has_true = "true_label" in table.column_names
        true = torch.from_numpy(table["true_label"].to_numpy().astype(np.int64)) if has_true else labels
    pixels = np.empty((len(column), info.height, info.width, 3), np.uint8)
    start = 0
    for chunk in column.chunks:
        raw = np.frombuffer(chunk.buffers()[1], np.uint8)[
            chunk.offset * size : (chunk.offset + len(chunk)) * size
        ]
        pixels[start : start + len(chunk)] = raw.reshape(-1, info.height, info.width, 3)
        start += len(chunk)
    try:
        return ImageSet(torch.from_numpy(pixels).permute(0, 3, 1, 2), labels, index, info, true)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


# --- tensors and models ----------------------------------------------------------------------------


def write_tensors(tensors: Mapping[str, Tensor], path: FilePath, **metadata: object) -> None:
    """Write named tensors as safetensors, with a checksum; ``metadata`` values are stored as JSON."""
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    texts |= {records.PLACE: records.place(path), seals.KEY: seals.BLANK}
    with records.sealed(path) as partial:
        # In memory first: the library's own files are for their owner alone, whatever the umask says.
        content = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, texts)
        partial.write_bytes(_in_order(content))


def read_tensors(path: FilePath) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the named tensors at ``path``, on the CPU, and its metadata.

    Raises:
        ValueError: it is missing, damaged or another's.
    """
    with records.readable(path, "safetensors file"):
        content = seals.read(path)
        texts = _header(content)[0].get("__metadata__", {})
        texts.pop(seals.KEY, None)
        records.check_place(path, texts.pop(records.PLACE, ""))
        metadata = {key: json.loads(value) for key, value in texts.items()}
        tensors = load(content)
        # Copies start where torch aligns its memory. In the file tensors start anywhere, and on some
        # processors a convolution's last bits depend on that: a model that was read would differ.
        return {name: tensors[name].clone() for name in sorted(tensors)}, metadata


def _in_order(content: bytes) -> bytes:
    """Return a safetensors file with its metadata in order: the library shuffles it, at each run anew."""
    header, size = _header(content)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _header(content: bytes) -> tuple[dict[str, Any], int]:
    """Return what a safetensors file says of its tensors, with its metadata, and in how many bytes."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), size


def write_model(model: "models.Classifier", path: FilePath, **metadata: object) -> None:
    """Write a classifier's weights, and all that :func:`read_model` needs to build it again.

    Raises:
        DivergedError: a weight is not finite.
    """
    check_finite(model, str(path))
    write_tensors(model.network.state_dict(), path, build=dataclasses.asdict(model.build), **metadata)


def read_model(path: FilePath) -> "models.Classifier":
    """Return the classifier at ``path``, on the CPU and in eval mode.

    Raises:
        ValueError: the file is broken, or its tensors are not those of the architecture that it names.
        DivergedError: a weight is not finite.
    """
    tensors, metadata = read_tensors(path)
    with records.readable(path, "model"):
        build = models.Build(**_with_tuples(metadata["build"]))
    try:
        model = models.restore(build, tensors)
    except ValueError as error:  # pydantic's too: a setting of the architecture that there is no more
        raise ValueError(
            f"{path}: {records.one_line(error)}; delete the file and run the workflow again"
        ) from error
    check_finite(model, str(path))
    return model


def read_model_if_any(path: FilePath | None, device: torch.device) -> "models.Classifier | None":
    """Return the classifier at ``path`` on ``device``; None for an input that the rule does without."""
    return read_model(path).place(device) if path else None


def check_finite(model: nn.Module, what: str) -> None:
    """Raise ``DivergedError`` if a floating-point weight or buffer of ``model`` is not finite."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise DivergedError(f"{what}: tensor {name} has values that are not finite")
