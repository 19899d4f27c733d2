"""Merges the tables of sites that ran slices of one study.

A row that two sites have must be the same in both, what it took and where it ran aside. Whether an
attack took is decided anew, since a site may lack the clean model that it is measured against.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import pyarrow as pa
import yaml

from detrojan.analysis import derived
from detrojan.analysis.report.views import counted
from detrojan.analysis.statistics import collect
from detrojan.analysis.statistics.gate import Verdict, of_row
from detrojan.analysis.statistics.gate import table as gate_table
from detrojan.cells import CELL_AXES, MODEL_AXES, NO_METHOD, Draws, Model
from detrojan.settings import Gate
from detrojan.storage import records
from detrojan.study import files
from detrojan.study.schema import Filter, Study
from detrojan.workflow import graph

Key = tuple[Any, ...]

CELL_RESULTS = (
    *("status", "acc", "asr", "ra", "num_test", "num_triggered"),
    *("hyperparameters", "code", "chosen"),
)
# Of a model's row, what may differ from site to site: what training took, where, and the verdict.
MODEL_COST = ("seconds", "images_per_second", "peak_memory_bytes", "device", "versions", "git_commit")
MODEL_RESULTS = tuple(
    name
    for name in collect.MODELS.names
    # What a model is beside the clean one isn't known at a site that lacks that one.
    if name not in (*MODEL_AXES, *MODEL_COST, *Verdict._fields, *collect.JUDGED_BY)
)
MOST_SHOWN = 5  # conflicts
GRID_AXES = ("datasets", "architectures", "attacks", "ratios", "seeds", "defenses", "protocols", "spc")


class Site(NamedTuple):
    """What a site has found."""

    folder: Path
    raw: Mapping[str, Any]
    study: Study
    cells: pa.Table
    models: pa.Table


class Conflict(NamedTuple):
    """A row that two sites have, with different results.

    Attributes:
        key: its axes.
        loser: the number of the site whose row is dropped if the other one is preferred.
        text: what differs.
        settled: whether the other site is preferred.
    """

    key: Key
    loser: int
    text: str
    settled: bool


class Joined(NamedTuple):
    """One table made of those of all sites.

    Attributes:
        table: a row a key, in the order of keys.
        sites: the number of the site of each row, by key.
        num_shared: how many keys more than one site has.
        conflicts: of these, those whose rows differ.
    """

    table: pa.Table
    sites: dict[Key, int]
    num_shared: int
    conflicts: list[Conflict]


def read(folder: Path) -> Site:
    """Return what the site in the folder of results has found.

    Raises:
        ValueError: the study or a table is missing, broken or of another version.
    """
    raw = files.kept(folder)
    tables = (
        records.read_table(graph.below(folder, graph.table(name)), schema)
        for name, schema in (("cells", collect.CELLS), ("models", collect.MODELS))
    )
    return Site(folder, raw, files.load_study(raw), *tables)


def join(
    tables: Sequence[pa.Table],
    axes: Sequence[str],
    results: Sequence[str],
    names: Sequence[str],
    preferred: int | None = None,
) -> Joined:
    """Return the rows of all tables, one for each key; the first site's where several have it.

    Args:
        tables: a table a site, all of one schema.
        axes: the columns of the key.
        results: the columns that must agree.
        names: of the sites, for messages.
        preferred: the number of the site whose rows win; without one, nothing settles a conflict.
    """
    order = sorted(range(len(tables)), key=lambda number: number != preferred)
    sites: dict[Key, int] = {}
    rows: dict[Key, Key] = {}
    shared: set[Key] = set()
    kept, conflicts = [], []
    for number in order:
        table, taken = tables[number], []
        for key, row in zip(_tuples(table, axes), _tuples(table, results), strict=True):
            taken.append(key not in sites)
            if key not in sites:
                sites[key], rows[key] = number, row
                continue
            shared.add(key)
            first = sites[key]
            differing = [
                f"{name} {_shown(ours)} in {names[first]}, {_shown(theirs)} in {names[number]}"
                for name, ours, theirs in zip(results, rows[key], row, strict=True)
                if ours != theirs and not (name == "code" and _same_code(axes, key, ours, theirs))
            ]
            if differing:
                text = "; ".join(differing)
                conflicts.append(Conflict(key, number, text, settled=first == preferred))
        kept.append(table.filter(pa.array(taken, pa.bool_())))
    table = pa.concat_tables(kept).sort_by([(axis, "ascending") for axis in axes])
    return Joined(table, sites, len(shared), conflicts)


def _same_code(axes: Sequence[str], key: Key, code: str, other: str) -> bool:
    """Return whether two codes that made a row are recorded to give the same numbers."""
    named = dict(zip(axes, key, strict=True))
    rules = graph.making("models")
    if "defense" in named:
        rules = ["evaluate_untouched" if named["defense"] == NO_METHOD else "defend"]
    keys = [graph.code_key(rule, named) for rule in rules]
    return any(graph.oldest_code(key, code) == graph.oldest_code(key, other) for key in keys)


def judged(models: pa.Table, gate: Gate) -> pa.Table:
    """Return ``models``, of the schema ``MODELS``, with the gate's verdicts on them, decided anew."""
    rows = models.to_pylist()
    by_model = {Model(*(row[axis] for axis in MODEL_AXES)): row for row in rows}
    for model, row in by_model.items():
        clean = by_model.get(model._replace(attack=NO_METHOD, ratio=0.0))
        if clean and row["attack"] != NO_METHOD:
            row["clean_matched"] = row["optimization"] == clean["optimization"]
        row.update(of_row(row, clean and clean["acc"], gate)._asdict())
    return pa.Table.from_pylist(rows, schema=collect.MODELS)


def _tuples(table: pa.Table, names: Sequence[str]) -> Iterator[Key]:
    return zip(*(table[name].to_pylist() for name in names), strict=True)


def _shown(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


# --- the studies -----------------------------------------------------------------------------------


def differences(studies: Sequence[Study]) -> list[str]:
    """Return the keys of study files, but for the grid, in which the sites' studies differ.

    Where the images of a data set lie is no difference.
    """
    dumps = [study.model_dump(mode="json", exclude={"grid", "close", "keep_defended"}) for study in studies]
    for dump in dumps:
        for dataset in dump["datasets"].values():
            dataset.pop("path", None)
    return [key for key in dumps[0] if any(dump[key] != dumps[0][key] for dump in dumps)]


def united(sites: Sequence[Site]) -> dict[str, Any]:
    """Return the study, as parsed, whose grid has all that the sites' grids have; the rest is the first's.

    It may plan more: with two attacks at one site and two ratios at another, all four combinations.
    """
    grids = [site.study.grid for site in sites]
    grid: dict[str, Any] = {
        axis: list(dict.fromkeys(value for one in grids for value in getattr(one, axis)))
        for axis in GRID_AXES
    }
    grid["draws"] = _ranges(draws for one in grids for draws in one.draws)
    if all(one.include for one in grids):
        grid["include"] = _filters(f for one in grids for f in one.include)
    # What one site leaves out, another one may have.
    left_out = [f for f in grids[0].exclude if all(f in one.exclude for one in grids)]
    if left_out:
        grid["exclude"] = _filters(left_out)
    if not all(one.controls for one in grids):
        grid["controls"] = False
    return {**sites[0].raw, "grid": grid}


def _ranges(all_draws: Iterable[Draws]) -> list[str]:
    """Return ranges without overlap that have all these draws: each as it is, as far as it is new."""
    found: list[Draws] = []
    covered: set[int] = set()
    for draws in all_draws:
        new = [number for number in draws.numbers() if number not in covered]
        covered.update(new)
        # What follows without a gap has the same distance to its place.
        for _, together in itertools.groupby(enumerate(new), lambda item: item[1] - item[0]):
            numbers = [number for _, number in together]
            found.append(Draws(numbers[0], numbers[-1]))
    return [str(draws) for draws in sorted(found)]


def _filters(filters: Iterable[Filter]) -> list[dict[str, Any]]:
    dumps = [one.model_dump(mode="json", exclude_defaults=True) for one in filters]
    return [dump for place, dump in enumerate(dumps) if dump not in dumps[:place]]


def _study_text(sites: Sequence[Site]) -> str:
    """Return the study file of what was merged."""
    folders = ", ".join(str(site.folder) for site in sites)
    differing = differences([site.study for site in sites])
    if differing:
        head = f"# Of {sites[0].folder} alone: in {folders} the studies differ in {', '.join(differing)}.\n"
        raw = dict(sites[0].raw)
    else:
        head, raw = f"# Merged from {folders}: their grids as one.\n", united(sites)
    return head + yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


# --- the command -----------------------------------------------------------------------------------


def merge(sites: Sequence[Site], preferred: int | None = None) -> tuple[Joined, Joined]:
    """Return the cells and the models of all sites, each with the verdict on its model's attack.

    The gate is the first site's.

    Args:
        sites: what they have found.
        preferred: the number of the site whose rows win.
    """
    names = [str(site.folder) for site in sites]
    models = join([site.models for site in sites], MODEL_AXES, MODEL_RESULTS, names, preferred)
    models = models._replace(table=judged(models.table, sites[0].study.gate))
    tables = [site.cells.select(collect.GATHERED.names) for site in sites]
    cells = join(tables, CELL_AXES, CELL_RESULTS, names, preferred)
    return cells._replace(table=collect.completed(cells.table, models.table)), models


def write(sites: Sequence[Site], cells: Joined, models: Joined, folder: Path) -> None:
    """Write the tables, those that follow from the cells too, and the study file."""
    records.write_table(cells.table, graph.below(folder, graph.table("cells")), collect.CELLS)
    records.write_table(models.table, graph.below(folder, graph.table("models")), collect.MODELS)
    paths = {name: graph.below(folder, graph.table(name)) for name in derived.TABLES}
    gate = gate_table(models.table.to_pylist(), sites[0].study.gate)
    derived.write({"cells": cells.table, "models": models.table, "gate": gate}, paths)
    records.write_text(_study_text(sites), folder / files.KEPT)


def _refusal(conflicts: Sequence[Conflict]) -> str:
    lines = [f"  {_place(conflict.key)}: {conflict.text}" for conflict in conflicts[:MOST_SHOWN]]
    if len(conflicts) > MOST_SHOWN:
        lines.append(f"  and {len(conflicts) - MOST_SHOWN:,} more")
    head = "1 row differs" if len(conflicts) == 1 else f"{len(conflicts):,} rows differ"
    head += " between sites; --prefer SITE says whose are right:"
    return "\n".join([head, *lines])


def _place(key: Key) -> str:
    """Return a key, of a model or a cell, as paths write it."""
    own = dict(zip(CELL_AXES[len(MODEL_AXES) :], key[len(MODEL_AXES) :], strict=False))
    model = graph.of_model(Model(*key[: len(MODEL_AXES)]))
    if not own:
        return model
    return f"{model}/{own['defense']}/{own['protocol']}/spc-{own['spc']}/draw-{own['draw']}"


def _said(sites: Sequence[Site], cells: Joined, models: Joined, folder: Path) -> Iterator[str]:
    """Yield what was merged, and what a reader of it should know."""
    merged = f"{counted(len(cells.table), 'cell')} of {counted(len(models.table), 'model')}"
    shared = f"{counted(cells.num_shared, 'cell')} and {counted(models.num_shared, 'model')}"
    yield f"{folder}: {merged}, merged from {len(sites)} sites, which share {shared}."
    settled = len(cells.conflicts) + len(models.conflicts)
    if settled:
        yield f"{counted(settled, 'row')} differed; those of the preferred site were taken."
    # Their rows are right in themselves, but the untouched model beside them is not the one they repaired.
    lost = {(conflict.loser, conflict.key) for conflict in models.conflicts}
    strangers = sum((site, key[: len(MODEL_AXES)]) in lost for key, site in cells.sites.items())
    if strangers:
        yield (
            f"{counted(strangers, 'cell')} repaired a model that the preferred site has trained with another "
            "result: compare them with their own site's untouched model."
        )
    differing = differences([site.study for site in sites])
    if differing:
        yield f"The studies differ in {', '.join(differing)} too; study.yaml is that of {sites[0].folder}."
    yield f"To see it: detrojan show --results {folder}"


def _check(folders: Sequence[Path], into: Path, prefer: Path | None) -> int | None:
    """Return the number of the preferred site, None without one; refuse what can't be meant."""
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < max(2, len(resolved)):
        raise ValueError("name two or more sites, each once")
    if into.resolve() in resolved or (into / "metrics").exists():
        raise ValueError(f"--into {into}: these are a site's own results; choose another folder")
    if prefer is None:
        return None
    if prefer.resolve() not in resolved:
        raise ValueError(f"--prefer {prefer}: none of the sites; there is {', '.join(map(str, folders))}")
    return resolved.index(prefer.resolve())


def main(folders: Sequence[Path], into: Path, prefer: Path | None) -> None:
    """Merge the sites of these folders into another one, and say what was merged.

    Args:
        folders: of results.
        into: where to write tables and study file.
        prefer: the one whose rows win.

    Raises:
        ValueError: a site is broken, or two differ in a row and none is preferred.
    """
    preferred = _check(folders, into, prefer)
    sites = [read(folder) for folder in folders]
    cells, models = merge(sites, preferred)
    open_conflicts = [c for c in (*models.conflicts, *cells.conflicts) if not c.settled]
    if open_conflicts:
        raise ValueError(_refusal(open_conflicts))
    write(sites, cells, models, into)
    click.echo("\n".join(_said(sites, cells, models, into)))
