"""What a defense reaches against the time that it takes."""

import math
from collections.abc import Iterable

import altair as alt

from detrojan.analysis.report import layout, views
from detrojan.analysis.report.charts import (
    BLUE,
    CHANGES,
    ENDS,
    GREY,
    RED,
    aligned,
    changed,
    full_tips,
    if_any,
    of_choice,
    with_choice,
)
from detrojan.analysis.report.figures.base import Plan
from detrojan.analysis.report.layout import Axis
from detrojan.analysis.report.vega import Chart, Figure, data
from detrojan.analysis.report.views import KNOWN_TRIGGER, Row, Tables, spc_text
from detrojan.analysis.statistics.relative import LOWER_IS_BETTER
from detrojan.cells import NO_METHOD

FRONT, BEATEN, BOUND = "Pareto front", "beaten by another in both", "knows the trigger: an upper bound"

PLAN = Plan(
    section="cost",
    caption="DER, or the change against the untouched models of a defense's own settings. The dashed line is "
    "the Pareto front: no other defense is both as fast and as good. Upright "
    "lines are 95 % intervals of the mean on this grid.",
    nothing="These tables have no times.",
)


def draw(tables: Tables, measure: str) -> Figure | None:
    """Return the mean of a measure against the seconds that a defense takes, the Pareto front marked."""
    budgets = {spc_text(spc): rows for spc in views.budgets(tables) if (rows := _costs(tables, measure, spc))}
    rows = [row for rows in budgets.values() for row in rows]
    if not rows:
        return None
    title = CHANGES[measure][-1]
    text = (
        f"Mean {title}, of each defense against the seconds that it takes, on a logarithmic axis; the line "
        "joins the Pareto front: the defenses that no other beats in both."
    )
    x_ends = layout.around([math.log10(row["seconds"]) for row in rows], 0.12)
    y_ends = layout.around([row[end] for row in rows for end in ENDS if row[end] is not None], 0.04)
    height = 190.0
    roles = [FRONT, BEATEN, BOUND]

    def chart(width: float) -> Chart:
        axes = (Axis(*x_ends, width), Axis(*y_ends, height))
        placed = [row | {"spc": spc} for spc, of in budgets.items() for row in layout.named(of, *axes)]
        x = alt.X(
            "seconds:Q",
            title="seconds of a defense, mean",
            scale=alt.Scale(type="log", domain=[10**end for end in x_ends], nice=False),
            axis=alt.Axis(format="~g", values=layout.decimal_ticks(*x_ends)),
        )

        def up(field: str) -> alt.Y:
            scale = alt.Scale(domain=list(y_ends), nice=False, zero=False)
            return alt.Y(f"{field}:Q", title=title, scale=scale)

        color = alt.Color("role:N", title=None, scale=alt.Scale(domain=roles, range=[RED, BLUE, GREY]))
        shapes = alt.Scale(domain=roles, range=["diamond", "circle", "cross"])
        base = of_choice(data(placed)).encode(x=x)
        front = base.transform_filter(f"datum.role === '{FRONT}'")
        layers = [
            front.mark_line(interpolate="step-after", strokeDash=[2, 2], strokeWidth=0.8, color=RED).encode(
                y=up("mean"), order=alt.Order("seconds:Q")
            ),
            *if_any(rows, base.mark_rule(opacity=0.45).encode(y=up("low"), y2=alt.Y2("high:Q"), color=color)),
            base.mark_point(size=24).encode(
                y=up("mean"),
                color=color,
                shape=alt.Shape("role:N", title=None, scale=shapes),
                tooltip=full_tips("defense:N", alt.Tooltip("seconds:Q", format=".3~s"), "role:N"),
            ),
        ]
        for align, dx in (("left", 4), ("right", -4)):
            here = base.transform_filter(f"datum.align === '{align}'")
            text_mark = here.mark_text(align=aligned(align), dx=dx, baseline="middle")
            layers.append(text_mark.encode(y=up("label"), text=alt.Text("defense:N")))
        return with_choice(alt.layer(*layers)).properties(width=width, height=height)

    return Figure(chart, text)


def _costs(tables: Tables, measure: str, spc: int | None) -> list[Row]:
    """Return what a defense costs at a budget and what it reaches, and whether it is on the front."""
    found = [
        row
        for row in tables.consistency.to_pylist()
        if row["spc"] == spc and row["defense"] != NO_METHOD and row["seconds"]
    ]
    chosen = [row | of for row in found if (of := changed(row, measure))["mean"] is not None]
    rivals = [row for row in chosen if row["threat_model"] != KNOWN_TRIGGER]
    sign = -1 if measure in LOWER_IS_BETTER else 1
    points = [(row["seconds"], sign * row["mean"]) for row in rivals]
    best = {row["defense"] for row, on in zip(rivals, layout.pareto(points), strict=True) if on}
    others: Iterable[str] = {row["defense"] for row in rivals}
    return [
        {"defense": row["defense"], "seconds": row["seconds"], "above": row["defense"] in best}
        | {end: row[end] for end in ENDS}
        | {"role": FRONT if row["defense"] in best else BEATEN if row["defense"] in others else BOUND}
        for row in chosen
    ]
