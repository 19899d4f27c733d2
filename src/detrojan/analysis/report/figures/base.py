"""What a figure says of itself, and how the figures that there are become those of a report.

A figure is a file in this folder, whose name is the figure's. It has ``PLAN``, a :class:`Plan`, and a
function ``draw``, which takes the tables of a report and returns a figure, or None where there is nothing to
show. If it takes a ``measure`` too, the page draws one for each measure, and paper has that of DER.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

from detrojan import registry
from detrojan.analysis.report.charts import nothing_to_show
from detrojan.analysis.report.vega import Figure, words
from detrojan.analysis.report.views import MEASURE_TEXTS, Tables

ON_PAPER = "der"
# Those of the page that have a place for figures, in its order.
SECTIONS = ("ranking", "effect", "heat", "curves", "cost", "consistency", "comparisons", "outcomes")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where a figure stands on the page, and what stands beside it.

    Attributes:
        section: one of ``SECTIONS``; any other text is the heading of a section of its own, after these.
        caption: what a reader must know to read it.
        heading: above it, within the section; none if empty.
        order: among the figures of its section, the lowest first; equal ones go by name.
        nothing: why there is nothing to show, where models were attacked; if empty, too few defenses.
    """

    section: str
    caption: str
    heading: str = ""
    order: int = 0
    nothing: str = ""


class Planned(NamedTuple):
    """A figure of the report: how it is drawn, of ``tables`` and maybe a ``measure``, and its plan."""

    draw: Callable[..., Figure | None]
    plan: Plan

    @property
    def by_measure(self) -> bool:
        """Whether there is one for each measure."""
        return "measure" in inspect.signature(self.draw).parameters

    def on_paper(self, tables: Tables) -> Figure:
        """Return it as paper has it; if there is nothing to show, it says why."""
        drawn = self.draw(tables, ON_PAPER) if self.by_measure else self.draw(tables)
        said = self.plan.nothing if self.plan.nothing and len(tables.consistency) else nothing_to_show(tables)
        return drawn or words(said)


@functools.cache
def load(name: str) -> Planned:
    """Return the figure of this name."""
    module = registry.imported(registry.FIGURES, name)
    return Planned(module.draw, module.PLAN)


def ordered() -> dict[str, Planned]:
    """Return all figures by name, in the order of the page."""
    found = {name: load(name) for name in registry.names(registry.FIGURES)}

    def place(name: str) -> tuple[int, str, int, str]:
        plan = found[name].plan
        known = SECTIONS.index(plan.section) if plan.section in SECTIONS else len(SECTIONS)
        return known, plan.section, plan.order, name

    return {name: found[name] for name in sorted(found, key=place)}


def on_paper(tables: Tables) -> dict[str, Figure]:
    """Return the figures of a study, by name; one that has nothing to show says why.

    Those that are of one measure are of DER.
    """
    return {name: planned.on_paper(tables) for name, planned in ordered().items()}


def of_measures(tables: Tables) -> dict[str, Figure]:
    """Return the figures of each measure, by names as ``ranking_asr``, but for those with nothing to show."""
    drawn = {
        f"{name}_{measure}": planned.draw(tables, measure)
        for name, planned in ordered().items()
        if planned.by_measure
        for measure in MEASURE_TEXTS
    }
    return {name: figure for name, figure in drawn.items() if figure}
