"""Tables of cells as frames, and frames as tables: what all statistics begin and end with."""

from collections.abc import Iterable

import pandas as pd
import pyarrow as pa

from detrojan.analysis.statistics.relative import MEASURES
from detrojan.storage.columns import OK

SETTING = ["dataset", "architecture", "attack", "ratio"]
# Within a setting; across settings a level goes on top.
LEVELS = {"models": ["seed"], "draws": ["draw"]}


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
