"""Measures by the clean samples that the defender holds."""

from detrojan.analysis.report.charts import COMMON, CURVES, Point, curve, curves
from detrojan.analysis.report.figures.base import Plan
from detrojan.analysis.report.vega import Figure
from detrojan.analysis.report.views import DATA_FREE, MEASURE_TEXTS, Tables, spc_text
from detrojan.analysis.statistics import arrays, scores
from detrojan.analysis.statistics.arrays import Flags, Study
from detrojan.analysis.statistics.crossed import Crossed
from detrojan.analysis.statistics.frames import frame_of
from detrojan.cells import NO_METHOD

PLAN = Plan(
    section="curves",
    heading="More clean samples",
    caption="ASR, ACC and RA by the clean samples per class that the defender holds: means over settings. "
    f"{COMMON} Dashed: a defense that is given no data.",
    order=1,
    nothing="There is one SPC.",
)


def draw(tables: Tables) -> Figure | None:
    """Return a panel a defense: its means of ASR, ACC and RA over the budgets, with their intervals."""
    study = arrays.of_cells(scores.attacked(frame_of(tables.cells)))
    rows = [
        row | {"defense": defense, "given": runs.threat_model != DATA_FREE, "measure": MEASURE_TEXTS[measure]}
        for defense, runs in study.runs.items()
        for measure in CURVES
        if defense != NO_METHOD
        for row in curve(_points(study, defense, measure))
    ]
    text = (
        "ASR, ACC and RA of each defense by the clean samples per class (SPC) that the defender holds: means "
        f"over settings. {COMMON}"
    )
    return curves(tables, rows, "SPC", text)


def _points(study: Study, defense: str, measure: str) -> dict[str, Point]:
    """Return a point a budget; a study of defenses without data has none."""
    runs = study.runs[defense]
    values, planned = runs.values(measure), runs.budgets_of(measure)
    settings = range(len(study.settings))

    def over(budget: int) -> Point:
        at = study.at(budget)

        def of(some: Flags) -> Crossed:
            return Crossed(study.design.taken(some), values[some][:, :, at], planned[some][:, :, at])

        return Point(settings, of)

    return {spc_text(budget): over(budget) for budget in study.budgets if budget}
