"""Images that a table keeps as lists of lists of numbers, as `datasets` writes its Array2D and Array3D."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from detrojan.datasets.base import BrokenImageError, Found, Pixels, resize_all

CHANNELS = (1, 3)


def is_array(kind: pa.DataType) -> bool:
    """Return whether a column holds lists of lists of integers, of two or three levels."""
    levels = 0
    while _is_list(kind):
        kind, levels = kind.value_type, levels + 1
    return levels in (2, 3) and bool(pa.types.is_integer(kind))


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def read_all(
    rows: Iterable[tuple[str, pa.Array]], num_images: int, side: int, found: Found | None = None
) -> Pixels:
    """Return images as RGB, resized, uint8 (num_images, side, side, 3), in the order of ``rows``.

    Args:
        rows: the name of each image, for errors, and its value: an array of one row.
        num_images: how many there are.
        side: of the result, pixels.
        found: is told the sizes.

    Raises:
        BrokenImageError: some are no images; all are tried.
    """
    pixels = np.empty((num_images, side, side, 3), np.uint8)
    broken = []
    for number, (name, row) in enumerate(rows):
        try:
            image = _rgb(_numbers(row))
        except ValueError as error:
            broken.append(f"{name}: {error}")
            continue
        pixels[number] = resize_all(image[None], side)[0]
        if found:
            found.sizes[image.shape[1], image.shape[0]] += 1
    if broken:
        raise BrokenImageError.of(broken)
    return pixels


def _numbers(row: pa.Array) -> npt.NDArray[np.integer]:
    """Return the numbers of nested lists in their shape."""
    shape = []
    while _is_list(row.type):
        if row.null_count:
            raise ValueError("no image (there is a null in it)")
        lengths = pc.unique(pc.list_value_length(row)).to_pylist()
        if len(lengths) != 1 or not lengths[0]:
            raise ValueError("no image (its lists are empty, or of several lengths)")
        shape.append(lengths[0])
        row = row.flatten()
    if row.null_count:
        raise ValueError("no image (there is a null in it)")
    return np.asarray(row).reshape(shape)


def _rgb(numbers: npt.NDArray[np.integer]) -> Pixels:
    """Return grey levels (H, W), (H, W, C) or (C, H, W) as RGB, uint8 (H, W, 3)."""
    low, high = numbers.min(), numbers.max()
    if low < 0 or high > 255:
        raise ValueError(f"levels from {low} to {high}, but they must lie in 0 to 255")
    if numbers.ndim == 2:
        numbers = numbers[:, :, None]
    else:
        is_first, is_last = (numbers.shape[axis] in CHANNELS for axis in (0, 2))
        if is_first == is_last:
            why = (
                "the channels may be the first or the last" if is_first else "neither end is 1 or 3 channels"
            )
            raise ValueError(f"{' x '.join(map(str, numbers.shape))} numbers, of which {why}")
        numbers = numbers.transpose(1, 2, 0) if is_first else numbers
    return np.ascontiguousarray(np.broadcast_to(numbers, (*numbers.shape[:2], 3)), np.uint8)
