"""Who leads if a data set, architecture, attack or ratio had been left out: what a lead rests on."""

from typing import Any

import pyarrow as pa

from detrojan.analysis.statistics import arrays, ranking, scores
from detrojan.analysis.statistics.frames import SETTING, frame_of, table_of_rows
from detrojan.analysis.tables.base import Table, columns

Row = dict[str, Any]
MEASURE = "der"  # what the report leads with, at pooled budgets

TABLE = Table(
    row="an axis and level left out",
    holds="who leads without each data set, architecture, attack or ratio",
    about="""\
By DER, pooled over budgets, among the defenses that are ranked with all of them. An axis of one level has no
row.""",
    columns=[
        columns(
            "axis", kind=pa.string(), meaning="`dataset`, `architecture`, `attack` or `ratio`", words=True
        ),
        columns("level_left_out", kind=pa.string(), meaning="the value of that axis that is left out"),
        columns("num_settings", kind=pa.int32(), meaning="settings that are left"),
        columns("leader", kind=pa.string(), meaning="who has the best mean rank then"),
        columns("mean_rank", kind=pa.float64(), meaning="its mean rank"),
        columns("second", kind=pa.string(), meaning="who is next", null=True),
        columns("second_rank", kind=pa.float64(), meaning="its mean rank; equal ones are a tie", null=True),
    ],
)


def make(cells: pa.Table) -> pa.Table:
    """Return a row an axis and level; none without two defenses that can be ranked.

    Args:
        cells: with the columns of ``CELLS``.
    """
    study = arrays.of_cells(scores.attacked(frame_of(cells)))
    found = ranking.of_study(study, MEASURE, None)
    rows: list[Row] = []
    for axis in SETTING if found else ():
        of_settings = study.settings[axis]
        levels = sorted(set(of_settings))
        for level in levels if len(levels) > 1 else ():
            assert found is not None
            kept = (of_settings != level).to_numpy()
            if ranks := found.of_settings(kept).by_rank:
                first, second = (*ranks, (None, None))[:2]
                about = {"axis": axis, "level_left_out": str(level), "num_settings": int(kept.sum())}
                about |= {"leader": first[0], "mean_rank": first[1]}
                rows.append(about | {"second": second[0], "second_rank": second[1]})
    return table_of_rows(rows, TABLE.schema)
