"""Runs a study in rounds, so that its answer firms up early, and says after each what is still undecided.

The rounds are nested: the first seed with the first range of draws, then the first two of both, and so on.
Each is a whole smaller study, of all defenses: none is ever dropped for what an earlier round has shown.
"""

import itertools
import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import pyarrow as pa
import pyarrow.compute as pc

from detrojan.analysis import protocols
from detrojan.analysis.statistics import undecided
from detrojan.analysis.statistics.collect import CELLS
from detrojan.analysis.statistics.undecided import Pair
from detrojan.analysis.tables.comparisons import TIES
from detrojan.cells import CELL_AXES, NO_METHOD
from detrojan.commands import plan
from detrojan.storage import records
from detrojan.study import grid
from detrojan.study.files import load_study, read
from detrojan.study.schema import Study
from detrojan.workflow import graph
from detrojan.workflow.job_costs import Costs

WIDTH = plan.WIDTH
MOST_SHOWN = 12  # pairs


class Round(NamedTuple):
    """A part of a study that is a study itself, and how many of its cells have a row."""

    study: Study
    cells: set[tuple[Any, ...]]
    hours: float
    done: int

    @property
    def is_done(self) -> bool:
        """Whether all of it has been measured."""
        return self.done == len(self.cells)

    @property
    def axes(self) -> dict[str, str]:
        """Its seeds and its draws, as a study file has them."""
        own = self.study.grid
        return {"seeds": ", ".join(map(str, own.seeds)), "draws": ", ".join(map(str, own.draws))}

    @property
    def command(self) -> str:
        """The arguments of Snakemake that run it."""
        return f"--config 'grid={{seeds: [{self.axes['seeds']}], draws: [{self.axes['draws']}]}}'"


def nested(study: Study) -> list[Study]:
    """Return the rounds of a study: the last is all of it."""
    own = study.grid
    number = max(len(own.seeds), len(own.draws))
    parts = [{"seeds": own.seeds[:n], "draws": own.draws[:n]} for n in range(1, number + 1)]
    return [study.model_copy(update={"grid": own.model_copy(update=part)}) for part in parts]


def keys(study: Study) -> set[tuple[Any, ...]]:
    """Return the keys of all cells of a study, those that a defense has made."""
    return {
        tuple((shard.axes | {"draw": draw})[axis] for axis in CELL_AXES)
        for shard in grid.shards(study)
        if shard.defense != NO_METHOD
        for draw in shard.draws.numbers()
    }


def rounds(study: Study, costs: Costs, cells: pa.Table) -> list[Round]:
    """Return the rounds of a study, with what each should cost from nothing, GPU-hours, and what is done."""
    measured = set(zip(*(cells[axis].to_pylist() for axis in CELL_AXES), strict=True))
    found = []
    for part in nested(study):
        planned = keys(part)
        hours = plan.make(part, costs).total.expected / 3600
        found.append(Round(part, planned, hours, len(planned & measured)))
    return found


def of_round(cells: pa.Table, part: Round) -> pa.Table:
    """Return the rows of a round, with those of its untouched models."""
    of_seeds = pc.is_in(cells["seed"], pa.array(part.study.grid.seeds, cells["seed"].type))
    draws = sorted({key[-1] for key in part.cells})
    of_draws = pc.is_in(cells["draw"], pa.array(draws, cells["draw"].type))
    untouched = pc.equal(cells["defense"], NO_METHOD)
    return cells.filter(pc.and_(of_seeds, pc.or_(of_draws, untouched)))


def report(found: Sequence[Round], cells: pa.Table, measure: str, *, every: bool) -> list[str]:
    """Return the lines that say how far the rounds are, what is undecided and how to go on."""
    lines = [f"{'round':>5}  {'seeds':<14} {'draws':<18} {'cells':>9} {'GPU-hours':>10} {'done':>6}"]
    for number, part in enumerate(found, 1):
        seeds, draws = part.axes.values()
        share = "all" if part.is_done else f"{100 * part.done // max(len(part.cells), 1)} %"
        lines.append(
            f"{number:>5}  {seeds:<14} {draws:<18} {len(part.cells):>9,} {part.hours:>10,.1f} {share:>6}"
        )
    lines += [
        "",
        "Hours are those expected of the whole round from nothing, as detrojan plan tells them.",
        "",
    ]
    done = len(list(itertools.takewhile(lambda part: part.is_done, found)))
    if done:
        lines += _decided(found, done, cells, measure, every=every)
    else:
        lines.append("No round is finished, so there is nothing to judge by.")
    if done < len(found):
        spent = found[done - 1].hours if done else 0.0
        lines += [
            "",
            f"Round {done + 1} costs {found[done].hours - spent:,.1f} GPU-hours more, as expected:",
            f"  snakemake --profile slurm {found[done].command}",
        ]
    return lines


def _decided(found: Sequence[Round], done: int, cells: pa.Table, measure: str, *, every: bool) -> list[str]:
    part, looks = found[done - 1], len(found)
    own, lines = of_round(cells, part), []
    for protocol in protocols.of(own):
        pairs = undecided.pairs(protocols.only(own, protocol), measure, TIES[measure], looks)
        counts = Counter(pair.state for pair in pairs)
        text = (
            f"After round {done} of {looks}, protocol {protocol}, by {measure.upper()} over all budgets: of "
            f"{len(pairs)} pairs of defenses {counts['apart']} are told apart, {counts['tied']} are ties, "
            f"{counts['undecided']} are undecided."
        )
        lines += textwrap.wrap(text, WIDTH)
        open_pairs = sorted(
            (pair for pair in pairs if pair.state == "undecided"), key=lambda pair: -abs(pair.difference)
        )
        shown = open_pairs if every else open_pairs[:MOST_SHOWN]
        lines += [f"  {_text(pair)}" for pair in shown]
        if len(shown) < len(open_pairs):
            lines.append(f"  and {len(open_pairs) - len(shown)} more: --all names them")
    text = (
        f"With {looks} looks planned, each is judged at {undecided.ALPHA / looks:.2g}, so that all of them "
        "together make a false claim in 5 % of studies at most. Told apart or tied is said of these data "
        "sets, architectures and attacks, with other seeds and draws."
    )
    return [*lines, "", *textwrap.wrap(text, WIDTH)]


def _text(pair: Pair) -> str:
    names = f"{pair.defense} – {pair.other}"
    if math.isnan(pair.low):
        return f"{names:<44} {100 * pair.difference:+6.1f} points, nothing to judge the chance by"
    between = f"[{100 * pair.low:+.1f}, {100 * pair.high:+.1f}]"
    return f"{names:<44} {100 * pair.difference:+6.1f} points {between}"


def main(configfiles: Sequence[Path], results: Path, table: Path, measure: str, *, every: bool) -> None:
    """Print the rounds of a study and what they have decided.

    Raises:
        ValueError: the study file or a table has mistakes.
    """
    study = load_study(read(configfiles or [plan.DEFAULT_STUDY]))
    path = graph.below(results, graph.table("cells"))
    cells = records.read_table(path, CELLS) if path.exists() else CELLS.empty_table()
    click.echo("\n".join(report(rounds(study, Costs.load(table), cells), cells, measure, every=every)))
