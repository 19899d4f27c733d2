"""Mean ranks of the defenses, with their intervals."""

import altair as alt

from detrojan.analysis.report.charts import (
    BLUE,
    RED,
    ROW,
    full_tips,
    if_any,
    last_rank,
    of_choice,
    ranks_by,
    whole_numbers,
    with_choice,
)
from detrojan.analysis.report.figures.base import Plan
from detrojan.analysis.report.vega import COLUMN, Chart, Figure, data
from detrojan.analysis.report.views import MEASURE_TEXTS, Tables, spc_text
from detrojan.study.schema import BASELINES

BASELINE, OTHER = "baseline", "other defense"

PLAN = Plan(
    section="ranking",
    caption="Mean ranks and their 95 % intervals over settings.",
    order=2,
)


def draw(tables: Tables, measure: str) -> Figure | None:
    """Return the mean ranks by a measure with their intervals, a line a defense."""
    rows = [
        {
            "defense": row["defense"],
            "spc": spc_text(row["spc"]),
            "mean": row["mean_rank"],
            "low": row["rank_low"],
            "high": row["rank_high"],
            "role": BASELINE if row["defense"] in BASELINES else OTHER,
            "settings": row["num_settings"],
        }
        for row in ranks_by(tables, measure)
    ]
    if not rows:
        return None
    last = last_rank(tables)
    title = MEASURE_TEXTS[measure]
    text = f"Mean rank of each defense by {title}, with its 95 % interval over settings; 1 is the best."
    roles = [BASELINE, OTHER]

    def chart(width: float) -> Chart:
        x = alt.X(
            "mean:Q",
            scale=alt.Scale(domain=[1, last], nice=False, zero=False),
            axis=alt.Axis(values=whole_numbers(last), format="d"),
            title=f"mean rank by {title} (1 is the best)",
        )
        y = alt.Y("defense:N", sort=alt.EncodingSortField("mean", op="min"), title=None)
        color = alt.Color("role:N", title=None, scale=alt.Scale(domain=roles, range=[RED, BLUE]))
        shape = alt.Shape("role:N", title=None, scale=alt.Scale(domain=roles, range=["diamond", "circle"]))
        base = of_choice(data(rows)).encode(y=y)
        return with_choice(
            alt.layer(
                *if_any(rows, base.mark_rule().encode(x=alt.X("low:Q"), x2=alt.X2("high:Q"))),
                base.mark_point(size=22).encode(
                    x=x,
                    color=color,
                    shape=shape,
                    tooltip=full_tips("defense:N", "settings:Q", form=".2f"),
                ),
            )
        ).properties(width=width, height=alt.Step(ROW))

    return Figure(chart, text, COLUMN)
