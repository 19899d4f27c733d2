"""Recomputes one number from scratch: ``detrojan reproduce KEY=VALUE ...``.

The cell's data set, poisoning, training, defense and evaluation run again in a folder of their own, by
the same workflow, and the new row is held against the study's. Free of torch.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import yaml

from detrojan import registry
from detrojan.cells import NO_METHOD, NO_SAMPLES, SURVEY, Shard, axes_text
from detrojan.commands import why
from detrojan.storage.columns import OK
from detrojan.study import files
from detrojan.workflow import graph
from detrojan.workflow.graph import Job
from detrojan.workflow.site import Axes, Site, axes_of, find_cell, parse_axes, read_rows

Row = Mapping[str, Any]

HEAD = "# One cell of a study, written by `detrojan reproduce`.\n"
MEASURES = ("acc", "asr", "ra")
# Other hardware and other versions round otherwise, and training amplifies that: nothing is promised
# there. A number that comes this near all the same counts as reproduced.
ELSEWHERE = 0.02
# Options of Snakemake that say how much may run at once, or that bring a profile which does.
SAYS_HOW_MANY = r"-[cj]|--(cores|jobs|profile|workflow-profile)\b"
# Rules whose files are the same for all draws, and hold nothing but what was computed.
COMPARED = [
    name
    for name in graph.making("triggers", "poisoned", "models", "triggered", "stamped")
    if "draws" not in graph.RULES[name].axes
]


# --- recomputing -----------------------------------------------------------------------------------


def find_row(site: Site, given: Axes) -> tuple[Shard, Row]:
    """Return the cell that has the values ``given``, as a shard of one draw, and its row.

    Raises:
        ValueError: there is not one such cell, or nothing was measured for it.
    """
    cell = find_cell(site, given)
    named = axes_text(axes_of(cell))
    rows = site.rows("cells", axes_of(cell))
    if not rows:
        raise ValueError(f"{named} has no row in {site.table('cells')} yet: run the workflow, then try again")
    if not rows[0]["code"]:
        raise ValueError(
            f"{named} is {rows[0]['status']}: it was given up when the study was closed, so there is no "
            "number to recompute"
        )
    return cell, rows[0]


def study_of(cell: Shard, site: Site) -> dict[str, Any]:
    """Return the study file of ``cell`` alone: the settings of the study that is kept with the results.

    Paths of data sets that start at the working directory of the results are made absolute.

    Raises:
        ValueError: no study was kept, or it lacks the data set.
    """
    if not (site.results / files.KEPT).exists():
        raise ValueError(f"{site.results / files.KEPT} is missing: the study's settings are needed")
    raw, model = files.kept(site.results), cell.model
    if model.dataset not in raw["datasets"]:
        raise ValueError(f"{site.results / files.KEPT}: no data set {model.dataset}, which the row is of")
    grid = {
        "datasets": [model.dataset],
        "architectures": [model.architecture],
        "attacks": [model.attack],
        # A clean model has no ratio and a method without data no SPC; then these are not looked at.
        "ratios": [model.ratio] if model.ratio else raw["grid"]["ratios"],
        "seeds": [model.seed],
        "defenses": [cell.defense],
        "protocols": [SURVEY if cell.defense == NO_METHOD else cell.protocol],
        "spc": raw["grid"]["spc"] if cell.spc == NO_SAMPLES else [cell.spc],
        "draws": raw["grid"]["draws"] if cell.spc == NO_SAMPLES else [str(cell.draws)],
        "controls": False,  # one row needs no baselines beside it
    }
    # All data sets, for overrides may name them; only those of the grid are read.
    working = site.results.resolve().parent
    datasets = {name: with_absolute_paths(dataset, working) for name, dataset in raw["datasets"].items()}
    architectures = {
        name: with_absolute_files(settings, working)
        for name, settings in raw.get("architectures", {}).items()
    }
    own = {"architectures": architectures, "datasets": datasets, "grid": grid}
    return raw | own | {"keep_defended": True, "close": 0}


def with_absolute_files(settings: Mapping[str, Any], working: Path) -> dict[str, Any]:
    """Return an architecture of a study file, with files that start at ``working`` made absolute."""
    ends = {registry.NETWORK: ".py", "pretrained": ".safetensors"}
    found = {name: str(settings.get(name, "")) for name in ends}
    whole = {name: str(working / path) for name, path in found.items() if path.endswith(ends[name])}
    return {**settings, **whole}


def with_absolute_paths(dataset: Mapping[str, Any], working: Path) -> dict[str, Any]:
    """Return a data set of a study file, with paths that start at the folder ``working`` made absolute."""
    fields = registry.declared("datasets", dataset["source"]).settings.model_fields
    places = {name for name, field in fields.items() if field.annotation is Path} & set(dataset)
    whole = {name: os.path.expandvars(Path(dataset[name]).expanduser()) for name in places}
    return {**dataset, **{name: str(working / path) for name, path in whole.items()}}


def write_study(study: Mapping[str, Any], into: Path, site: Site) -> Path:
    """Write a study file into a folder of its own; return its path.

    Raises:
        ValueError: the folder is that of the study itself, or holds a study file of someone else.
    """
    path = into / files.KEPT
    if (into / graph.RESULTS).resolve() == site.results.resolve():
        raise ValueError(f"--into {into}: the study itself lies there; name another folder")
    if path.exists() and not path.read_text(encoding="utf-8").startswith(HEAD):
        raise ValueError(f"--into {into}: it holds another study file, {path}; name another folder")
    into.mkdir(parents=True, exist_ok=True)
    path.write_text(HEAD + yaml.safe_dump(dict(study), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def command(cell: Shard, into: Path, arguments: Sequence[str]) -> list[str]:
    """Return the command that makes the metrics of ``cell`` in the folder ``into``."""
    return making(graph.metrics(cell), into, arguments)


def making(
    target: str, into: Path, arguments: Sequence[str], checkout: Path = registry.CHECKOUT
) -> list[str]:
    """Return the command that makes ``target`` of the study that is kept in the folder ``into``.

    Args:
        target: a file or a rule.
        into: where results and logs go.
        arguments: options for Snakemake.
        checkout: whose workflow it is.
    """
    said = any(re.match(SAYS_HOW_MANY, argument) for argument in arguments)
    how_many = [] if said else ["--cores", str(os.cpu_count() or 1)]
    folder = into.resolve()
    return [
        *(sys.executable, "-m", "snakemake", target),
        *("--snakefile", str(checkout / "Snakefile"), "--directory", str(folder)),
        *("--configfile", str(folder / files.KEPT), "--rerun-incomplete"),
        *how_many,
        *arguments,
    ]


def run(line: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Run a command in the terminal, in this process's environment or another; return its exit code."""
    with subprocess.Popen(line, env=environment) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            return process.wait()  # it was told to stop too, and stops its jobs first


def changes(lookup: why.Lookup, steps: Sequence[Job], row: Row) -> list[str]:
    """Return what has changed since the study's row was made: code, and settings of the study file."""
    found = []
    for rule, made in why.code(lookup, steps, row).items():
        if not made["same"]:
            found.append(
                f"rule {rule} has other code: {made['digest']} made the number, today's is {made['today']}. "
                + _old_code(made["git_commit"])
            )
    for place, kept in why.settings(lookup, steps, row).items():
        if kept["study_now"]:
            before = {name: kept["values"].get(name) for name in kept["study_now"]}
            found.append(
                f"{place} {kept['name']} has other settings: {json.dumps(before)} made the number, the study "
                f"file now says {json.dumps(kept['study_now'])}."
            )
    return found


def _old_code(commit: str) -> str:
    if commit.startswith("detrojan "):  # a version, where there was no checkout
        return f"Which commit that was is not known; it was {commit}."
    edited = commit.endswith("-dirty")
    note = ", and mind that its files had been edited" if edited else ""
    return f"To run the old code, check out commit {commit.removesuffix('-dirty')}{note}."


# --- comparing -------------------------------------------------------------------------------------


class Agreement(NamedTuple):
    """On how many test images, clean or triggered, two computations give the same class."""

    triggered: bool
    agreeing: int
    total: int


class Verdict(NamedTuple):
    """Whether a row reproduces another, or comes near enough, and what to say of it."""

    reproduced: bool
    said: str


def compare_predictions(before: Path, after: Path, draw: int) -> list[Agreement]:
    """Return how far two tables of predictions agree on a draw; nothing where one of them is missing.

    An image that only one of them has counts as a difference.
    """
    if not (before.exists() and after.exists()):
        return []
    found = []
    for triggered in (False, True):
        first, second = (_classes(path, draw, triggered=triggered) for path in (before, after))
        agreeing = sum(second.get(index) == predicted for index, predicted in first.items())
        found.append(Agreement(triggered, agreeing, len(first.keys() | second.keys())))
    return [agreement for agreement in found if agreement.total]


def _classes(path: Path, draw: int, *, triggered: bool) -> dict[int, int]:
    rows = read_rows(path, {"draw": draw, "triggered": triggered}, ("index", "predicted"))
    return {row["index"]: row["predicted"] for row in rows}


def same_kind(before: Row, after: Row) -> bool:
    """Return whether two rows come from one kind of device and from the same versions."""
    return all(before[name] == after[name] for name in ("device", "versions"))


def judge(before: Row, after: Row, predictions: Sequence[Agreement], tolerance: float) -> Verdict:
    """Return whether the row ``after`` reproduces the row ``before``.

    Args:
        before: of the study.
        after: recomputed.
        predictions: how far they agree on the test images; empty if not known.
        tolerance: largest difference of ACC, ASR and RA; with 0, all must be equal.
    """
    if before["status"] != after["status"]:
        return Verdict(False, f"NOT reproduced: the status was {before['status']}, and is {after['status']}")
    if before["status"] != OK:
        return Verdict(True, f"equal: {after['status']} again, and no measures on either side")
    pairs = [(name, before[name], after[name]) for name in MEASURES]
    undefined = [name for name, a, b in pairs if (a is None) != (b is None)]
    if undefined:
        return Verdict(False, f"NOT reproduced: {', '.join(undefined)} is defined on one side only")
    largest = max(abs(a - b) for _, a, b in pairs if a is not None)
    same_rest = before["chosen"] == after["chosen"] and all(p.agreeing == p.total for p in predictions)
    if largest == 0 and same_rest:
        return Verdict(True, "equal: the same bits")
    if largest <= tolerance and tolerance > 0:
        return Verdict(
            True, f"within tolerance: the measures differ by at most {largest:.2g} ({tolerance:g} allowed)"
        )
    if largest == 0:
        return Verdict(False, "NOT reproduced: the measures are equal, but not what they were computed from")
    return Verdict(False, f"NOT reproduced: a measure differs by {largest:.2g} ({tolerance:g} allowed)")


def first_difference(site: Site, again: Site, steps: Sequence[Job]) -> str | None:
    """Return the first thing on the way to a cell that is not the study's; None if all that is kept is."""
    dataset = steps[-1].axes["dataset"]
    if _differ(why.source_digest(site, dataset), why.source_digest(again, dataset)):
        return f"the images of data set {dataset}, as read from their source"
    for step in steps:
        for file in step.files if step.rule in COMPARED else ():
            if _differ(*(why.file_digest(s.at(file)) for s in (site, again))):
                return file
    return None


def _differ(before: str | None, after: str | None) -> bool:
    return before is not None and after is not None and before != after


def side_by_side(before: Row, after: Row, predictions: Sequence[Agreement]) -> Iterator[str]:
    """Yield two rows as lines of text."""
    yield f"  {'':12}{'study':24}{'again':24}difference"
    for name in MEASURES:
        a, b = before[name], after[name]
        difference = "" if a is None or b is None else f"{b - a:+.2g}" if a != b else "0"
        yield f"  {name:12}{_shown(a):24}{_shown(b):24}{difference}".rstrip()
    for name in ("status", "device", "seconds"):
        yield f"  {name:12}{_shown(before[name]):24}{_shown(after[name])}"
    yield f"  {'chosen':12}{'the same' if before['chosen'] == after['chosen'] else 'differs'}"
    for agreement in predictions:
        what = "triggered" if agreement.triggered else "clean"
        yield f"  {'predicted':12}{agreement.agreeing} of {agreement.total} {what} images: the same class"
    if not predictions and before["status"] == OK:
        yield f"  {'predicted':12}not compared: the study's predictions are not there"


def _shown(value: Any) -> str:
    return "–" if value is None else str(value)


def compare(
    site: Site, again: Site, cell: Shard, before: Row, tolerance: float | None
) -> tuple[list[str], Verdict]:
    """Return lines that hold the recomputed row against the study's, and the verdict.

    Args:
        site: of the study.
        again: of the recomputed cell.
        cell: which one.
        before: its row in the study.
        tolerance: see :func:`judge`; None for 0, or ``ELSEWHERE`` if device or versions differ.

    Raises:
        ValueError: the recomputed row is missing or broken.
    """
    made = again.at(graph.metrics(cell))
    (after,) = read_rows(made, {})
    shard = site.shard_of(cell)
    kept, computed = site.predictions(shard), again.predictions(cell)
    predictions = compare_predictions(kept, computed, cell.draws.first)
    same = same_kind(before, after)
    if tolerance is None:
        tolerance = 0.0 if same else ELSEWHERE
    verdict = judge(before, after, predictions, tolerance)
    notes = []
    if not same:
        notes.append("The device or the versions are others, and round otherwise: no bits are promised.")
    if not verdict.said.startswith("equal"):
        first = first_difference(site, again, list(graph.steps(graph.shard_job(shard))))
        notes.append(f"The first that differs on the way there: {first or 'nothing before the defense'}.")
    if not verdict.reproduced and same and before["device"] == "cpu":
        notes.append(
            "A row says neither which CPU made it nor with how many threads: if these were others, no bits "
            "are promised. --tolerance sets what counts as reproduced."
        )
    return [*side_by_side(before, after, predictions), *map(why.wrapped, notes)], verdict


# --- the command -----------------------------------------------------------------------------------


def reproduce(site: Site, given: Axes, into: Path, tolerance: float | None, extra: Sequence[str]) -> bool:
    """Recompute a cell, say what comes of it, and return whether the study's row was reproduced.

    Raises:
        ValueError: the cell can't be recomputed.
    """
    cell, before = find_row(site, given)
    write_study(study_of(cell, site), into, site)
    line = command(cell, into, extra)
    _say(why.wrapped(f"cell: {axes_text(axes_of(cell))}"))
    for change in changes(why.Lookup(site), list(graph.steps(graph.shard_job(site.shard_of(cell)))), before):
        _say(why.wrapped(f"Note: {change}"))
    _say(f"Recomputing it in {into}:\n  {shlex.join(line)}")
    exit_code = run(line)
    again = Site(into / graph.RESULTS)
    if exit_code or not again.at(graph.metrics(cell)).exists():
        raise ValueError(
            f"no new row: Snakemake ended with exit code {exit_code}; the logs are in {into / graph.LOGS}"
        )
    lines, verdict = compare(site, again, cell, before, tolerance)
    _say("\n".join([*lines, verdict.said]))
    return verdict.reproduced


def _say(line: str) -> None:
    click.echo(line)


def main(
    texts: Sequence[str], results: Path, into: Path, tolerance: float | None, extra: Sequence[str]
) -> bool:
    """Recompute the cell that the texts name; return whether the study's row was reproduced.

    Args:
        texts: ``KEY=VALUE``, as many as name one cell.
        results: the study's folder of results.
        into: the folder to recompute it in.
        tolerance: see :func:`compare`.
        extra: options for Snakemake.

    Raises:
        ValueError: they name no cell, or it can't be recomputed.
    """
    return reproduce(Site(results), parse_axes(texts), into, tolerance, extra)
