"""Means over draws and models, a row a setting and defense, with intervals that respect the nesting."""

from collections.abc import Iterable

import pandas as pd
import pyarrow as pa

from detrojan.analysis.statistics import bootstrap
from detrojan.analysis.statistics.relative import MEASURES, SHARES
from detrojan.storage.columns import OK, required

SETTING = ["dataset", "architecture", "attack", "ratio"]
KEY = [*SETTING, "attack_took", "defense", "threat_model", "spc"]
# Within a setting; across settings a level goes on top.
LEVELS = {"models": ["seed"], "draws": ["draw"]}

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
    """Return a row a setting and defense: means of all measures over the cells that ended well.

    A mean is over models, each by its own mean over draws. The 95 % interval (:mod:`.bootstrap`) is
    over models where there are two or more, else over the draws of the one model, which says nothing of
    other models; ``interval_over`` tells which. It is null where there is one value only. Models
    whose attack took and models whose attack did not are rows of their own.

    Args:
        cells: with the columns of ``CELLS``.
    """
    frame = frame_of(cells)
    ok = frame["status"] == OK
    groups = frame.assign(is_ok=ok, ok_seed=frame["seed"].where(ok), ok_seconds=frame["seconds"].where(ok))
    counts = groups.groupby(KEY, dropna=False, sort=True, observed=True).agg(
        num_cells=("is_ok", "size"),
        num_ok=("is_ok", "sum"),
        num_models=("ok_seed", "nunique"),
        seconds=("ok_seconds", "mean"),
    )
    # Cells that did not end well have no measures, and their setting keeps its row.
    means = clipped(bootstrap.intervals(frame, KEY, MEASURES, LEVELS), SHARES)
    counts = counts.reset_index(drop=True)
    means = means.rename(columns={"acc_over": "interval_over"})
    return table(pd.concat([means, counts], axis="columns"), SUMMARY)


def frame_of(cells: pa.Table) -> pd.DataFrame:
    """Return a table of cells as a frame; measures of cells that did not end well are missing."""
    frame: pd.DataFrame = cells.to_pandas()
    # Of its own, pandas makes bool of a column without nulls and object of one with some.
    frame["attack_took"] = frame["attack_took"].astype("boolean")
    measures = [name for name in MEASURES if name in frame]
    frame[measures] = frame[measures].astype(float).where(frame["status"] == OK)
    return frame


def clipped(intervals: pd.DataFrame, measures: Iterable[str]) -> pd.DataFrame:
    """Return ``intervals`` with the ends of ``measures`` clipped to [0, 1], where shares live."""
    ends = [f"{measure}_{end}" for measure in measures for end in ("low", "high")]
    return intervals.assign(**intervals[ends].clip(0, 1))


def table(frame: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    """Return the columns of ``schema`` as a table; what is missing is null."""
    return pa.Table.from_pandas(frame[schema.names], schema=schema, preserve_index=False)
