"""Rows that stages write: how a run of a defense has ended, and what it took."""

import json
from collections.abc import Mapping
from typing import Any

from detrojan.cells import Shard
from detrojan.learning.meter import Cost
from detrojan.storage import provenance
from detrojan.storage.columns import COST, cell_key


def run_row(
    shard: Shard,
    draw: int,
    outcome: dict[str, Any],
    settings: dict[str, Any],
    chosen: dict[str, Any],
    cost: Cost,
    code: str,
    *,
    images: int = 0,
    sources: Mapping[str, str] | None = None,
    deviates: bool = False,
) -> dict[str, Any]:
    """Return a row of ``RUNS``.

    Args:
        shard: names the cell but for its draw.
        draw: names the cell within the shard.
        outcome: ``status`` and ``reason``.
        settings: the defense's resolved hyperparameters.
        chosen: what the defense noted.
        cost: what it took.
        code: digest of the code that ran.
        images: clean ones that the defender held.
        sources: whose value each setting is, see :meth:`.Study.sources`.
        deviates: whether the study has set others than the protocol's.
    """
    spent = vars(cost)
    return {
        **cell_key(shard, draw),
        **outcome,
        "chosen": json.dumps(chosen, sort_keys=True),
        "hyperparameters": json.dumps(settings, sort_keys=True),
        "sources": json.dumps(dict(sources or {}), sort_keys=True),
        "deviates": deviates,
        "steps": cost.steps,
        "images_a_step": cost.step_images / cost.steps if cost.steps else None,
        "passes": cost.step_images / images if cost.steps and images else None,
        **{field.name: spent[field.name] for field in COST},
        **provenance.origin(code),
    }
