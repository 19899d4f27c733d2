"""Detrojan measures how well backdoor mitigation repairs image classifiers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detrojan.reading import (
        read_cells,
        read_comparisons,
        read_consistency,
        read_measures,
        read_models,
        read_outcomes,
        read_ranks,
        read_summary,
    )

__version__ = "0.1.0"

__all__ = [
    "read_cells",
    "read_comparisons",
    "read_consistency",
    "read_measures",
    "read_models",
    "read_outcomes",
    "read_ranks",
    "read_summary",
]


def __getattr__(name: str) -> Any:
    """Return what reads a table. It takes pandas, which no job that parses the workflow should wait for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from detrojan import reading

    return getattr(reading, name)
