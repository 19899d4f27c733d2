"""Mean ranks of the defenses, with their intervals."""

import altair as alt

from detrojan.analysis.report.charts import (
    BLUE,
    GREY,
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
from detrojan.analysis.report.views import MEASURE_TEXTS, Row, Tables, spc_text
from detrojan.study.schema import BASELINES

BASELINE, OTHER = "baseline", "other defense"
ON_GRID, BEYOND = "on this grid", "beyond alone"
LIGHT_GREY = "#dddddd"  # as other lines, so that dark pages have their own

PLAN = Plan(
    section="ranking",
    caption="Mean ranks and their 95 % intervals on this grid. A bar leads from the first one's rank to each "
    "defense that can't be told from it (Holm, 5 %): dark on this grid, light only beyond it.",
    order=1,
)


def alike(row: Row) -> str | None:
    """Return where a defense can't be told from the first one; None if it can be, or is that one."""
    if row["leader_apart_grid"] is False:
        return ON_GRID
    return BEYOND if row["leader_apart_beyond"] is False else None


def draw(tables: Tables, measure: str) -> Figure | None:
    """Return the mean ranks by a measure with their intervals, a line a defense."""
    ranked = ranks_by(tables, measure)
    # The rows of a budget begin with the best.
    leaders = {row["spc"]: row["mean_rank"] for row in reversed(ranked)}
    rows = [
        {
            "defense": row["defense"],
            "spc": spc_text(row["spc"]),
            "mean": row["mean_rank"],
            "low": row["rank_grid_low"],
            "high": row["rank_grid_high"],
            "leader": leaders[row["spc"]],
            "alike": alike(row),
            "role": BASELINE if row["defense"] in BASELINES else OTHER,
            "settings": row["num_settings"],
        }
        for row in ranked
    ]
    if not rows:
        return None
    last = last_rank(tables)
    title = MEASURE_TEXTS[measure]
    text = (
        f"Mean rank of each defense by {title}, with its 95 % interval on this grid; 1 is the best. A bar "
        "leads from the first one's rank to each that can't be told from it."
    )
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
        # The caption says what these are: more legends leave a column no room.
        alikes = [
            base.transform_filter(f"datum.alike === '{where}'")
            .mark_rule(strokeWidth=7, color=color)
            .encode(x=alt.X("leader:Q"), x2=alt.X2("mean:Q"))
            for where, color in ((ON_GRID, GREY), (BEYOND, LIGHT_GREY))
        ]
        return with_choice(
            alt.layer(
                *alikes,
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
