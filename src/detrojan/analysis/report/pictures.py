"""How pictures made of images are drawn: the style of Matplotlib's figures, and their SVG."""

import io
import re
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

WIDTH = 7.2  # inches: two columns of a paper
STYLE: dict[Any, Any] = {
    "font.size": 7.5,
    "svg.fonttype": "none",  # text stays text: small, and found by a search
    "svg.hashsalt": "detrojan",  # otherwise ids differ from run to run
    "image.composite_image": False,  # each image keeps its own pixels in an SVG
}
UNDATED = {"Date": None, "Creator": None, "Type": None, "Format": None}


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
