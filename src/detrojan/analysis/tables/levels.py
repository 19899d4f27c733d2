"""Each defense on each data set, architecture and attack: few levels are believed sooner than an interval."""

from typing import Any

import numpy as np
import pyarrow as pa

from detrojan.analysis.statistics import arrays, scores
from detrojan.analysis.statistics.arrays import Study
from detrojan.analysis.statistics.crossed import FACTORS, Array, mean_of
from detrojan.analysis.statistics.frames import frame_of, table_of_rows
from detrojan.analysis.statistics.relative import COMPARED
from detrojan.analysis.tables.base import Table, columns
from detrojan.study.schema import BASELINES

Row = dict[str, Any]
FT = BASELINES[0]

TABLE = Table(
    row="a measure, budget, defense, axis and level",
    holds="each defense on each data set, architecture and attack",
    about="What the intervals beyond this grid are made of.",
    columns=[
        columns("measure", kind=pa.string(), meaning="`acc`, `asr`, `ra`, `der` or `net`", words=True),
        columns("spc", kind=pa.int32(), meaning="the budget; null: all budgets pooled", null=True),
        columns("defense", kind=pa.string(), meaning="the defense, `none` among them"),
        columns("axis", kind=pa.string(), meaning="`dataset`, `architecture` or `attack`", words=True),
        columns("level", kind=pa.string(), meaning="a value of that axis"),
        columns("num_settings", kind=pa.int32(), meaning="settings with a result there"),
        columns("mean", kind=pa.float64(), meaning="mean of the measure over these"),
        columns(
            "difference_ft",
            kind=pa.float64(),
            meaning="its value minus fine-tuning's there, pair by pair",
            null=True,
        ),
        columns("num_shared_ft", kind=pa.int32(), meaning="settings there in which both have a result"),
    ],
)


def make(cells: pa.Table) -> pa.Table:
    """Return a row a measure, budget, defense, axis and level that it has a result on; pooled comes first.

    Args:
        cells: with the columns of ``CELLS``.
    """
    study = arrays.of_cells(scores.attacked(frame_of(cells)))
    rows = []
    for measure in COMPARED:
        against = {
            name: study.pairs(name, FT, measure) for name in study.runs if FT in study.runs and name != FT
        }
        for budget in (None, *study.budgets):
            at = study.at(budget)
            for name in study.runs:
                means, gaps = study.crossed(name, measure, budget).means, np.full(len(study.settings), np.nan)
                if pairs := against.get(name):
                    gaps = pairs.crossed(study.design, at).means
                about = {"measure": measure, "spc": budget, "defense": name}
                rows += [about | row for row in _rows(study, means, gaps)]
    return table_of_rows(rows, TABLE.schema)


def _rows(study: Study, means: Array, gaps: Array) -> list[Row]:
    """Return what the means of settings, and their differences to fine-tuning, come to on each level."""
    rows = []
    for axis in FACTORS:
        of_settings = study.settings[axis].to_numpy()
        for level in np.unique(of_settings[~np.isnan(means)]):
            at = of_settings == level
            rows.append(
                {
                    "axis": axis,
                    "level": str(level),
                    "num_settings": int((~np.isnan(means[at])).sum()),
                    "mean": float(mean_of(means[at], 0)),
                    "difference_ft": float(mean_of(gaps[at], 0)),
                    "num_shared_ft": int((~np.isnan(gaps[at])).sum()),
                }
            )
    return rows
