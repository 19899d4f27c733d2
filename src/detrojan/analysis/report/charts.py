"""What figures of a report share: colours, what marks say, the heat map's numbers, ranks, curves."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt
import pandas as pd

from detrojan.analysis.report import views
from detrojan.analysis.report.vega import Chart, Figure, data
from detrojan.analysis.report.views import MEASURE_TEXTS, Row, Tables, spc_text
from detrojan.analysis.statistics.frames import SETTING
from detrojan.analysis.statistics.relative import SCORES
from detrojan.cells import NO_METHOD

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


def curves(tables: Tables, rows: Sequence[Row], axis: str, text: str) -> Figure | None:
    """Return a panel a defense: lines of the measures over ``at``, with bands."""
    places = sorted({row["at"] for row in rows}, key=float)
    if len(places) < 2:
        return None
    present = {row["defense"] for row in rows}
    order = [defense for defense in views.defenses(tables) if defense in present]
    columns = min(MOST_COLUMNS, len(order))
    titles = [MEASURE_TEXTS[measure] for measure in CURVES]

    def chart(width: float) -> Chart:
        colors = alt.Scale(domain=titles, range=[RED, BLUE, GREEN])
        base = data(rows).encode(
            x=alt.X("at:O", sort=places, title=axis, axis=alt.Axis(labelAngle=0)),
            color=alt.Color("measure:N", title=None, scale=colors),
        )
        y = alt.Y("mean:Q", title="%", scale=alt.Scale(domain=[0, 100]), axis=alt.Axis(values=[0, 50, 100]))
        dashes = alt.Scale(domain=[True, False], range=[[1, 0], [2, 2]])
        layers = alt.layer(
            *if_any(rows, base.mark_area(opacity=0.2).encode(y=alt.Y("low:Q"), y2=alt.Y2("high:Q"))),
            base.mark_line().encode(y=y, strokeDash=alt.StrokeDash("given:N", legend=None, scale=dashes)),
            base.mark_point(size=9).encode(
                y=y,
                shape=alt.Shape("measure:N", title=None, scale=alt.Scale(domain=titles)),
                tooltip=full_tips("defense:N", alt.Tooltip("at:N", title=axis), "measure:N"),
            ),
        ).properties(width=width, height=SMALL_HEIGHT)
        return layers.facet(alt.Facet("defense:N", sort=order, title=None), columns=columns)

    return Figure(chart, text, columns=columns)
