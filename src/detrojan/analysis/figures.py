"""Draws the figure of a study: what each defense leaves of the backdoor, and what it costs in accuracy."""

import io
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import matplotlib as mpl
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Wedge
from matplotlib.path import Path

from detrojan.analysis.views import Row, Setting, attack_text, counted, groups
from detrojan.cells import NO_METHOD

MAX_PANELS = 48  # more than a page can hold
MAX_COLUMNS = 4
WIDTH = 7.2  # inches: two columns of a paper
PANEL_WIDTH, PANEL_HEIGHT = 3.2, 1.95  # inches, where there is room
# Okabe and Ito's colours, which colour-blind readers tell apart, without the yellow that white swallows;
# a colour comes back with another marker, as the two lists' lengths have no common divisor.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#6B4C9A")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">", "h")
SMALLEST, LARGEST = 4.0, 6.5  # markers, points
IDEAL = "#BFE3CF"
STYLE: dict[Any, Any] = {
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7.5,
    "svg.fonttype": "none",  # text stays text: small, and found by a search
    "svg.hashsalt": "detrojan",  # otherwise ids differ from run to run
    "image.composite_image": False,  # each image keeps its own pixels in an SVG
}
UNDATED = {"Date": None, "Creator": None, "Type": None, "Format": None}


class Look(NamedTuple):
    """How the points of a defense at an SPC are drawn."""

    color: str
    marker: str
    fullness: float
    edge: str


def effect(summary: pa.Table) -> str:
    """Return an SVG: ACC against ASR of each defense and SPC, a panel for each setting whose attack took.

    The same table gives the same text.

    Args:
        summary: of the schema ``SUMMARY``.
    """
    with mpl.rc_context(STYLE):
        return svg(draw(summary))


def svg(figure: Figure) -> str:
    """Return ``figure``, which was drawn in ``STYLE``, as SVG that names nothing on the network."""
    text = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(text, format="svg", metadata=UNDATED)
    return re.sub(r"<!DOCTYPE[^>]*>\s*", "", text.getvalue())


def words(text: str) -> Figure:
    """Return a figure that says in words why there is nothing to show."""
    figure = Figure((WIDTH, 0.8))
    figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=9)
    return figure


def draw(summary: pa.Table) -> Figure:
    """Return the figure that :func:`effect` writes."""
    settings = groups(summary)
    took = {setting: rows for setting, rows in settings.items() if setting.attack_took}
    num_failed = sum(setting.attack_took is False for setting in settings)
    shown = dict(list(took.items())[:MAX_PANELS])
    if not shown:
        return words(_nothing(num_failed))
    looks = _looks(summary)
    num_columns = min(len(shown), MAX_COLUMNS)
    num_rows = math.ceil(len(shown) / num_columns)
    legend = _legend(looks)
    width = min(WIDTH, max(1.5 * PANEL_WIDTH, num_columns * PANEL_WIDTH))
    legend_columns = int(width / 1.2)
    notes = _notes(len(shown), len(took), num_failed)
    legend_height = 0.17 * (math.ceil(len(legend) / legend_columns) + len(notes.splitlines())) + 0.2
    figure = Figure((width, num_rows * PANEL_HEIGHT + legend_height + 0.3), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
    floor = _floor(shown)
    for panel, (setting, rows) in zip(axes.flat, shown.items(), strict=False):
        _panel(panel, _title(setting, shown), rows, looks, floor)
    for panel in axes.flat[len(shown) :]:
        panel.set_visible(False)
    for panel in axes.flat[max(0, len(shown) - num_columns) : len(shown)]:
        panel.tick_params(labelbottom=True)  # also above an empty place
    figure.supxlabel("attack success rate ASR, %", fontsize=8)
    figure.supylabel("accuracy ACC, %", fontsize=8)
    figure.legend(
        handles=legend, loc="outside upper center", ncols=legend_columns, frameon=False, title=notes or None
    )
    return figure


def _nothing(num_failed: int) -> str:
    """Return why no setting can be shown."""
    if num_failed:
        failed = counted(num_failed, "setting")
        return f"No attack of this study took ({failed} failed the gate): there is no backdoor to remove."
    return "No model of this study was attacked: there is no attack success to show."


def _notes(num_shown: int, num_took: int, num_failed: int) -> str:
    """Return what the figure leaves out, a line each."""
    notes = []
    if num_shown < num_took:
        notes.append(f"The first {num_shown} of {num_took} settings; tables/summary.parquet has all.")
    if num_failed:
        notes.append(f"Left out, as the attack failed the gate: {counted(num_failed, 'setting')}.")
    return "\n".join(notes)


def _looks(summary: pa.Table) -> dict[tuple[str, int], Look]:
    """Return the look of each defense and SPC: the defense gives colour and shape, SPC size and fill.

    The fewest samples make a small open marker, the most a large full one; in between, in between.
    A method that is given no data has a full marker with a black edge.
    """
    pairs = sorted({(row["defense"], row["spc"]) for row in summary.to_pylist()} - {(NO_METHOD, 0)})
    order = {defense: place for place, defense in enumerate(sorted({defense for defense, _ in pairs}))}
    fullness = _fullness(pairs)
    looks = {}
    for defense, spc in pairs:
        color = COLORS[order[defense] % len(COLORS)]
        marker = MARKERS[order[defense] % len(MARKERS)]
        looks[defense, spc] = Look(color, marker, fullness.get(spc, 0.7), color if spc else "black")
    return looks


def _fullness(pairs: Iterable[tuple[str, int]]) -> dict[int, float]:
    """Return how full the marker of each SPC is, from 0 for the fewest samples to 1 for the most."""
    spcs = sorted({spc for _, spc in pairs if spc})
    return {spc: place / (len(spcs) - 1) if len(spcs) > 1 else 1.0 for place, spc in enumerate(spcs)}


def _title(setting: Setting, shown: dict[Setting, list[Row]]) -> str:
    """Return what tells a panel from the others; what all share stands in the page's text."""
    parts = [
        getattr(setting, axis)
        for axis in ("dataset", "architecture")
        if len({getattr(other, axis) for other in shown}) > 1
    ]
    attack = attack_text(setting.attack, setting.ratio)
    return "\n".join([*([" · ".join(parts)] if parts else []), attack])


def _floor(shown: dict[Setting, list[Row]]) -> float:
    """Return where all ACC axes start, percent: a multiple of ten below every point and interval."""
    lowest = min(
        (
            100 * row[f"acc_{part}"]
            for rows in shown.values()
            for row in rows
            for part in ("low", "mean")
            if row[f"acc_{part}"] is not None
        ),
        default=0.0,
    )
    return min(90.0, 10.0 * math.floor(lowest / 10 - 0.1))


def _panel(
    panel: Axes, title: str, rows: list[Row], looks: dict[tuple[str, int], Look], floor: float
) -> None:
    height = 100 - floor
    panel.set_title(title, pad=4)
    panel.set_xlim(-6, 106)
    panel.set_ylim(floor - 0.02 * height, 100 + 0.06 * height)
    panel.set_xticks([0, 25, 50, 75, 100])
    panel.grid(color="0.92", linewidth=0.5)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_axisbelow(True)
    # A wedge of a circle in points, as the axes' units differ.
    panel.plot(0, 100, marker=_corner(), markersize=26, color=IDEAL, zorder=1, clip_on=False)
    points = [row for row in rows if row["acc_mean"] is not None and row["asr_mean"] is not None]
    for row in sorted(points, key=lambda row: -row["spc"]):  # large markers below small ones
        x, y = 100 * row["asr_mean"], 100 * row["acc_mean"]
        if row["defense"] == NO_METHOD:
            panel.axvline(x, color="0.6", linewidth=0.6, linestyle=(0, (4, 2)), zorder=1.5)
            panel.axhline(y, color="0.6", linewidth=0.6, linestyle=(0, (4, 2)), zorder=1.5)
            panel.plot(x, y, marker="*", markersize=9, color="black", markeredgewidth=0, zorder=4)
            continue
        look = looks[row["defense"], row["spc"]]
        panel.errorbar(
            x,
            y,
            xerr=_reaches(row, "asr"),
            yerr=_reaches(row, "acc"),
            color=look.color,
            elinewidth=0.7,
            alpha=0.75,
            zorder=2,
            linestyle="none",
        )
        panel.plot(x, y, zorder=3, **_marker(look))


def _reaches(row: Row, measure: str) -> list[list[float]] | None:
    """Return how far the interval reaches to either side of the mean, percent."""
    mean, low, high = (row[f"{measure}_{part}"] for part in ("mean", "low", "high"))
    # A clipped end may lie on the wrong side of the mean by a rounding error.
    return None if low is None else [[100 * max(0.0, mean - low)], [100 * max(0.0, high - mean)]]


def _marker(look: Look) -> dict[str, Any]:
    full = look.fullness if look.edge != "black" else 1.0
    fill = [full * channel + 1 - full for channel in to_rgb(look.color)]
    return {
        "marker": look.marker,
        "markersize": SMALLEST + look.fullness * (LARGEST - SMALLEST),
        "markerfacecolor": (*fill, 0.85),  # what it covers shows through
        "markeredgecolor": look.edge,
        "markeredgewidth": 0.9,
        "linestyle": "none",
    }


def _corner() -> Path:
    """Return the quarter of a disc that opens to the lower right: its tip is the ideal."""
    return Wedge((0, 0), 1, 270, 360).get_path()


def _legend(looks: dict[tuple[str, int], Look]) -> list[Line2D]:
    """Return an entry a defense, in its colour and shape, and an entry an SPC, in grey."""
    entries: dict[str, dict[str, Any]] = {
        "untouched model": {"marker": "*", "markersize": 9, "color": "black", "linestyle": "none"},
        "ideal": {"marker": _corner(), "markersize": 14, "color": IDEAL, "linestyle": "none"},
    }
    for (defense, spc), look in looks.items():
        entries[defense] = _marker(look._replace(fullness=0.7, edge=look.color if spc else "black"))
        entries[defense]["markerfacecolor"] = look.color
    entries |= {
        f"SPC {spc}": _marker(Look("#555555", "o", fullness, "#555555"))
        for spc, fullness in _fullness(looks).items()
    }
    if any(not spc for _, spc in looks):
        entries["given no data"] = _marker(Look("#BBBBBB", "o", 0.7, "black"))
    return [Line2D([], [], label=label, **look) for label, look in entries.items()]
