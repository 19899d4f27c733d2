"""What a figure in Vega-Lite is, and how it becomes the files of a paper.

Lengths are points, 1/72 inch, as they stand on paper; the page enlarges them. Text, lines and ground have
their colours from a configuration, ``page/vega.json``, so that the page can set its own on a dark ground.
All text has one weight, for a PDF with two faces of a font has them in an order that differs from run to run.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import altair as alt
import vl_convert

POINTS = 72  # an inch
COLUMN, PAGE = 3.3, 7.0  # inches: one column of a paper, and two
DPI = 300
BESIDE = 60.0  # points, about what stands beside the panels
# Entries of a PDF's dictionaries, whose order differs from run to run.
ENTRIES = re.compile(rb"(?:^ +/\w+ \d+ 0 R\n)+", re.MULTILINE)
# The converter of Vega brings the font along; where it is not installed, Arial has the same widths.
CONFIG: dict[str, Any] = json.loads(Path(__file__).with_name("page").joinpath("vega.json").read_text())

# Altair's charts, layers and facets have no type in common that tells what can be done with all of them.
Chart = Any
Spec = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of a report.

    Attributes:
        draw: returns the chart for the width of a panel, points.
        alt: says in words what it shows.
        inches: its width on paper.
        columns: its panels in a row.
        nothing: whether there is nothing to show, and words say why.
    """

    draw: Callable[[float], Chart]
    alt: str
    inches: float = PAGE
    columns: int = 1
    nothing: bool = False

    @functools.cached_property
    def spec(self) -> Spec:
        """Its Vega-Lite specification, at about its width on paper: the page fits it into its own place."""
        return self._drawn(self._panel)

    def _drawn(self, width: float) -> Spec:
        # Tests hold all figures against Vega-Lite's schema; doing so takes ten times as long as the rest.
        return dict(self.draw(width).to_dict(validate=False))

    @property
    def fitted(self) -> Spec:
        """Its Vega-Lite specification at its width on paper, but for rounding."""
        # What stands beside the panels is as wide as its text, which only the drawing knows.
        width = self._panel
        for _ in range(2):
            width -= (_size(_svg(_of_width(self.spec, width)))[0] - self.inches * POINTS) / self.columns
        return self._drawn(width)

    @property
    def _panel(self) -> float:
        return (self.inches * POINTS - BESIDE) / self.columns


def _of_width(spec: Spec, width: float) -> Spec:
    """Return ``spec`` with panels of another width; what was placed by the width stays where it was."""
    if "spec" in spec:  # panels beside each other
        return spec | {"spec": _of_width(spec["spec"], width)}
    return spec | {"width": width}


class Files(NamedTuple):
    """A figure as it is written beside the page; the names are those of the files."""

    svg: str
    png: bytes
    pdf: bytes


@functools.cache
def bundle() -> str:
    """Return the JavaScript that draws specifications, Vega-Embed and all that it needs, from no network."""
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def files(figure: Figure) -> Files:
    """Return a figure as SVG, PNG and PDF; the same figure gives the same bytes."""
    svg = _svg(figure.fitted)
    # Vega has panels of whole points; what is amiss after that, 1 % at most, is enlarged away.
    exact = _resized(svg, figure.inches * POINTS, "")
    pdf = ENTRIES.sub(lambda found: b"".join(sorted(found[0].splitlines(True))), vl_convert.svg_to_pdf(exact))
    return Files(_resized(svg, figure.inches, "in"), vl_convert.svg_to_png(exact, ppi=DPI), pdf)


def _svg(spec: Spec) -> str:
    return str(vl_convert.vegalite_to_svg(spec, config=CONFIG, allowed_base_urls=[]))


def _size(svg: str) -> tuple[float, float]:
    """Return width and height, points."""
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert found, svg[:200]
    return float(found[1]), float(found[2])


def _resized(svg: str, width: float, unit: str) -> str:
    """Return a picture that is enlarged to this width; without a unit, points."""
    before, height = _size(svg)
    size = f'width="{width:g}{unit}" height="{width * height / before:.4f}{unit}"'
    return re.sub(r'width="[\d.]+" height="[\d.]+"', size, svg, count=1)


def words(text: str) -> Figure:
    """Return a figure that says in words why there is nothing to show."""

    def draw(width: float) -> Chart:
        return data([{}]).mark_text(text=text).properties(width=width, height=30)

    return Figure(draw, text, nothing=True)


def data(rows: Iterable[Mapping[str, Any]]) -> alt.Chart:
    """Return a chart of ``rows`` that has no marks yet."""
    return alt.Chart(alt.InlineData(values=[dict(row) for row in rows]))
