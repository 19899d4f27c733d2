"""Where tables and figures lie, below a folder of results or that of a report: said here alone."""

from pathlib import Path

TABLES, FIGURES = "tables", "figures"


def table(folder: Path, name: str, kind: str = "parquet") -> Path:
    """Return the path of a table below ``folder``; ``kind`` is how its name ends."""
    return folder / TABLES / f"{name}.{kind}"


def figure(folder: Path, name: str, kind: str) -> Path:
    """Return the path of a figure below ``folder``; ``kind`` is how its name ends."""
    return folder / FIGURES / f"{name}.{kind}"
