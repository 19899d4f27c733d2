"""Rows that stages write: how a run of a defense has ended, and what it took."""

import json
from typing import Any

from detrojan.cells import Shard
from detrojan.storage import provenance
from detrojan.storage.columns import cell_key


def run_row(
    shard: Shard,
    draw: int,
    outcome: dict[str, Any],
    settings: dict[str, Any],
    chosen: dict[str, Any],
    cost: dict[str, Any],
    code: str,
) -> dict[str, Any]:
    """Return a row of ``RUNS``.

    Args:
        shard: names the cell but for its draw.
        draw: names the cell within the shard.
        outcome: ``status`` and ``reason``.
        settings: the defense's resolved hyperparameters.
        chosen: what the defense noted.
        cost: the columns of ``COST``.
        code: digest of the code that ran.
    """
    return {
        **cell_key(shard, draw),
        **outcome,
        "chosen": json.dumps(chosen, sort_keys=True),
        "hyperparameters": json.dumps(settings, sort_keys=True),
        **cost,
        **provenance.origin(code),
    }
