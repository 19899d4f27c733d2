"""How DER spreads over settings."""

import altair as alt

from detrojan.analysis.report import views
from detrojan.analysis.report.charts import BLUE, DASHED, ROW, tips, took
from detrojan.analysis.report.figures.base import Plan
from detrojan.analysis.report.vega import COLUMN, Chart, Figure, data
from detrojan.analysis.report.views import Tables
from detrojan.analysis.statistics.frames import SETTING
from detrojan.analysis.statistics.relative import UNCHANGED
from detrojan.cells import NO_METHOD

PLAN = Plan(
    section="consistency",
    caption="DER of the settings, pooled over SPC: thin from the worst to the best, thick over the middle "
    "eight tenths, a dot at the median. Left of the dashed line a defense takes more accuracy than attack "
    "success.",
)


def draw(tables: Tables) -> Figure | None:
    """Return how DER spreads over settings, a line a defense: lowest, tenths, median, mean, highest."""
    attacked = took(tables)
    repaired = attacked[attacked["defense"] != NO_METHOD]
    of_settings = 100 * repaired.groupby(["defense", *SETTING])["der"].mean().dropna()
    if of_settings.empty:
        return None
    parts = {"lowest": 0.0, "low": 0.1, "median": 0.5, "high": 0.9, "highest": 1.0}
    rows = [
        {"defense": defense, "settings": len(values), "mean": float(values.mean())}
        | {name: float(values.quantile(share)) for name, share in parts.items()}
        for defense, values in of_settings.groupby("defense")
    ]
    order = views.defenses(tables)
    text = (
        "How DER spreads over settings, a line a defense: a thin line from the worst setting to the best, a "
        "thick one over the middle eight tenths, a dot at the median. Left of the dashed line it does harm."
    )

    def chart(width: float) -> Chart:
        base = data(rows).encode(y=alt.Y("defense:N", sort=order, title=None))
        unchanged = data([{"unchanged": 100 * UNCHANGED}])
        ends = [alt.Tooltip(f"{name}:Q", format=".1f") for name in (*parts, "mean")]
        x = alt.X("lowest:Q", title="DER of settings, %", scale=alt.Scale(zero=False))
        return alt.layer(
            unchanged.mark_rule(**DASHED).encode(x=alt.X("unchanged:Q")),
            base.mark_rule(strokeWidth=0.6).encode(x=x, x2=alt.X2("highest:Q")),
            base.mark_rule(strokeWidth=4, color=BLUE, opacity=0.55).encode(
                x=alt.X("low:Q"), x2=alt.X2("high:Q")
            ),
            base.mark_point(size=16).encode(
                x=alt.X("median:Q"),
                color=alt.value("black"),
                tooltip=tips("defense:N", *ends, "settings:Q"),
            ),
        ).properties(width=width, height=ROW * len(rows))

    return Figure(chart, text, COLUMN)
