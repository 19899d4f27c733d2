"""What figures of a report share: colours, what marks say, the heat map's numbers, ranks, curves."""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import altair as alt
import numpy as np
import pandas as pd

from detrojan.analysis.report import views
from detrojan.analysis.report.vega import Chart, Figure, data
from detrojan.analysis.report.views import MEASURE_TEXTS, Row, Tables, spc_text
from detrojan.analysis.statistics.arrays import Flags
from detrojan.analysis.statistics.crossed import Crossed
from detrojan.analysis.statistics.frames import SETTING
from detrojan.analysis.statistics.relative import LOWER_IS_BETTER, SCORES
from detrojan.cells import NO_METHOD

# Okabe and Ito's, which colour-blind readers tell apart, in the order of `MEASURE_TEXTS`.
COLORS = ("#CC79A7", "#D55E00", "#0072B2", "#009E73")
PURPLE, RED, BLUE, GREEN = COLORS
GREY = "#8a8f94"
BUDGETS = ("#8ec6e8", "#3b8fc4", "#0a4b7c", "#052a47")  # from few samples to many
# From bad (0) to good (1), pale between: browns and greens that colour-blind readers tell apart (BrBG, by
# Cynthia Brewer).
BAD_TO_GOOD = (
    *("#543005", "#8c510a", "#bf812d", "#dfc27d", "#f6e8c3", "#f5f5f5"),
    *("#c7eae5", "#80cdc1", "#35978f", "#01665e", "#003c30"),
)
DARK, LIGHT = "#000000", "#ffffff"  # text on these
PALE = (0.148, 0.841)  # between these shades black text has more contrast than white: 4.5 at least
ROW = 11.0  # points, of a defense
SMALL_HEIGHT = 44.0  # points, of a panel among many
MOST_COLUMNS = 6
CURVES = ("asr", "acc", "ra")
ENDS = ("mean", "low", "high")
# What a defense changes, by the measure: its column in consistency, the sign of what it says there, a title.
CHANGES = {
    "der": ("der", 1, "DER, %"),
    "asr": ("asr_reduction", -1, "ASR change, points"),
    "acc": ("acc_drop", -1, "ACC change, points"),
    "ra": ("ra_recovery", 1, "RA change, points"),
}
ON_GRID = dict(zip(ENDS, ("mean", "grid_low", "grid_high"), strict=True))  # as consistency calls them
DASHED: dict[str, Any] = {"strokeDash": [3, 2], "strokeWidth": 0.6}


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


def of_choice(chart: alt.Chart) -> alt.Chart:
    """Return ``chart`` with the rows of the chosen budget alone; see :func:`with_choice`."""
    return chart.transform_filter("datum.spc === spc")


def with_choice(chart: Chart) -> Chart:
    """Return ``chart`` with a parameter, ``spc``: the text of the budget that it shows."""
    return chart.add_params(alt.param("spc", value=spc_text(None)))


def percent(value: float | None) -> float | None:
    """Return a share in percent, if there is one."""
    return None if value is None else 100 * value


def changed(row: Row, measure: str) -> Row:
    """Return what a defense changes against the untouched model of its own settings, percent or points.

    Of DER that is DER itself, of which 50 is no change.

    Args:
        row: of ``consistency``.
        measure: one of ``CHANGES``.
    """
    column, sign, _ = CHANGES[measure]
    mean, low, high = (percent(row[f"{column}_{part}"]) for part in ON_GRID.values())
    if sign > 0:
        return {"mean": mean, "low": low, "high": high}
    return {
        end: None if value is None else -value for end, value in zip(ENDS, (mean, high, low), strict=True)
    }


def whole_numbers(last: int) -> list[int]:
    """Return ticks from 1 to ``last``, some twenty at most."""
    step = math.ceil(last / 20)
    return sorted({1, *range(step, last + 1, step)})


def if_any(rows: Iterable[Row], *intervals: Chart) -> list[Chart]:
    """Return the layers of intervals if there are any; without, Vega warns of axes without ends."""
    return list(intervals) if any(row["low"] is not None for row in rows) else []


def tips(*fields: str | alt.Tooltip) -> list[alt.Tooltip]:
    """Return what a mark says of itself."""
    return [alt.Tooltip(field) if isinstance(field, str) else field for field in fields]


def full_tips(*fields: str | alt.Tooltip, form: str = ".1f") -> list[alt.Tooltip]:
    """Return what a mark says of itself: ``fields``, then its mean and interval."""
    return tips(*fields, *(alt.Tooltip(f"{end}:Q", format=form) for end in ENDS))


# --- heat map --------------------------------------------------------------------------------------


def shade(value: float, measure: str) -> float:
    """Return how good a share is, from 0 to 1: the same in all reports, whatever is in them."""
    within = min(1.0, max(0.0, value))
    return 1 - within if measure in LOWER_IS_BETTER else within


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


# --- ranks -----------------------------------------------------------------------------------------


def ranks_by(tables: Tables, measure: str) -> list[Row]:
    """Return the rows of the ranks by a measure, of defenses that are ranked."""
    return [row for row in tables.ranks.to_pylist() if row["measure"] == measure and row["ranked"]]


def last_rank(tables: Tables) -> int:
    """Return the last rank that a defense could have."""
    return max(int(row["num_defenses"]) for row in tables.ranks.to_pylist())


def aligned(side: str) -> Any:
    """Return an alignment in the type that Altair wants."""
    return side


# --- curves ----------------------------------------------------------------------------------------


class Point(NamedTuple):
    """A point of a curve, before it is known which settings all points have.

    Attributes:
        settings: their keys, which are the same at the other points.
        of: returns a measure over some of the settings.
    """

    settings: Sequence[Hashable]
    of: Callable[[Flags], Crossed]


def curve(points: Mapping[str, Point]) -> list[Row]:
    """Return a row a point, over the settings that all points have.

    Over different settings a line would show how these differ, too. What other settings have at a point is a
    row of its own, ``rest``.

    Args:
        points: by where they stand on the axis.
    """
    means = {
        at: dict(zip(point.settings, point.of(np.full(len(point.settings), True)).means, strict=True))
        for at, point in points.items()
    }
    known = {at: {key for key, mean in of.items() if not math.isnan(mean)} for at, of in means.items()}
    known = {at: keys for at, keys in known.items() if keys}
    shared = set.intersection(*known.values()) if known else set()
    rows: list[Row] = []
    for at, keys in known.items():
        if shared:
            found = points[at].of(np.array([key in shared for key in points[at].settings]))
            ends = (found.mean, *found.grid.interval(found.mean))
            row = {"at": at, "rest": False, "settings": len(shared)}
            rows.append(row | dict(zip(ENDS, map(_clipped, ends), strict=True)))
        if rest := [means[at][key] for key in sorted(keys - shared, key=str)]:
            row = {"at": at, "rest": True, "settings": len(rest), "low": None, "high": None}
            rows.append(row | {"mean": _clipped(sum(rest) / len(rest))})
    return rows


def _clipped(share: float) -> float | None:
    """Return a share in percent, an end of an interval where shares live; None if it is missing."""
    return None if math.isnan(share) else 100 * min(1.0, max(0.0, share))


COMMON = (
    "Lines are over the settings that have a result at every point, n of them, and bands their 95 % "
    "intervals on this grid; faint dots are the other settings."
)


def curves(tables: Tables, rows: Sequence[Row], axis: str, text: str) -> Figure | None:
    """Return a panel a defense: lines of the measures over ``at``, with bands; see :func:`curve`."""
    places = sorted({row["at"] for row in rows}, key=float)
    if len(places) < 2:
        return None
    number = {row["defense"]: 0 for row in rows}
    for row in rows:
        if not row["rest"]:
            number[row["defense"]] = max(number[row["defense"]], row["settings"])
    order = [f"{name} (n {number[name]})" for name in views.defenses(tables) if name in number]
    named = [row | {"panel": f"{row['defense']} (n {number[row['defense']]})"} for row in rows]
    columns = min(MOST_COLUMNS, len(order))
    titles = [MEASURE_TEXTS[measure] for measure in CURVES]

    def chart(width: float) -> Chart:
        colors = alt.Scale(domain=titles, range=[RED, BLUE, GREEN])
        base = data(named).encode(
            x=alt.X("at:O", sort=places, title=axis, axis=alt.Axis(labelAngle=0)),
            color=alt.Color("measure:N", title=None, scale=colors),
        )
        line = base.transform_filter("!datum.rest")
        y = alt.Y("mean:Q", title="%", scale=alt.Scale(domain=[0, 100]), axis=alt.Axis(values=[0, 50, 100]))
        dashes = alt.Scale(domain=[True, False], range=[[1, 0], [2, 2]])
        shape = alt.Shape("measure:N", title=None, scale=alt.Scale(domain=titles))
        tip = full_tips("defense:N", alt.Tooltip("at:N", title=axis), "measure:N", "settings:Q")
        rest = base.transform_filter("datum.rest").mark_point(size=9, opacity=0.35)
        layers = alt.layer(
            *if_any(rows, line.mark_area(opacity=0.2).encode(y=alt.Y("low:Q"), y2=alt.Y2("high:Q"))),
            line.mark_line().encode(y=y, strokeDash=alt.StrokeDash("given:N", legend=None, scale=dashes)),
            line.mark_point(size=9).encode(y=y, shape=shape, tooltip=tip),
            *([rest.encode(y=y, shape=shape, tooltip=tip)] if any(row["rest"] for row in rows) else ()),
        ).properties(width=width, height=SMALL_HEIGHT)
        return layers.facet(alt.Facet("panel:N", sort=order, title=None), columns=columns)

    return Figure(chart, text, columns=columns)
