"""Each defense against each attack, as colours and numbers."""

import itertools
import math
from typing import Any

import altair as alt

from detrojan.analysis.report import views
from detrojan.analysis.report.charts import (
    BAD_TO_GOOD,
    DARK,
    LIGHT,
    PALE,
    ROW,
    heat,
    shade,
    tips,
)
from detrojan.analysis.report.figures.base import Plan
from detrojan.analysis.report.vega import Chart, Figure, data
from detrojan.analysis.report.views import MEASURE_TEXTS, Tables
from detrojan.cells import NO_METHOD

PLAN = Plan(
    section="heat",
    caption="Means over settings, each by its mean over budgets, in whole percent. Brown is bad and green "
    "is good, from 0 to 100 % in every report; of DER pale is 50 %, the untouched model.",
)


def draw(tables: Tables) -> Figure | None:
    """Return a panel a measure: the mean of each defense against each attack, as colour and as number."""
    titles = {measure: f"{title}, %" for measure, title in MEASURE_TEXTS.items()}
    rows = []
    for row, (measure, title) in itertools.product(heat(tables).to_dict("records"), titles.items()):
        value = row[measure]
        if not math.isnan(value) and row["attack"] != NO_METHOD:
            names = {"defense": views.defense_text(row["defense"]), "attack": row["attack"]}
            rows.append(names | {"measure": title, "mean": 100 * value, "shade": shade(value, measure)})
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
        scale = alt.Scale(domain=[0, 1], range=list(BAD_TO_GOOD))
        is_pale = f"datum.shade > {PALE[0]} && datum.shade < {PALE[1]}"
        ink = alt.condition(is_pale, alt.value(DARK), alt.value(LIGHT))
        layers = alt.layer(
            base.mark_rect().encode(color=alt.Color("shade:Q", scale=scale, legend=None)),
            base.mark_text(fontSize=6).encode(text=alt.Text("mean:Q", format=".0f"), color=ink),
        ).properties(width=width, height=height)
        return layers.facet(alt.Facet("measure:N", sort=shown, title=None), columns=len(shown))

    return Figure(chart, text, columns=len(shown))
