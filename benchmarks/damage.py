"""Flips bits of the files of a finished study, one at a time, and counts what becomes of them.

    python benchmarks/damage.py results --flips 2000

Each kind of file is read as the workflow reads it. A flip is *refused* with one line that names the file,
or what is read is *equal* to what was written; *wrong* content that is taken for right must never be. With
``--unchecked`` the checksums of whole files are not looked at: what the formats themselves would notice.
The files themselves stay as they are; copies are damaged.
"""

import argparse
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from detrojan.images import ImageSet
from detrojan.storage import artifacts, records, seals

OUTCOMES = ("refused", "equal", "wrong", "unclear")  # unclear: an error that isn't one line with the file


class Kind(NamedTuple):
    """A kind of file: where it lies below the results, and what is read of it, to compare by ``==``."""

    pattern: str
    read: Callable[[Path], Any]


def _images(images: ImageSet) -> Any:
    parts = (images.images, images.labels, images.index, images.true_labels)
    return images.info, [(part.dtype, tuple(part.shape), part.numpy().tobytes()) for part in parts]


def _samples(path: Path) -> Any:
    samples = artifacts.read_samples(path)
    return {draw: (_images(one.train), _images(one.validation)) for draw, one in samples.items()}


def _table(path: Path) -> Any:
    table = records.read_table(path)
    # As text, where NaN equals itself.
    return table.schema.to_string(truncate_metadata=False), repr(table.to_pydict())


def _tensors(path: Path) -> Any:
    tensors, metadata = artifacts.read_tensors(path)
    return {k: (v.dtype, tuple(v.shape), v.numpy().tobytes()) for k, v in tensors.items()}, metadata


KINDS = {
    "images": Kind("datasets/*/test.parquet", lambda path: _images(artifacts.read_images(path))),
    "samples": Kind("samples/**/*.parquet", _samples),
    "metrics": Kind("metrics/**/metrics.parquet", _table),
    "predictions": Kind("metrics/**/predictions.parquet", _table),
    "history": Kind("models/**/history.parquet", _table),
    "tables": Kind("tables/*.parquet", _table),
    "safetensors": Kind("models/**/model.safetensors", _tensors),
    "cards": Kind("**/card.json", records.read_card),
}


def outcomes(path: Path, kind: Kind, bits: Iterable[int], scratch: Path) -> Counter[str]:
    """Return how often each of ``OUTCOMES`` came of flipping each of ``bits`` of a file, one at a time.

    Args:
        path: of the file.
        kind: what it is.
        bits: numbers of bits from the start of the file.
        scratch: a folder for the damaged copy.
    """
    whole, content = path.read_bytes(), kind.read(path)
    copy = scratch / path.absolute().relative_to("/")  # of no other place, which would be refused too
    copy.parent.mkdir(parents=True, exist_ok=True)
    found: Counter[str] = Counter()
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        copy.write_bytes(damaged)
        try:
            found["equal" if kind.read(copy) == content else "wrong"] += 1
        except ValueError as error:
            named = str(error).startswith(f"{copy}: ") and "\n" not in str(error)
            found["refused" if named else "unclear"] += 1
        except (Exception, pa.ArrowException):
            found["unclear"] += 1
    return found


def damaged(results: Path, flips: int, seed: int) -> dict[str, Counter[str]]:
    """Return :func:`outcomes` of each kind, of ``flips`` bits drawn over all its files in ``results``.

    Raises:
        ValueError: the study has no file of a kind.
    """
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, kind in KINDS.items():
            files = sorted(results.glob(kind.pattern))
            if not files:
                raise ValueError(f"{results}: no {kind.pattern}; name the results of a finished study")
            found[name] = _of_files(files, kind, flips, np.random.default_rng(seed), Path(scratch))
    return found


def _of_files(
    files: list[Path], kind: Kind, flips: int, rng: np.random.Generator, scratch: Path
) -> Counter[str]:
    counts = Counter(int(number) for number in rng.integers(len(files), size=flips))
    found: Counter[str] = Counter()
    for number, count in counts.items():
        bits = rng.integers(8 * files[number].stat().st_size, size=count)
        found += outcomes(files[number], kind, map(int, bits), scratch)
    return found


def main() -> int:
    """Damage copies of the files that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="folder of results of a finished study")
    parser.add_argument("--flips", type=int, default=2000, help="bits to flip, of each kind of file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unchecked", action="store_true", help="without the checksums of whole files")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)  # where the word itself is hit by which a checksum is found
    if asked.unchecked:
        seals.read = lambda path: Path(path).read_bytes()
    try:
        found = damaged(asked.results, asked.flips, asked.seed)
    except ValueError as error:
        sys.exit(str(error))
    print(f"| kind | {' | '.join(OUTCOMES)} |\n|---|{'--:|' * len(OUTCOMES)}")
    for name, counts in found.items():
        print(f"| {name} | {' | '.join(f'{counts[outcome]:,}' for outcome in OUTCOMES)} |")
    return int(any(counts["wrong"] or counts["unclear"] for counts in found.values()))


if __name__ == "__main__":
    sys.exit(main())
