"""Each defense against each attack, as colours and numbers."""

import itertools
import math
from typing import Any

import altair as alt

from detrojan.analysis.report import views
from detrojan.analysis.report.charts import (
    CIVIDIS,
    DARK,
    LIGHT,
    LIGHT_FROM,
    ROW,
    domains,
    heat,
    tips,
)
from detrojan.analysis.report.figures.base import Plan
from detrojan.analysis.report.vega import Chart, Figure, data
from detrojan.analysis.report.views import MEASURE_TEXTS, Tables
from detrojan.cells import NO_METHOD

PLAN = Plan(
    section="heat",
    caption="Means over settings, each by its mean over budgets, in whole percent. The title of a panel says "
    "which percents its colours are from and to.",
)


def draw(tables: Tables) -> Figure | None:
    """Return a panel a measure: the mean of each defense against each attack, as colour and as number."""
    ends = domains(tables)
    titles = {m: f"{MEASURE_TEXTS[m]}, % (colours {ends[m][0]:g}–{ends[m][1]:g})" for m in MEASURE_TEXTS}
    rows = []
    for row, (measure, title) in itertools.product(heat(tables).to_dict("records"), titles.items()):
        value, (low, high) = 100 * row[measure], ends[measure]
        if not math.isnan(value) and row["attack"] != NO_METHOD:
            names = {"defense": views.defense_text(row["defense"]), "attack": row["attack"]}
            shade = min(1.0, max(0.0, (value - low) / (high - low)))
            rows.append(names | {"measure": title, "mean": value, "shade": shade})
    if not rows:
        return None
    present = {row["measure"] for row in rows}
    shown = [title for title in titles.values() if title in present]
    order = [views.defense_text(NO_METHOD), *views.defenses(tables)]
    height = ROW * len({row["defense"] for row in rows})
    text = f"Heat maps of {', '.join(shown)}: means of each defense against each attack."

    def chart(width: float) -> Chart:
        bare: dict[str, Any] = {"ticks": False, "domain": False}
        base = data(rows).encode(
            x=alt.X("attack:N", title=None, axis=alt.Axis(labelAngle=-90, **bare)),
            y=alt.Y("defense:N", title=None, sort=order, axis=alt.Axis(**bare)),
            tooltip=tips("defense:N", "attack:N", alt.Tooltip("mean:Q", format=".1f")),
        )
        scale = alt.Scale(domain=[0, 1], range=list(CIVIDIS))
        ink = alt.condition(f"datum.shade > {LIGHT_FROM}", alt.value(DARK), alt.value(LIGHT))
        layers = alt.layer(
            base.mark_rect().encode(color=alt.Color("shade:Q", scale=scale, legend=None)),
            base.mark_text(fontSize=6).encode(text=alt.Text("mean:Q", format=".0f"), color=ink),
        ).properties(width=width, height=height)
        return layers.facet(alt.Facet("measure:N", sort=shown, title=None), columns=len(shown))

    return Figure(chart, text, columns=len(shown))
