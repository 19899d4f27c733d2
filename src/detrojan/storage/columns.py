"""The columns of what a shard leaves, and those that tables share: keys, cost, origin, how a run ended."""

from typing import Any

import pyarrow as pa

from detrojan.cells import Model, Shard

# How a cell ends. Anything else is a bug and fails its job.
OK, DIVERGED, OUT_OF_MEMORY, NOT_APPLICABLE = "ok", "diverged", "out_of_memory", "not_applicable"
TIMED_OUT = "timed_out"  # only where a study was closed
MISSING = "missing"  # only in tables of others: nobody published a value


def required(name: str, kind: pa.DataType) -> pa.Field:
    """Return a column without nulls."""
    return pa.field(name, kind, nullable=False)


MODEL_KEYS = [
    required("dataset", pa.string()),
    required("architecture", pa.string()),
    required("attack", pa.string()),
    required("ratio", pa.float64()),
    required("seed", pa.int32()),
]
CELL_KEYS = [
    *MODEL_KEYS,
    required("defense", pa.string()),
    required("protocol", pa.string()),
    required("spc", pa.int32()),
    required("draw", pa.int32()),
]
COST = [
    required("seconds", pa.float64()),
    required("peak_memory_bytes", pa.int64()),
    required("forward_passes", pa.int64()),
    required("backward_passes", pa.int64()),
    required("device", pa.string()),
]
STEPS = [
    required("steps", pa.int64()),
    pa.field("images_a_step", pa.float64()),
    pa.field("passes", pa.float64()),
]
ORIGIN = [
    required("code", pa.string()),
    required("versions", pa.string()),
    required("git_commit", pa.string()),
]
RUNS = pa.schema(
    [
        *CELL_KEYS,
        required("status", pa.string()),
        pa.field("reason", pa.string()),
        required("chosen", pa.string()),
        required("hyperparameters", pa.string()),
        required("sources", pa.string()),
        required("deviates", pa.bool_()),
        *STEPS,
        *COST,
        *ORIGIN,
    ]
)
METRICS = pa.schema(
    [
        *RUNS,
        required("num_test", pa.int32()),
        required("num_triggered", pa.int32()),
        pa.field("acc", pa.float64()),
        pa.field("asr", pa.float64()),
        pa.field("ra", pa.float64()),
    ]
)
PREDICTIONS = pa.schema(
    [
        required("draw", pa.int32()),
        required("triggered", pa.bool_()),
        required("index", pa.int32()),
        required("predicted", pa.int16()),
    ]
)


def model_key(model: Model) -> dict[str, Any]:
    """Return the key columns of a model's row."""
    return model._asdict()


def cell_key(shard: Shard, draw: int) -> dict[str, Any]:
    """Return the key columns of a cell's row."""
    return shard.axes | {"draw": draw}
