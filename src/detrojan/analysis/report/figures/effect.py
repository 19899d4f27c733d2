"""What each defense does to all measures, at each budget."""

import altair as alt

from detrojan.analysis.report import views
from detrojan.analysis.report.charts import BUDGETS, CHANGES, DASHED, ROW, changed, full_tips, if_any
from detrojan.analysis.report.figures.base import Plan
from detrojan.analysis.report.vega import Chart, Figure, data
from detrojan.analysis.report.views import DATA_FREE, Row, Tables, spc_text
from detrojan.analysis.statistics.relative import UNCHANGED
from detrojan.cells import NO_METHOD, NO_SAMPLES

NO_CHANGE = {CHANGES["der"][-1]: 100 * UNCHANGED}  # of the others it is 0
PLAN = Plan(
    section="effect",
    caption="Changes against the untouched models of a defense's own settings: means and their 95 % "
    "intervals on this grid, for each SPC; defenses by their rank, those that are not ranked below. The "
    "dashed line is no change.",
)


def _at_budgets(tables: Tables) -> list[Row]:
    """Return the rows of consistency at each budget, with its text as ``SPC``; without data, once."""
    several = len(views.budgets(tables)) > 1
    only = max(tables.summary["spc"].to_pylist(), default=NO_SAMPLES)
    found: dict[tuple[str, str], Row] = {}
    for row in tables.consistency.to_pylist():
        if row["defense"] == NO_METHOD or (several and row["spc"] is None):
            continue
        spc = NO_SAMPLES if row["threat_model"] == DATA_FREE else row["spc"] if several else only
        found.setdefault((row["defense"], spc_text(spc)), row | {"SPC": spc_text(spc)})
    return list(found.values())


def draw(tables: Tables) -> Figure | None:
    """Return the means of all measures with their intervals, a line a defense and a mark a budget."""
    rows = [
        {"defense": row["defense"], "SPC": row["SPC"], "measure": title, "settings": row["num_settings"]}
        | change
        for row in _at_budgets(tables)
        for measure, (_, _, title) in CHANGES.items()
        if (change := changed(row, measure))["mean"] is not None
    ]
    if not rows:
        return None
    present = {row["measure"] for row in rows}
    shown = [title for _, _, title in CHANGES.values() if title in present]
    budgets = sorted({row["SPC"] for row in rows}, key=lambda text: int(text) if text.isdecimal() else 0)
    # A fifth budget has the first one's colour again, and another shape.
    colors = [BUDGETS[place % len(BUDGETS)] for place in range(len(budgets))]
    order = views.defenses(tables)
    text = (
        f"Means of {', '.join(shown)} over settings with their 95 % intervals on this grid, a line a "
        "defense and a mark for each SPC; the dashed line is no change."
    )

    def chart(width: float) -> Chart:
        legend = alt.Legend() if len(budgets) > 1 else None
        base = data([*rows, *({"measure": title, "untouched": NO_CHANGE.get(title, 0)} for title in shown)])
        marks = base.transform_filter("isValid(datum.defense)").encode(
            y=alt.Y("defense:N", sort=order, title=None),
            yOffset=alt.YOffset("SPC:N", sort=budgets),
            color=alt.Color(
                "SPC:N", title="SPC", legend=legend, scale=alt.Scale(domain=budgets, range=colors)
            ),
        )
        x = alt.X("mean:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=4))
        layers = alt.layer(
            base.transform_filter("isValid(datum.untouched)")
            .mark_rule(**DASHED)
            .encode(x=alt.X("untouched:Q")),
            *if_any(rows, marks.mark_rule().encode(x=alt.X("low:Q"), x2=alt.X2("high:Q"))),
            marks.mark_point(size=12).encode(
                x=x,
                shape=alt.Shape("SPC:N", title="SPC", legend=legend, scale=alt.Scale(domain=budgets)),
                tooltip=full_tips("defense:N", "SPC:N", "measure:N", "settings:Q"),
            ),
        ).properties(width=width, height=max(ROW, 5.0 * len(budgets)) * len(order))
        panels = layers.facet(alt.Facet("measure:N", sort=shown, title=None), columns=len(shown))
        return panels.resolve_scale(x="independent")

    return Figure(chart, text, columns=len(shown))
