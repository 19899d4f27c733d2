"""Gathers the metrics and cards of a study into its two tables of observations."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from detrojan import artifacts, registry
from detrojan.cells import CELL_AXES, MODEL_AXES, NO_METHOD
from detrojan.evaluation import METRICS
from detrojan.tables import MODEL_KEYS, ORIGIN, required

POISONED_AXES = ("dataset", "attack", "ratio", "seed")  # of a poisoned set, which architectures share

CELLS = METRICS.insert(METRICS.get_field_index("defense") + 1, required("threat_model", pa.string()))

MODELS = pa.schema(
    [
        *MODEL_KEYS,
        pa.field("acc", pa.float64()),
        pa.field("asr", pa.float64()),
        pa.field("ra", pa.float64()),
        required("num_train", pa.int32()),
        required("num_poisoned", pa.int32()),
        required("effective_ratio", pa.float64()),
        pa.field("target", pa.int16()),
        pa.field("psnr", pa.float64()),
        pa.field("ssim", pa.float64()),
        pa.field("linf", pa.int16()),
        pa.field("attack_hyperparameters", pa.string()),
        required("num_parameters", pa.int64()),
        required("architecture_settings", pa.string()),
        required("optimization", pa.string()),
        required("epochs", pa.int32()),
        required("train_loss", pa.float64()),
        required("train_accuracy", pa.float64()),
        required("seconds", pa.float64()),
        required("images_per_second", pa.float64()),
        required("peak_memory_bytes", pa.int64()),
        required("device", pa.string()),
        *ORIGIN,
    ]
)


def cells(paths: Sequence[str | Path]) -> pa.Table:
    """Return the rows of all metrics tables, in the order of their keys, each with its threat model."""
    # A table at a time: they are thousands of small files, and one that is broken must be named.
    table = pa.concat_tables([artifacts.read_table(path, METRICS) for path in paths])
    folders = {
        name: registry.threat_model("defenses", name) for name in pc.unique(table["defense"]).to_pylist()
    }
    threat_models = pa.array([folders[name] for name in table["defense"].to_pylist()], pa.string())
    table = table.append_column("threat_model", threat_models)
    keys = [(name, "ascending") for name in CELL_AXES]
    return table.sort_by(keys).select(CELLS.names)


def models(cells: pa.Table, model_cards: Sequence[str], poison_cards: Sequence[str]) -> pa.Table:
    """Return a row a model: how it was trained and poisoned, and what it does untouched.

    Args:
        cells: the table of cells; its rows without a defense are the untouched models.
        model_cards: paths of the models' cards.
        poison_cards: paths of the poisoned sets' cards.
    """
    untouched = {
        tuple(row[axis] for axis in MODEL_AXES): row
        for row in cells.filter(pc.field("defense") == NO_METHOD).to_pylist()
    }
    poisoned = {
        tuple(card[axis] for axis in POISONED_AXES): card for card in map(artifacts.read_card, poison_cards)
    }
    rows = []
    for card in map(artifacts.read_card, model_cards):
        row = untouched[tuple(card[axis] for axis in MODEL_AXES)]
        poison = poisoned.get(tuple(card[axis] for axis in POISONED_AXES), {})
        rows.append(_model_row(row, card, poison))
    return pa.Table.from_pylist(rows, schema=MODELS).sort_by([(axis, "ascending") for axis in MODEL_AXES])


def _model_row(row: dict[str, Any], card: dict[str, Any], poison: dict[str, Any]) -> dict[str, Any]:
    """Return a model's row from its untouched cell's row and its two cards."""
    settings = poison.get("hyperparameters")
    texts = {
        name: json.dumps(card[name], sort_keys=True) for name in ("architecture_settings", "optimization")
    }
    values = (
        poison
        | card
        | {measure: row[measure] for measure in ("acc", "asr", "ra")}
        | {
            "num_poisoned": poison.get("num_poisoned", 0),
            "effective_ratio": poison.get("effective_ratio", 0.0),
        }
        | {"attack_hyperparameters": None if settings is None else json.dumps(settings, sort_keys=True)}
        | texts
    )
    return {name: values.get(name) for name in MODELS.names}
