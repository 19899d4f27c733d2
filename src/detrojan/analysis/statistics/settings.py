"""Holds the settings that rows were made with against those of the study that their tables are of."""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from detrojan.cells import CELL_AXES, MODEL_AXES, NO_METHOD, axes_text
from detrojan.study.schema import Study

MOST_NAMED = 5


def check(cells: pa.Table, models: pa.Table, study: Study) -> None:
    """Refuse rows that were made with other settings than the study has.

    Args:
        cells: of the schema ``GATHERED``.
        models: of the schema ``MODELS``.
        study: whose tables they go into.

    Raises:
        ValueError: there are some; the message names them.
    """
    wrong = [*_wrong_models(models, study), *_wrong_cells(cells, study)]
    if wrong:
        more = f", and {len(wrong) - MOST_NAMED:,} more" if len(wrong) > MOST_NAMED else ""
        raise ValueError(
            f"{len(wrong):,} results have other settings than the study: "
            f"{'; '.join(wrong[:MOST_NAMED])}{more}: "
            "run the workflow with this study again, which makes them anew"
        )


def _wrong_models(models: pa.Table, study: Study) -> Iterator[str]:
    for row in models.to_pylist():
        axes = {axis: row[axis] for axis in MODEL_AXES}
        wanted = {
            "architecture_settings": study.method("models", row["architecture"], axes),
            "optimization": study.optimization(axes),
        }
        if row["attack"] != NO_METHOD:
            wanted["attack_hyperparameters"] = study.method("attacks", row["attack"], axes)
        for column, values in wanted.items():
            if difference := _difference(row[column], values):
                yield f"model {axes_text(axes)} ({difference})"


def _wrong_cells(cells: pa.Table, study: Study) -> Iterator[str]:
    """Yield the cells that were defended otherwise; those that were given up have no settings."""
    known: dict[tuple[Any, ...], str] = {}
    for row in cells.select([*CELL_AXES, "hyperparameters", "code"]).to_pylist():
        if row["defense"] == NO_METHOD or not row["code"]:
            continue
        axes = {axis: row[axis] for axis in CELL_AXES}
        # All draws of a shard were given the same.
        key = (*list(axes.values())[:-1], row["hyperparameters"])
        if key not in known:
            known[key] = _difference(row["hyperparameters"], study.method("defenses", row["defense"], axes))
        if known[key]:
            yield f"cell {axes_text(axes)} ({known[key]})"


def _difference(kept: str, wanted: dict[str, Any]) -> str:
    """Return in words how settings, as JSON, differ from those of the study; empty if they don't."""
    found = json.loads(kept)
    names = [name for name in found.keys() | wanted.keys() if found.get(name, ...) != wanted.get(name, ...)]
    return ", ".join(f"{name} was {found.get(name)!r}, is {wanted.get(name)!r}" for name in sorted(names))
