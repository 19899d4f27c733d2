"""Measures by the poisoning ratio."""

import numpy as np

from detrojan.analysis.report.charts import COMMON, CURVES, Point, curve, curves
from detrojan.analysis.report.figures.base import Plan
from detrojan.analysis.report.vega import Figure
from detrojan.analysis.report.views import MEASURE_TEXTS, Tables
from detrojan.analysis.statistics import arrays, scores
from detrojan.analysis.statistics.arrays import Flags, Study
from detrojan.analysis.statistics.crossed import Crossed
from detrojan.analysis.statistics.frames import frame_of
from detrojan.cells import NO_METHOD, ratio_text

OTHERS = ["dataset", "architecture", "attack"]  # of a setting, but the ratio
PLAN = Plan(
    section="curves",
    heading="More poison",
    caption="ASR, ACC and RA by poisoning ratio, all SPC pooled: means over settings (data set, "
    f"architecture, attack). {COMMON}",
    order=2,
    nothing="There is one ratio.",
)


def draw(tables: Tables) -> Figure | None:
    """Return a panel a defense: its means of ASR, ACC and RA over the poisoning ratios, with their intervals.

    The intervals are of these settings, with other seeds and samples.
    """
    study = arrays.of_cells(scores.attacked(frame_of(tables.cells)))
    if len(set(study.settings["ratio"])) < 2:
        return None
    rows = [
        row | {"defense": defense, "given": True, "measure": MEASURE_TEXTS[measure]}
        for defense in study.runs
        for measure in CURVES
        if defense != NO_METHOD
        for row in curve(_points(study, defense, measure))
    ]
    text = "ASR, ACC and RA of each defense by poisoning ratio: means over settings. " + COMMON
    return curves(tables, rows, "poisoning ratio", text)


def _points(study: Study, defense: str, measure: str) -> dict[str, Point]:
    """Return a point a ratio."""
    runs, ratios = study.runs[defense], study.settings["ratio"].to_numpy()
    values, budgets = runs.values(measure), runs.budgets_of(measure)
    keys = list(study.settings[OTHERS].itertuples(index=False, name=None))

    def over(ratio: float) -> Point:
        places = np.flatnonzero(ratios == ratio)

        def of(some: Flags) -> Crossed:
            at = np.isin(np.arange(len(keys)), places[some])
            return Crossed(study.design.taken(at), values[at], budgets[at])

        return Point([keys[place] for place in places], of)

    return {ratio_text(ratio): over(ratio) for ratio in sorted(set(study.settings["ratio"]))}
