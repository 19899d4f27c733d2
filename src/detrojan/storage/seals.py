"""A checksum that a file carries itself, so that no damaged file is taken for a whole one.

Parquet tables, safetensors and cards all have a place for words of our own, and there each says
``detrojan-sha256:`` and the SHA-256 of all its bytes, its 64 digits taken as zeros. Nothing of a file is
left out, neither header nor footer, and other programs read it as ever.
"""

import hashlib
import logging
import mmap
import os
from pathlib import Path

logger = logging.getLogger(__name__)

FilePath = str | os.PathLike[str]

KEY = "sha256"  # of the seal, among the words that a file has
MARK = b"detrojan-sha256:"
ZEROS = b"0" * 64
BLANK = (MARK + ZEROS).decode()  # what to write under the key, for `seal` to fill in


class DamagedError(Exception):
    """The bytes of a file are not those that were written; :func:`records.readable` says which file's."""


def seal(path: FilePath) -> None:
    """Fill in the checksum of the file at ``path``, which has ``BLANK`` in it."""
    with Path(path).open("r+b") as file:
        # Mapped: a large data set need not be in memory once more.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            start = content.rfind(MARK + ZEROS) + len(MARK)
            assert start >= len(MARK), f"{path}: written without a place for its checksum"
            digest = _digest(content, start)
        file.seek(start)
        file.write(digest)


def read(path: FilePath) -> bytes:
    """Return the bytes of the file at ``path``, which are those that were written.

    A file without a checksum, of another program or an earlier version, is taken with a warning.

    Raises:
        DamagedError: they are not.
        OSError: it can't be read.
    """
    content = Path(path).read_bytes()
    # Backwards: where tables have it, at their end, it is found at once.
    start = content.rfind(MARK)
    if start < 0:
        logger.warning("%s: it has no checksum, by which damage would show; another program wrote it", path)
        return content
    start += len(MARK)
    if content[start : start + len(ZEROS)] != _digest(content, start):
        raise DamagedError("damaged: its SHA-256 is not the one that it was written with")
    return content


def _digest(content: bytes | mmap.mmap, start: int) -> bytes:
    """Return the digest of ``content``, in hexadecimal, with zeros in place of the one at ``start``."""
    total = hashlib.sha256()
    with memoryview(content) as view:
        for part in (view[:start], ZEROS, view[start + len(ZEROS) :]):
            total.update(part)
    return total.hexdigest().encode()
