"""Tables of cells as frames, and frames as tables: what all statistics begin and end with."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa

from detrojan.analysis.statistics.relative import MEASURES
from detrojan.storage.columns import OK

SETTING = ["dataset", "architecture", "attack", "ratio"]


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


def table_of_rows(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Return rows as a table; NaN is null."""
    columns = {field.name: pa.array([_null(row[field.name]) for row in rows], field.type) for field in schema}
    return pa.table(columns, schema=schema)


def _null(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
