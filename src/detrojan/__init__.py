"""Detrojan measures how well backdoor mitigation repairs image classifiers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detrojan.reading import Reader

__version__ = "0.1.0"


def __getattr__(name: str) -> "Reader":
    """Return what reads a table: ``read_cells``, ``read_ranks``, one for each table that there is.

    It takes pandas, which no job that parses the workflow should wait for.
    """
    if name == "__all__":
        return _readers()  # type: ignore[return-value]  # `from detrojan import *` asks for it
    if not name.startswith("read_") or name not in _readers():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from detrojan import reading

    return reading.reader(name.removeprefix("read_"))


def __dir__() -> list[str]:
    return [*globals(), *_readers()]


def _readers() -> list[str]:
    from detrojan import registry

    return [f"read_{name}" for name in (*registry.GATHERED, *registry.names(registry.TABLES))]
