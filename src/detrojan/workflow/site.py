"""Which cell or model ``KEY=VALUE`` texts name, among those of a study's plan and of its tables.

For commands that look at results; free of torch.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from detrojan.cells import CELL_AXES, MODEL_AXES, SURVEY, Draws, Model, Shard, axes_text, value_text
from detrojan.storage import records
from detrojan.storage.columns import cell_key
from detrojan.study import conditions, files, grid
from detrojan.study.schema import Axis, Study
from detrojan.workflow import graph, sources

Axes = Mapping[str, Axis]

MOST_LISTED = 12  # values of an axis in a message


def parse_axes(texts: Iterable[str]) -> dict[str, Axis]:
    """Return the axes that ``KEY=VALUE`` texts give, one value each, numbers as numbers.

    Raises:
        ValueError: a text is no condition, or allows several values, or its key is given twice.
    """
    given: dict[str, Axis] = {}
    for condition in conditions.parse(texts):
        if condition.axis in given:
            raise ValueError(f"{str(condition)!r}: {condition.axis} is given twice")
        given[condition.axis] = condition.only()
    return given


def one_draw(shard: Shard, draw: int) -> Shard:
    """Return a cell, which is a shard of one draw."""
    return shard._replace(draws=Draws(draw, draw))


def axes_of(cell: Shard) -> dict[str, Axis]:
    """Return the axes of a cell."""
    return cell_key(cell, cell.draws.first)


class Site:
    """A folder of results with what lies in it and beside it: study, tables, logs."""

    def __init__(self, results: Path) -> None:
        # "." has no parent that its text could show.
        self.results = results if results.name not in ("", "..") else results.resolve()

    def at(self, path: str) -> Path:
        """Return where a path of the workflow, ``results/...`` or ``logs/...``, lies."""
        return graph.below(self.results, path)

    @functools.cached_property
    def study(self) -> Study | None:
        """The study that was run last; None if it was not kept, as where only tables were copied.

        Raises:
            ValueError: it has mistakes, by today's code.
        """
        if not (self.results / files.KEPT).exists():
            return None
        try:
            study = files.load_study(files.kept(self.results))
            study.know_classes(sources.classes_read(study, self.results))
        except files.StudyError as error:
            where = self.results / files.KEPT
            raise ValueError(f"{where}, by today's code: {'; '.join(error.mistakes)}") from None
        return study

    def table(self, name: str) -> Path:
        """Return the path of one of the study's tables."""
        return self.at(graph.table(name))

    def predictions(self, shard: Shard) -> Path:
        """Return the path of the predictions of ``shard``."""
        return self.at(graph.shard_job(shard).file("predictions"))

    def test_images(self, dataset: str) -> Path:
        """Return the path of the test images of a data set."""
        return self.at(graph.job("dataset", {"dataset": dataset}).file("test"))

    def triggered_images(self, model: Model) -> Path | None:
        """Return the path of the triggered test images of ``model``; None for a clean one."""
        made = graph.job_of("triggered.triggered", model._asdict())
        return made and self.at(made.file("triggered"))

    def rows(self, name: str, given: Axes, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Return the rows of a table that have the values ``given``; none if it is not there."""
        path = self.table(name)
        return read_rows(path, given, columns) if path.exists() else []

    def planned_shards(self, given: Axes) -> Iterator[Shard]:
        """Yield the shards of the study that hold cells with the values ``given``."""
        draw = given.get("draw")
        for shard in grid.shards(self.study) if self.study else ():
            if _has(shard.axes, given) and (draw is None or draw in shard.draws.numbers()):
                yield shard

    def planned(self, given: Axes) -> Iterator[Shard]:
        """Yield the cells of the study that have the values ``given``, each as a shard of one draw."""
        for shard in self.planned_shards(given):
            wanted = [int(given["draw"])] if "draw" in given else shard.draws.numbers()
            yield from (one_draw(shard, draw) for draw in wanted)

    def planned_models(self, given: Axes) -> list[Model]:
        """Return the models of the study that have the values ``given``."""
        return (
            [model for model in grid.models(self.study) if _has(model._asdict(), given)] if self.study else []
        )

    def shard_of(self, cell: Shard) -> Shard:
        """Return the shard that ``cell`` was made in, or is planned in; ``cell`` itself if there is none."""
        planned: Iterable[Shard] = grid.shards(self.study) if self.study else ()
        same = [s for s in planned if s._replace(draws=cell.draws) == cell]
        found = [s for s in [*same, *self._on_disk(cell)] if cell.draws.first in s.draws.numbers()]
        made = [shard for shard in found if self.at(graph.metrics(shard)).exists()]
        return next(iter([*made, *found]), cell)

    def _on_disk(self, cell: Shard) -> list[Shard]:
        """Return the shards of the cell's model, defense and SPC that have a folder of metrics."""
        siblings = self.at(graph.metrics(cell)).parents[1]
        names = sorted(folder.name for folder in siblings.glob("draws-*"))
        return [cell._replace(draws=Draws.parse(name.removeprefix("draws-"))) for name in names]


def read_rows(path: Path, given: Axes, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return the rows of a Parquet table that have the values ``given``, with all columns or some.

    Raises:
        ValueError: it is missing or broken.
    """
    wanted = None if columns is None else [*dict.fromkeys([*columns, *given])]
    with records.readable(path, "Parquet table"):
        table = records.open_table(path).read(wanted)
        for axis, value in given.items():
            table = table.filter(pc.field(axis) == value)
        table = table if columns is None else table.select(list(columns))
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def find_cell(site: Site, given: Axes) -> Shard:
    """Return the one cell that has the values ``given``, as a shard of one draw.

    Raises:
        ValueError: there is none or there are several; the message says on which axes they differ.
    """
    found = {_cell(row) for row in site.rows("cells", given, CELL_AXES)} | set(site.planned(given))
    whole = {"protocol": SURVEY, **given}
    if not found and set(whole) == set(CELL_AXES):
        # Of an earlier study in the same folder: neither planned nor in the tables any more.
        asked = _cell(whole)
        found = {asked} if site.at(graph.metrics(site.shard_of(asked))).exists() else set()

    def everything() -> list[Axes]:
        return [*site.rows("cells", {}, CELL_AXES), *map(axes_of, site.planned({}))]

    return _cell(_the_one("cell", [axes_of(c) for c in found], given, everything))


def find_model(site: Site, given: Axes) -> Model:
    """Return the one model that has the values ``given``; it raises as :func:`find_cell` does."""
    rows = site.rows("models", given, MODEL_AXES)
    found = {Model(**row) for row in rows} | set(site.planned_models(given))

    def everything() -> list[Axes]:
        planned = [model._asdict() for model in site.planned_models({})]
        return [*site.rows("models", {}, MODEL_AXES), *planned]

    return Model(**_the_one("model", [m._asdict() for m in found], given, everything))


def _cell(axes: Mapping[str, Any]) -> Shard:
    named = Model(*(axes[axis] for axis in MODEL_AXES))
    draws = Draws(axes["draw"], axes["draw"])
    return Shard(named, axes["defense"], axes["spc"], draws, axes["protocol"])


def _has(axes: Axes, given: Axes) -> bool:
    """Return whether ``axes`` have the values ``given``, as far as they have the axes."""
    return all(axes[axis] == value for axis, value in given.items() if axis in axes)


def _the_one(
    what: str, found: Sequence[Axes], given: Axes, everything: Callable[[], Sequence[Axes]]
) -> dict[str, Any]:
    if not found:
        raise ValueError(no_match(what, given, everything()))
    if len(found) > 1:
        differ = {axis: {axes[axis] for axes in found} for axis in found[0]}
        listed = "; ".join(f"{axis}: {_listed(values)}" for axis, values in differ.items() if len(values) > 1)
        raise ValueError(f"{len(found)} {what}s match; name one more of what they differ in: {listed}")
    return dict(found[0])


def no_match(what: str, given: Axes, all_axes: Sequence[Axes]) -> str:
    """Return why there is no cell or model (``what``) that has the values ``given``, among ``all_axes``."""
    if not all_axes:
        return "the results have neither a study file nor tables: run the workflow first"
    for axis, value in given.items():
        values = {axes[axis] for axes in all_axes}
        if value not in values:
            there = f"there are {_listed(values)}"
            return f"no {what} has {axes_text({axis: value})}, in the study or its tables; {there}"
    hint = "a clean model has ratio=0; the untouched model and data-free defenses have spc=0 draw=0"
    return f"no {what} has all of {axes_text(given)}, in the study or its tables ({hint})"


def _listed(values: Iterable[Axis]) -> str:
    ordered = [value_text(value) for value in sorted(values, key=lambda value: (str(type(value)), value))]
    more = len(ordered) - MOST_LISTED
    return ", ".join(ordered[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
