"""The figures of a report, from its tables."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt
import pandas as pd

from detrojan.analysis.report import layout, views
from detrojan.analysis.report.layout import Axis
from detrojan.analysis.report.vega import COLUMN, Chart, Figure, data, words
from detrojan.analysis.report.views import DATA_FREE, KNOWN_TRIGGER, MEASURE_TEXTS, Row, Tables, spc_text
from detrojan.analysis.statistics import bootstrap
from detrojan.analysis.statistics.relative import LOWER_IS_BETTER, SCORES, UNCHANGED
from detrojan.analysis.statistics.summary import SETTING
from detrojan.cells import NO_METHOD, NO_SAMPLES, ratio_text
from detrojan.study.schema import BASELINES

# Okabe and Ito's, which colour-blind readers tell apart, in the order of `MEASURE_TEXTS`.
COLORS = ("#CC79A7", "#D55E00", "#0072B2", "#009E73")
PURPLE, RED, BLUE, GREEN = COLORS
GREY = "#8a8f94"
BUDGETS = ("#8ec6e8", "#3b8fc4", "#0a4b7c", "#052a47")  # from few samples to many
# From low to high; dark to light for colour-blind readers too (Nuñez, Anderton, Renslow, PLOS ONE 2018).
CIVIDIS = (
    *("#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678"),
    *("#a59c74", "#c3b369", "#e1cc55", "#fee838"),
)
DARK, LIGHT = "#000000", "#ffffff"  # text on these
LIGHT_FROM = 0.47  # from this shade on, black text has more contrast than white: 4.5 at least
ROW = 11.0  # points, of a defense
SMALL_HEIGHT = 44.0  # points, of a panel among many
MOST_COLUMNS = 6
CURVES = ("asr", "acc", "ra")
ENDS = ("mean", "low", "high")
BASELINE, OTHER = "baseline", "other defense"
FRONT, BEATEN, BOUND = "Pareto front", "beaten by another in both", "knows the trigger: an upper bound"
DASHED: dict[str, Any] = {"strokeDash": [3, 2], "strokeWidth": 0.6}


def draw_all(tables: Tables) -> dict[str, Figure]:
    """Return the figures of a study, by name; one that has nothing to show says why.

    Those that are of one measure are of DER.
    """
    nothing = words(nothing_to_show(tables))
    attacked = len(tables.consistency) > 0
    return {
        "ranking": ranking(tables, "der") or nothing,
        "critical_difference": critical_difference(tables, "der") or nothing,
        "effect": effect(tables) or nothing,
        "heatmap": heatmap(tables) or nothing,
        "spc": by_spc(tables) or (words("There is one SPC.") if attacked else nothing),
        "ratio": by_ratio(tables) or (words("There is one ratio.") if attacked else nothing),
        "consistency": spread(tables) or nothing,
        "cost": cost(tables, "der") or (words("These tables have no times.") if attacked else nothing),
    }


def nothing_to_show(tables: Tables) -> str:
    """Return why there is no effect to show, or no ranking."""
    if len(tables.consistency):
        return "Fewer than two defenses can be ranked."
    if False in set(tables.summary["attack_took"].to_pylist()):
        return "No attack took: there is no backdoor to remove."
    return "No model was attacked: there is no backdoor to remove."


# --- what the figures share ------------------------------------------------------------------------
#
# Channels are objects, as `alt.X2("high:Q")`: of a string Altair makes one in 40 ms, for it hashes a schema.


def _chosen(chart: alt.Chart) -> alt.Chart:
    """Return ``chart`` with the rows of the chosen budget alone; see :func:`_with_choice`."""
    return chart.transform_filter("datum.spc === spc")


def _with_choice(chart: Chart) -> Chart:
    """Return ``chart`` with a parameter, ``spc``: the text of the budget that it shows."""
    return chart.add_params(alt.param("spc", value=spc_text(None)))


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _whole_numbers(last: int) -> list[int]:
    """Return ticks from 1 to ``last``, some twenty at most."""
    step = math.ceil(last / 20)
    return sorted({1, *range(step, last + 1, step)})


def _if_any(rows: Iterable[Row], *intervals: Chart) -> list[Chart]:
    """Return the layers of intervals if there are any; without, Vega warns of axes without ends."""
    return list(intervals) if any(row["low"] is not None for row in rows) else []


def _tips(*fields: str | alt.Tooltip) -> list[alt.Tooltip]:
    """Return what a mark says of itself."""
    return [alt.Tooltip(field) if isinstance(field, str) else field for field in fields]


def _full_tips(*fields: str | alt.Tooltip, form: str = ".1f") -> list[alt.Tooltip]:
    """Return what a mark says of itself: ``fields``, then its mean and interval."""
    return _tips(*fields, *(alt.Tooltip(f"{end}:Q", format=form) for end in ENDS))


# --- ranks -----------------------------------------------------------------------------------------


def ranking(tables: Tables, measure: str) -> Figure | None:
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
        for row in _ranks(tables, measure)
    ]
    if not rows:
        return None
    last = _last_rank(tables)
    title = MEASURE_TEXTS[measure]
    text = f"Mean rank of each defense by {title}, with its 95 % interval over settings; 1 is the best."
    roles = [BASELINE, OTHER]

    def draw(width: float) -> Chart:
        x = alt.X(
            "mean:Q",
            scale=alt.Scale(domain=[1, last], nice=False, zero=False),
            axis=alt.Axis(values=_whole_numbers(last), format="d"),
            title=f"mean rank by {title} (1 is the best)",
        )
        y = alt.Y("defense:N", sort=alt.EncodingSortField("mean", op="min"), title=None)
        color = alt.Color("role:N", title=None, scale=alt.Scale(domain=roles, range=[RED, BLUE]))
        shape = alt.Shape("role:N", title=None, scale=alt.Scale(domain=roles, range=["diamond", "circle"]))
        base = _chosen(data(rows)).encode(y=y)
        return _with_choice(
            alt.layer(
                *_if_any(rows, base.mark_rule().encode(x=alt.X("low:Q"), x2=alt.X2("high:Q"))),
                base.mark_point(size=22).encode(
                    x=x,
                    color=color,
                    shape=shape,
                    tooltip=_full_tips("defense:N", "settings:Q", form=".2f"),
                ),
            )
        ).properties(width=width, height=alt.Step(ROW))

    return Figure(draw, text, COLUMN)


def _ranks(tables: Tables, measure: str) -> list[Row]:
    return [row for row in tables.ranks.to_pylist() if row["measure"] == measure]


def _last_rank(tables: Tables) -> int:
    return max(int(row["num_defenses"]) for row in tables.ranks.to_pylist())


# From the top of the diagram, points: the critical difference, the axis, a bar after another.
SCALE, LINE_OF_RANKS, BAR = 3.0, 20.0, 4.0


def critical_difference(tables: Tables, measure: str) -> Figure | None:
    """Return a critical-difference diagram (Demšar, JMLR 2006, Fig. 1) by a measure.

    Defenses stand at their mean ranks; a bar joins those that don't differ significantly.
    """
    names: list[Row] = []
    bars: list[Row] = []
    scales: list[Row] = []
    for spc, group in itertools.groupby(_ranks(tables, measure), lambda row: row["spc"]):
        rows = list(group)
        if rows[0]["critical_difference"] is not None:
            chosen = {"spc": spc_text(spc)}
            names += [chosen | name for name in _names(rows)]
            bars += [chosen | bar for bar in _bars(rows)]
            scales.append(chosen | _scale(rows[0]))
    if not names:
        return None
    last = _last_rank(tables)
    first_name = max((bar["y"] for bar in bars), default=LINE_OF_RANKS) + BAR + 6
    for name in names:
        name["y"] = first_name + ROW * name["level"]
    height = max(name["y"] for name in names) + ROW / 2
    text = (
        f"Critical-difference diagram by {MEASURE_TEXTS[measure]}: defenses at their mean ranks, 1 the best; "
        "a bar joins defenses whose ranks do not differ significantly (Nemenyi, 5 %)."
    )

    def draw(width: float) -> Chart:
        def at(field: str) -> alt.X:
            scale = alt.Scale(domain=[1, last], nice=False, zero=False)
            return alt.X(f"{field}:Q", scale=scale, axis=None)

        y = alt.Y("y:Q", scale=alt.Scale(domain=[0, height], reverse=True, nice=False), axis=None)
        ticks = data({"mean": tick, "y": LINE_OF_RANKS} for tick in _whole_numbers(last)).encode(
            x=at("mean"), y=y
        )
        named, joined, scaled = (_chosen(data(rows)).encode(y=y) for rows in (names, bars, scales))
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
            tips = _tips("defense:N", alt.Tooltip("mean:Q", title="mean rank", format=".2f"))
            layers += [
                here.mark_rule(strokeWidth=0.5).encode(x=at("mean"), x2=end),
                here.mark_text(align=_align(align), dx=dx, baseline="middle").encode(
                    x=end, text=alt.Text("text:N"), tooltip=tips
                ),
            ]
        return _with_choice(alt.layer(*layers)).properties(width=width, height=height)

    return Figure(draw, text)


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


def _align(side: str) -> Any:
    """Return an alignment in the type that Altair wants."""
    return side


# --- effect ----------------------------------------------------------------------------------------


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


def effect(tables: Tables) -> Figure | None:
    """Return the means of all measures with their intervals, a line a defense and a mark a budget."""
    rows = [
        {"defense": row["defense"], "SPC": row["SPC"], "measure": title, "settings": row["num_settings"]}
        | {end: _percent(row[f"{measure}_{end}"]) for end in ENDS}
        for row in _at_budgets(tables)
        for measure, title in MEASURE_TEXTS.items()
        if row[f"{measure}_mean"] is not None
    ]
    if not rows:
        return None
    present = {row["measure"] for row in rows}
    shown = [title for title in MEASURE_TEXTS.values() if title in present]
    budgets = sorted({row["SPC"] for row in rows}, key=lambda text: int(text) if text.isdecimal() else 0)
    # A fifth budget has the first one's colour again, and another shape.
    colors = [BUDGETS[place % len(BUDGETS)] for place in range(len(budgets))]
    order = views.defenses(tables)
    text = (
        f"Means of {', '.join(shown)} over settings with their 95 % intervals, a line a defense and a mark "
        "for each SPC; the dashed line is the untouched model."
    )

    def draw(width: float) -> Chart:
        legend = alt.Legend() if len(budgets) > 1 else None
        base = data([*rows, *_untouched(tables)])
        marks = base.transform_filter("isValid(datum.defense)").encode(
            y=alt.Y("defense:N", sort=order, title=None),
            yOffset=alt.YOffset("SPC:N", sort=budgets),
            color=alt.Color(
                "SPC:N", title="SPC", legend=legend, scale=alt.Scale(domain=budgets, range=colors)
            ),
        )
        x = alt.X("mean:Q", title="%", scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=4))
        layers = alt.layer(
            base.transform_filter("isValid(datum.untouched)")
            .mark_rule(**DASHED)
            .encode(x=alt.X("untouched:Q")),
            *_if_any(rows, marks.mark_rule().encode(x=alt.X("low:Q"), x2=alt.X2("high:Q"))),
            marks.mark_point(size=12).encode(
                x=x,
                shape=alt.Shape("SPC:N", title="SPC", legend=legend, scale=alt.Scale(domain=budgets)),
                tooltip=_full_tips("defense:N", "SPC:N", "measure:N", "settings:Q"),
            ),
        ).properties(width=width, height=max(ROW, 5.0 * len(budgets)) * len(order))
        panels = layers.facet(alt.Facet("measure:N", sort=shown, title=None), columns=len(shown))
        return panels.resolve_scale(x="independent")

    return Figure(draw, text, columns=len(shown))


def _untouched(tables: Tables) -> list[Row]:
    """Return the means of the untouched models over all settings, percent."""
    rows = [row for row in tables.consistency.to_pylist() if row["defense"] == NO_METHOD]
    return [
        {"measure": title, "untouched": _percent(row[f"{measure}_mean"])}
        for row in rows[:1]  # the others are of the single budgets
        for measure, title in MEASURE_TEXTS.items()
        if row[f"{measure}_mean"] is not None
    ]


# --- heat map --------------------------------------------------------------------------------------


def domains(tables: Tables) -> dict[str, tuple[float, float]]:
    """Return for each measure which percents its colours are from and to; what lies beyond has the last.

    Accuracies and ratings of one defense differ little from another's: theirs are tens around the means.
    """
    means = 100 * heat(tables)[list(SCORES)]
    found = dict.fromkeys(SCORES, (0.0, 100.0))
    for measure in ("acc", "der"):
        values = means[measure].dropna()
        if len(values):
            low = min(90.0, 10.0 * math.floor(values.min() / 10))
            found[measure] = (low, max(low + 10, 10.0 * math.ceil(values.max() / 10)))
    return found


def took(tables: Tables) -> pd.DataFrame:
    """Return the rows of the summary of models whose attack took, measures by their names."""
    summary: pd.DataFrame = tables.summary.to_pandas()
    means = summary.rename(columns={f"{measure}_mean": measure for measure in SCORES})
    return means[means["attack_took"].fillna(False).astype(bool)]


def heat(tables: Tables) -> pd.DataFrame:
    """Return the mean of each measure for each defense and attack: a row each, columns ``SCORES``.

    It is over settings whose attack took, each by its own mean over budgets; clean models are the attack
    ``none``.
    """
    summary: pd.DataFrame = tables.summary.to_pandas()
    means = summary.rename(columns={f"{measure}_mean": measure for measure in SCORES})
    means = pd.concat([means[means["attack"] == NO_METHOD], took(tables)])
    of_settings = means.groupby(["defense", *SETTING])[list(SCORES)].mean()
    return of_settings.groupby(["defense", "attack"]).mean().reset_index()


def heatmap(tables: Tables) -> Figure | None:
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

    def draw(width: float) -> Chart:
        bare: dict[str, Any] = {"ticks": False, "domain": False}
        base = data(rows).encode(
            x=alt.X("attack:N", title=None, axis=alt.Axis(labelAngle=-90, **bare)),
            y=alt.Y("defense:N", title=None, sort=order, axis=alt.Axis(**bare)),
            tooltip=_tips("defense:N", "attack:N", alt.Tooltip("mean:Q", format=".1f")),
        )
        scale = alt.Scale(domain=[0, 1], range=list(CIVIDIS))
        ink = alt.condition(f"datum.shade > {LIGHT_FROM}", alt.value(DARK), alt.value(LIGHT))
        layers = alt.layer(
            base.mark_rect().encode(color=alt.Color("shade:Q", scale=scale, legend=None)),
            base.mark_text(fontSize=6).encode(text=alt.Text("mean:Q", format=".0f"), color=ink),
        ).properties(width=width, height=height)
        return layers.facet(alt.Facet("measure:N", sort=shown, title=None), columns=len(shown))

    return Figure(draw, text, columns=len(shown))


# --- curves ----------------------------------------------------------------------------------------


def by_spc(tables: Tables) -> Figure | None:
    """Return a panel a defense: its means of ASR, ACC and RA over the budgets, with their intervals."""
    rows = [
        {"defense": row["defense"], "given": row["threat_model"] != DATA_FREE, "at": spc_text(row["spc"])}
        | {"measure": MEASURE_TEXTS[measure]}
        | {end: _percent(row[f"{measure}_{end}"]) for end in ENDS}
        for row in tables.consistency.to_pylist()
        for measure in CURVES
        if row["spc"] and row["defense"] != NO_METHOD and row[f"{measure}_mean"] is not None
    ]
    text = (
        "ASR, ACC and RA of each defense by the clean samples per class (SPC) that the defender holds: means "
        "over settings, bands are their 95 % intervals."
    )
    return _curves(tables, rows, "SPC", text)


def by_ratio(tables: Tables) -> Figure | None:
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
    return _curves(tables, rows, "poisoning ratio", text)


def _clipped(share: float) -> float | None:
    """Return a share in percent, an end of an interval where shares live; None if it is missing."""
    return None if math.isnan(share) else 100 * min(1.0, max(0.0, share))


def _curves(tables: Tables, rows: Sequence[Row], axis: str, text: str) -> Figure | None:
    """Return a panel a defense: lines of the measures over ``at``, with bands."""
    places = sorted({row["at"] for row in rows}, key=float)
    if len(places) < 2:
        return None
    present = {row["defense"] for row in rows}
    order = [defense for defense in views.defenses(tables) if defense in present]
    columns = min(MOST_COLUMNS, len(order))
    titles = [MEASURE_TEXTS[measure] for measure in CURVES]

    def draw(width: float) -> Chart:
        colors = alt.Scale(domain=titles, range=[RED, BLUE, GREEN])
        base = data(rows).encode(
            x=alt.X("at:O", sort=places, title=axis, axis=alt.Axis(labelAngle=0)),
            color=alt.Color("measure:N", title=None, scale=colors),
        )
        y = alt.Y("mean:Q", title="%", scale=alt.Scale(domain=[0, 100]), axis=alt.Axis(values=[0, 50, 100]))
        dashes = alt.Scale(domain=[True, False], range=[[1, 0], [2, 2]])
        layers = alt.layer(
            *_if_any(rows, base.mark_area(opacity=0.2).encode(y=alt.Y("low:Q"), y2=alt.Y2("high:Q"))),
            base.mark_line().encode(y=y, strokeDash=alt.StrokeDash("given:N", legend=None, scale=dashes)),
            base.mark_point(size=9).encode(
                y=y,
                shape=alt.Shape("measure:N", title=None, scale=alt.Scale(domain=titles)),
                tooltip=_full_tips("defense:N", alt.Tooltip("at:N", title=axis), "measure:N"),
            ),
        ).properties(width=width, height=SMALL_HEIGHT)
        return layers.facet(alt.Facet("defense:N", sort=order, title=None), columns=columns)

    return Figure(draw, text, columns=columns)


# --- consistency and cost --------------------------------------------------------------------------


def spread(tables: Tables) -> Figure | None:
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

    def draw(width: float) -> Chart:
        base = data(rows).encode(y=alt.Y("defense:N", sort=order, title=None))
        unchanged = data([{"unchanged": 100 * UNCHANGED}])
        tips = [alt.Tooltip(f"{name}:Q", format=".1f") for name in (*parts, "mean")]
        x = alt.X("lowest:Q", title="DER of settings, %", scale=alt.Scale(zero=False))
        return alt.layer(
            unchanged.mark_rule(**DASHED).encode(x=alt.X("unchanged:Q")),
            base.mark_rule(strokeWidth=0.6).encode(x=x, x2=alt.X2("highest:Q")),
            base.mark_rule(strokeWidth=4, color=BLUE, opacity=0.55).encode(
                x=alt.X("low:Q"), x2=alt.X2("high:Q")
            ),
            base.mark_point(size=16).encode(
                x=alt.X("median:Q"), color=alt.value("black"), tooltip=_tips("defense:N", *tips, "settings:Q")
            ),
        ).properties(width=width, height=ROW * len(rows))

    return Figure(draw, text, COLUMN)


def cost(tables: Tables, measure: str) -> Figure | None:
    """Return the mean of a measure against the seconds that a defense takes, the Pareto front marked."""
    budgets = {spc_text(spc): rows for spc in views.budgets(tables) if (rows := _costs(tables, measure, spc))}
    rows = [row for rows in budgets.values() for row in rows]
    if not rows:
        return None
    title = MEASURE_TEXTS[measure]
    text = (
        f"Mean {title} of each defense against the seconds that it takes, on a logarithmic axis; the line "
        "joins the Pareto front: the defenses that no other beats in both."
    )
    x_ends = layout.around([math.log10(row["seconds"]) for row in rows], 0.12)
    y_ends = layout.around([row[end] for row in rows for end in ENDS if row[end] is not None], 0.04)
    height = 190.0
    roles = [FRONT, BEATEN, BOUND]

    def draw(width: float) -> Chart:
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
            return alt.Y(f"{field}:Q", title=f"{title}, %", scale=scale)

        color = alt.Color("role:N", title=None, scale=alt.Scale(domain=roles, range=[RED, BLUE, GREY]))
        shapes = alt.Scale(domain=roles, range=["diamond", "circle", "cross"])
        base = _chosen(data(placed)).encode(x=x)
        front = base.transform_filter(f"datum.role === '{FRONT}'")
        layers = [
            front.mark_line(interpolate="step-after", strokeDash=[2, 2], strokeWidth=0.8, color=RED).encode(
                y=up("mean"), order=alt.Order("seconds:Q")
            ),
            *_if_any(
                rows, base.mark_rule(opacity=0.45).encode(y=up("low"), y2=alt.Y2("high:Q"), color=color)
            ),
            base.mark_point(size=24).encode(
                y=up("mean"),
                color=color,
                shape=alt.Shape("role:N", title=None, scale=shapes),
                tooltip=_full_tips("defense:N", alt.Tooltip("seconds:Q", format=".3~s"), "role:N"),
            ),
        ]
        for align, dx in (("left", 4), ("right", -4)):
            here = base.transform_filter(f"datum.align === '{align}'")
            text_mark = here.mark_text(align=_align(align), dx=dx, baseline="middle")
            layers.append(text_mark.encode(y=up("label"), text=alt.Text("defense:N")))
        return _with_choice(alt.layer(*layers)).properties(width=width, height=height)

    return Figure(draw, text)


def _costs(tables: Tables, measure: str, spc: int | None) -> list[Row]:
    """Return what a defense costs at a budget and what it reaches, and whether it is on the front."""
    found = [
        row
        for row in tables.consistency.to_pylist()
        if row["spc"] == spc and row["defense"] != NO_METHOD and row["seconds"]
    ]
    chosen = [row for row in found if row[f"{measure}_mean"] is not None]
    rivals = [row for row in chosen if row["threat_model"] != KNOWN_TRIGGER]
    sign = -1 if measure in LOWER_IS_BETTER else 1
    points = [(row["seconds"], sign * row[f"{measure}_mean"]) for row in rivals]
    best = {row["defense"] for row, on in zip(rivals, layout.pareto(points), strict=True) if on}
    others: Iterable[str] = {row["defense"] for row in rivals}
    return [
        {"defense": row["defense"], "seconds": row["seconds"], "above": row["defense"] in best}
        | {end: _percent(row[f"{measure}_{end}"]) for end in ENDS}
        | {"role": FRONT if row["defense"] in best else BEATEN if row["defense"] in others else BOUND}
        for row in chosen
    ]
