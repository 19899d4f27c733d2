"""The critical-difference diagram: which ranks differ."""

import itertools
from collections.abc import Sequence

import altair as alt

from detrojan.analysis.report import layout
from detrojan.analysis.report.charts import (
    ROW,
    aligned,
    last_rank,
    of_choice,
    ranks_by,
    tips,
    whole_numbers,
    with_choice,
)
from detrojan.analysis.report.figures.base import Plan
from detrojan.analysis.report.vega import Chart, Figure, data
from detrojan.analysis.report.views import MEASURE_TEXTS, Row, Tables, spc_text

PLAN = Plan(
    section="ranking",
    heading="Which ranks differ",
    caption="Defenses at their mean ranks over settings, 1 the best. A bar joins defenses whose ranks do not "
    "differ significantly (Nemenyi, 5 %); two further apart than the critical difference do.",
    order=1,
)


# From the top of the diagram, points: the critical difference, the axis, a bar after another.
SCALE, LINE_OF_RANKS, BAR = 3.0, 20.0, 4.0


def draw(tables: Tables, measure: str) -> Figure | None:
    """Return a critical-difference diagram (Demšar, JMLR 2006, Fig. 1) by a measure.

    Defenses stand at their mean ranks; a bar joins those that don't differ significantly.
    """
    names: list[Row] = []
    bars: list[Row] = []
    scales: list[Row] = []
    for spc, group in itertools.groupby(ranks_by(tables, measure), lambda row: row["spc"]):
        rows = list(group)
        if rows[0]["critical_difference"] is not None:
            chosen = {"spc": spc_text(spc)}
            names += [chosen | name for name in _names(rows)]
            bars += [chosen | bar for bar in _bars(rows)]
            scales.append(chosen | _scale(rows[0]))
    if not names:
        return None
    last = last_rank(tables)
    first_name = max((bar["y"] for bar in bars), default=LINE_OF_RANKS) + BAR + 6
    for name in names:
        name["y"] = first_name + ROW * name["level"]
    height = max(name["y"] for name in names) + ROW / 2
    text = (
        f"Critical-difference diagram by {MEASURE_TEXTS[measure]}: defenses at their mean ranks, 1 the best; "
        "a bar joins defenses whose ranks do not differ significantly (Nemenyi, 5 %)."
    )

    def chart(width: float) -> Chart:
        def at(field: str) -> alt.X:
            scale = alt.Scale(domain=[1, last], nice=False, zero=False)
            return alt.X(f"{field}:Q", scale=scale, axis=None)

        y = alt.Y("y:Q", scale=alt.Scale(domain=[0, height], reverse=True, nice=False), axis=None)
        ticks = data({"mean": tick, "y": LINE_OF_RANKS} for tick in whole_numbers(last)).encode(
            x=at("mean"), y=y
        )
        named, joined, scaled = (of_choice(data(rows)).encode(y=y) for rows in (names, bars, scales))
        line = data([{"low": 1, "high": last, "y": LINE_OF_RANKS}]).encode(y=y)
        layers = [
            line.mark_rule().encode(x=at("low"), x2=alt.X2("high")),
            ticks.mark_tick(orient="vertical", size=5, thickness=0.6, color="#777777"),
            ticks.mark_text(dy=-7).encode(text=alt.Text("mean:Q")),
            scaled.mark_rule(strokeWidth=1.4).encode(x=at("low"), x2=alt.X2("high")),
            scaled.mark_text(align="left", dx=4).encode(x=at("high"), text=alt.Text("text:N")),
            named.mark_rule(strokeWidth=0.5).encode(x=at("mean"), y2=alt.Y2("axis")),
            joined.mark_rule(strokeWidth=2.2, strokeCap="round").encode(x=at("low"), x2=alt.X2("high")),
        ]
        for side, edge, align, dx in (("left", "0", "right", -3), ("right", "width", "left", 3)):
            here = named.transform_filter(f"datum.side === '{side}'")
            end = alt.value(alt.ExprRef(expr=edge))
            said = tips("defense:N", alt.Tooltip("mean:Q", title="mean rank", format=".2f"))
            layers += [
                here.mark_rule(strokeWidth=0.5).encode(x=at("mean"), x2=end),
                here.mark_text(align=aligned(align), dx=dx, baseline="middle").encode(
                    x=end, text=alt.Text("text:N"), tooltip=said
                ),
            ]
        return with_choice(alt.layer(*layers)).properties(width=width, height=height)

    return Figure(chart, text)


def _names(rows: Sequence[Row]) -> list[Row]:
    """Return the names of a diagram, each with its side and level."""
    return [
        {"defense": row["defense"], "mean": row["mean_rank"], "axis": LINE_OF_RANKS}
        | {"side": side, "level": level, "text": f"{row['defense']}  {row['mean_rank']:.2f}"}
        for row, (side, level) in zip(rows, layout.sides(len(rows)), strict=True)
    ]


def _bars(rows: Sequence[Row]) -> list[Row]:
    """Return the bars of a diagram."""
    ranks = [row["mean_rank"] for row in rows]
    found = layout.cliques(ranks, rows[0]["critical_difference"])
    return [
        {"low": ranks[clique.first], "high": ranks[clique.last], "y": LINE_OF_RANKS + BAR * (line + 1)}
        for clique, line in zip(found, layout.lines(found), strict=True)
    ]


def _scale(row: Row) -> Row:
    """Return the length of a critical difference, cut off where the axis ends."""
    critical, longest = row["critical_difference"], row["num_defenses"] - 1
    text = f"critical difference {critical:.2f}" + (", longer than the axis" if critical > longest else "")
    return {"low": 1, "high": 1 + min(critical, longest), "y": SCALE, "text": text}
