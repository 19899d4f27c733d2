"""Measures by the poisoning ratio."""

import math

from detrojan.analysis.report.charts import CURVES, ENDS, curves, took
from detrojan.analysis.report.figures.base import Plan
from detrojan.analysis.report.vega import Figure
from detrojan.analysis.report.views import MEASURE_TEXTS, Tables
from detrojan.analysis.statistics import bootstrap
from detrojan.analysis.statistics.frames import SETTING
from detrojan.cells import NO_METHOD, ratio_text

PLAN = Plan(
    section="curves",
    heading="More poison",
    caption="ASR, ACC and RA by poisoning ratio, all SPC pooled: means over settings (data set, "
    "architecture, attack), bands are their 95 % intervals.",
    order=2,
    nothing="There is one ratio.",
)


def draw(tables: Tables) -> Figure | None:
    """Return a panel a defense: its means of ASR, ACC and RA over the poisoning ratios, with their intervals.

    The intervals are over settings, of data set, architecture and attack.
    """
    attacked = took(tables)
    means = attacked[attacked["defense"] != NO_METHOD]
    if means["ratio"].nunique() < 2:
        return None
    of_settings = means.groupby(["defense", *SETTING])[list(CURVES)].mean().reset_index()
    units = {"settings": [axis for axis in SETTING if axis != "ratio"]}
    intervals = bootstrap.intervals(of_settings, ["defense", "ratio"], CURVES, units)
    rows = [
        {"defense": row["defense"], "given": True, "at": ratio_text(row["ratio"])}
        | {"measure": MEASURE_TEXTS[measure]}
        | {end: _clipped(row[f"{measure}_{end}"]) for end in ENDS}
        for row in intervals.to_dict("records")
        for measure in CURVES
        if not math.isnan(row[f"{measure}_mean"])
    ]
    text = (
        "ASR, ACC and RA of each defense by poisoning ratio: means over settings, bands are their 95 % "
        "intervals."
    )
    return curves(tables, rows, "poisoning ratio", text)


def _clipped(share: float) -> float | None:
    """Return a share in percent, an end of an interval where shares live; None if it is missing."""
    return None if math.isnan(share) else 100 * min(1.0, max(0.0, share))
