"""Measures by the clean samples that the defender holds."""

from detrojan.analysis.report.charts import CURVES, ON_GRID, curves, percent
from detrojan.analysis.report.figures.base import Plan
from detrojan.analysis.report.vega import Figure
from detrojan.analysis.report.views import DATA_FREE, MEASURE_TEXTS, Tables, spc_text
from detrojan.cells import NO_METHOD

PLAN = Plan(
    section="curves",
    heading="More clean samples",
    caption="ASR, ACC and RA by the clean samples per class that the defender holds: means over settings, "
    "bands are their 95 % intervals on this grid. Dashed: a defense that is given no data.",
    order=1,
    nothing="There is one SPC.",
)


def draw(tables: Tables) -> Figure | None:
    """Return a panel a defense: its means of ASR, ACC and RA over the budgets, with their intervals."""
    rows = [
        {"defense": row["defense"], "given": row["threat_model"] != DATA_FREE, "at": spc_text(row["spc"])}
        | {"measure": MEASURE_TEXTS[measure]}
        | {end: percent(row[f"{measure}_{part}"]) for end, part in ON_GRID.items()}
        for row in tables.consistency.to_pylist()
        for measure in CURVES
        if row["spc"] and row["defense"] != NO_METHOD and row[f"{measure}_mean"] is not None
    ]
    text = (
        "ASR, ACC and RA of each defense by the clean samples per class (SPC) that the defender holds: means "
        "over settings, bands are their 95 % intervals on this grid."
    )
    return curves(tables, rows, "SPC", text)
