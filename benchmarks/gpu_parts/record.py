"""What was measured, written as soon as it is there: a run that is cut off loses nothing."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa

from detrojan.storage import records

LONG = pa.schema(
    [
        pa.field("part", pa.string(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("value", pa.float64()),
        pa.field("text", pa.string()),
    ]
)


class Record:
    """The rows of all parts, in ``gpu.json`` and, a line a value, in ``gpu.parquet``.

    Attributes:
        folder: where both lie.
        parts: the rows of each part.
        left_out: what each part had no time for, or no means, and why.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: dict[str, list[dict[str, Any]]] = {}
        self.left_out: dict[str, list[tuple[str, str]]] = {}

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Add a row of plain values, and write."""
        self.parts.setdefault(part, []).append(row)
        self.write()

    def leave_out(self, part: str, what: str, why: str) -> None:
        """Note that ``what`` was not measured; it is written with the next row."""
        self.left_out.setdefault(part, []).append((what, why))

    def write(self) -> None:
        """Write both files, whole."""
        everything = {"parts": self.parts, "left_out": self.left_out}
        records.write_card(everything, self.folder / "gpu.json")
        rows = [
            {"part": part, "row": number, "name": name, **_columns(value)}
            for part, of_part in self.parts.items()
            for number, row in enumerate(of_part)
            for name, value in row.items()
        ]
        records.write_rows(rows, self.folder / "gpu.parquet", LONG)

    def missing(self) -> list[str]:
        """Return a line for each reason why something was left out, with how much and what."""
        lines = []
        for part, left in self.left_out.items():
            for why, count in Counter(why for _, why in left).items():
                names = [what for what, reason in left if reason == why]
                more = f" and {count - 3} more" if count > 3 else ""
                lines.append(f"{part}: {', '.join(names[:3])}{more}: {why}")
        return lines


def _columns(value: Any) -> dict[str, Any]:
    """Return a value as number or as text; what is neither, as JSON."""
    if isinstance(value, bool | int | float):
        return {"value": float(value), "text": None}
    return {"value": None, "text": value if value is None or isinstance(value, str) else json.dumps(value)}
