"""Measures by the poisoning ratio."""

import math

from detrojan.analysis.report.charts import CURVES, ENDS, curves
from detrojan.analysis.report.figures.base import Plan
from detrojan.analysis.report.vega import Figure
from detrojan.analysis.report.views import MEASURE_TEXTS, Tables
from detrojan.analysis.statistics import arrays, scores
from detrojan.analysis.statistics.crossed import Crossed
from detrojan.analysis.statistics.frames import frame_of
from detrojan.cells import NO_METHOD, ratio_text

PLAN = Plan(
    section="curves",
    heading="More poison",
    caption="ASR, ACC and RA by poisoning ratio, all SPC pooled: means over settings (data set, "
    "architecture, attack), bands are their 95 % intervals on this grid.",
    order=2,
    nothing="There is one ratio.",
)


def draw(tables: Tables) -> Figure | None:
    """Return a panel a defense: its means of ASR, ACC and RA over the poisoning ratios, with their intervals.

    The intervals are of these settings, with other seeds and samples.
    """
    study = arrays.of_cells(scores.attacked(frame_of(tables.cells)))
    ratios = sorted(set(study.settings["ratio"]))
    if len(ratios) < 2:
        return None
    rows = []
    for defense, runs in study.runs.items():
        for ratio in ratios if defense != NO_METHOD else ():
            at = (study.settings["ratio"] == ratio).to_numpy()
            design = study.design.taken(at)
            for measure in CURVES:
                found = Crossed(design, runs.values(measure)[at], runs.budgets_of(measure)[at])
                if found.num_settings:
                    ends = (found.mean, *found.grid.interval(found.mean))
                    about = {"defense": defense, "given": True, "at": ratio_text(ratio)}
                    about["measure"] = MEASURE_TEXTS[measure]
                    rows.append(about | dict(zip(ENDS, map(_clipped, ends), strict=True)))
    text = (
        "ASR, ACC and RA of each defense by poisoning ratio: means over settings, bands are their 95 % "
        "intervals on this grid."
    )
    return curves(tables, rows, "poisoning ratio", text)


def _clipped(share: float) -> float | None:
    """Return a share in percent, an end of an interval where shares live; None if it is missing."""
    return None if math.isnan(share) else 100 * min(1.0, max(0.0, share))
