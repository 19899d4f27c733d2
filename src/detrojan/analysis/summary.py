"""Means over draws and models, with intervals that respect how draws are nested in models."""

import math

import pandas as pd
import pyarrow as pa
from scipy import stats

from detrojan.tables import OK, required

SETTING = ["dataset", "architecture", "attack", "ratio", "attack_took", "defense", "threat_model", "spc"]
MEASURES = ("acc", "asr", "ra")
CONFIDENCE = 0.95

SUMMARY = pa.schema(
    [
        required("dataset", pa.string()),
        required("architecture", pa.string()),
        required("attack", pa.string()),
        required("ratio", pa.float64()),
        pa.field("attack_took", pa.bool_()),
        required("defense", pa.string()),
        required("threat_model", pa.string()),
        required("spc", pa.int32()),
        required("num_cells", pa.int32()),
        required("num_ok", pa.int32()),
        required("num_models", pa.int32()),
        *(
            pa.field(f"{measure}_{part}", pa.float64())
            for measure in MEASURES
            for part in ("mean", "low", "high")
        ),
        pa.field("interval_over", pa.string()),
        pa.field("seconds", pa.float64()),
    ]
)


def summarize(cells: pa.Table) -> pa.Table:
    """Return a row a setting and defense: mean ACC, ASR, RA and seconds over the cells that ended well.

    A mean is over models, each by its own mean over draws. The 95 % interval is Student's: over
    models where there are two or more, else over the draws of the one model, which says nothing of
    other models; ``interval_over`` tells which. It is null where there is one value only. Models
    whose attack took and models whose attack did not are rows of their own.

    Args:
        cells: of the schema ``CELLS``.
    """
    frame = cells.to_pandas()
    # Of its own, pandas makes bool of a column without nulls and object of one with some.
    frame["attack_took"] = frame["attack_took"].astype("boolean")
    rows = [
        {name: None if pd.isna(value) else value for name, value in zip(SETTING, setting, strict=True)}
        | _summary(group)
        for setting, group in frame.groupby(SETTING, sort=True, dropna=False)
    ]
    return pa.Table.from_pylist(rows, schema=SUMMARY)


def _summary(cells: pd.DataFrame) -> dict[str, object]:
    ended_well = cells[cells["status"] == OK]
    num_models = int(ended_well["seed"].nunique())
    over = "models" if num_models > 1 else "draws" if len(ended_well) > 1 else None
    row: dict[str, object] = {
        "num_cells": len(cells),
        "num_ok": len(ended_well),
        "num_models": num_models,
        "interval_over": over,
        "seconds": _or_none(ended_well["seconds"].mean()),
    }
    for measure in MEASURES:
        values = ended_well[measure].dropna()
        if over == "models":
            values = ended_well.groupby("seed")[measure].mean().dropna()
        row |= dict(
            zip((f"{measure}_{part}" for part in ("mean", "low", "high")), _interval(values), strict=True)
        )
    return row


def _interval(values: "pd.Series[float]") -> tuple[float | None, float | None, float | None]:
    """Return mean, lower and upper end; ends are clipped to [0, 1], where shares live."""
    if values.empty:
        return None, None, None
    mean = float(values.mean())
    if len(values) < 2:
        return mean, None, None
    error = float(values.to_numpy(float).std(ddof=1)) / math.sqrt(len(values))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
    return mean, max(0.0, mean - reach), min(1.0, mean + reach)


def _or_none(value: float) -> float | None:
    return None if pd.isna(value) else float(value)
