"""Shows what jobs cost, and learns it from finished studies.

:mod:`detrojan.workflow.job_costs` says what a row of the table stands for.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detrojan import registry
from detrojan.cells import NO_METHOD
from detrojan.settings import Optimization
from detrojan.study import conditions
from detrojan.workflow import graph
from detrojan.workflow.job_costs import (
    UNITS,
    Costs,
    Estimate,
    Key,
    Row,
    method_axis,
    number_text,
    of_draw,
)

# The axes whose values are methods.
KINDS: dict[str, registry.Kind] = {"defense": "defenses", "attack": "attacks", "architecture": "models"}
MEASURED = ("seconds", "peak_memory_bytes", "device")  # columns of finished runs
ALL_DRAWS = conditions.Condition("draw", "0-9", [range(10)])  # of a cell that names none
QUANTILE = 0.9  # of the measured seconds: one draw in ten may take longer, and SAFETY covers it


# --- what runs took --------------------------------------------------------------------------------


class Run(NamedTuple):
    """What one draw of a defense, or one epoch of a training, has taken."""

    key: Key
    seconds: float
    peak_memory_mb: float
    device: str


def runs(results: Path) -> Iterator[Run]:
    """Yield what is known of finished draws and trainings in a folder of results.

    The tables tell; before there are any, the metrics and cards that they are made from.

    Raises:
        ValueError: there are none of either, or a file is broken.
    """
    rows = list(_cells(results))
    for row in rows:
        if row["defense"] != NO_METHOD and row["status"] == "ok":
            yield _run(of_draw(row), row, 1)
    models = list(_models(results))
    for row in models:
        key = Key("train", row["attack"], row["architecture"], row["dataset"])
        yield _run(key, row, row["epochs"])
    if not (rows or models):
        raise ValueError(f"{results}: no tables, metrics or models of a study: name its folder of results")


def _run(key: Key, row: Mapping[str, Any], units: int) -> Run:
    return Run(key, row["seconds"] / units, row["peak_memory_bytes"] / 1e6, row["device"])


def _cells(results: Path) -> Iterator[dict[str, Any]]:
    columns = ["dataset", "architecture", "defense", "protocol", "spc", "status", *MEASURED]
    table = graph.below(results, graph.table("cells"))
    for file in [table] if table.exists() else graph.find(results, "metrics.metrics"):
        yield from _read(file, columns)


def _models(results: Path) -> Iterator[dict[str, Any]]:
    columns = ["dataset", "architecture", "attack", "epochs", *MEASURED]
    table = graph.below(results, graph.table("models"))
    if table.exists():
        yield from _read(table, columns)
        return
    from detrojan.storage import records

    for file in graph.find(results, "models.card"):
        try:
            card = records.read_card(file)
            yield {name: card[name] for name in columns}
        except KeyError as error:
            raise ValueError(f"{file}: not the card of a model (it lacks {error})") from None


def _read(file: Path, columns: list[str]) -> list[dict[str, Any]]:
    from detrojan.storage import records

    with records.readable(file, "table"):
        rows: list[dict[str, Any]] = records.open_table(file).read(columns).to_pylist()
    if any(set(row) != set(columns) for row in rows):
        raise ValueError(f"{file}: it lacks one of the columns {', '.join(columns)}")
    return rows


def learned(costs: Costs, found: Iterable[Run]) -> Costs:
    """Return ``costs`` with rows for what was measured, and for data sets that were not.

    Seconds are the 90th percentile. Memory is the largest on a CPU; a GPU's runs tell the GPU's memory,
    so there the host's stays what it was. Where no data set is named, a row has the largest of what was
    measured on any, in earlier studies too.

    Raises:
        ValueError: there are runs of CPUs and of GPUs.
    """
    by_key: dict[Key, list[Run]] = {}
    for run in found:
        by_key.setdefault(run.key, []).append(run)
    devices = sorted({run.device for of_key in by_key.values() for run in of_key})
    if "cpu" in devices and len(devices) > 1:
        raise ValueError(f"runs on {', '.join(devices)}: choose a device, such as --device {devices[1]!r}")
    return _with(costs, [_measured(costs, key, of_key) for key, of_key in by_key.items()])


def _with(costs: Costs, measured: Sequence[Row]) -> Costs:
    """Return ``costs`` with rows that were measured, and what follows for data sets that were not."""
    rows = costs.rows | {row.key: row for row in measured}
    for key in {row.key._replace(dataset="") for row in measured}:
        same = [row for row in rows.values() if row.measured and row.key.dataset]
        rows[key] = _largest(key, [row for row in same if row.key._replace(dataset="") == key])
    return Costs(rows.values(), costs.path)


def _measured(costs: Costs, key: Key, of_key: list[Run]) -> Row:
    before = costs.row(key.rule, _axes(key)).estimate
    seconds = sorted(run.seconds for run in of_key)
    on_cpu = all(run.device == "cpu" for run in of_key)
    estimate = Estimate(
        seconds[math.ceil(QUANTILE * len(seconds)) - 1],
        max(run.peak_memory_mb for run in of_key) if on_cpu else before.memory_mb,
        before.disk_mb,
    )
    device = " / ".join(sorted({run.device for run in of_key}))
    return Row(key, estimate, device, _source(len(of_key)))


def _largest(key: Key, rows: list[Row]) -> Row:
    estimate = Estimate(*(max(numbers) for numbers in zip(*(row.estimate for row in rows), strict=True)))
    device = " / ".join(sorted({row.device for row in rows}))
    return Row(key, estimate, device, _source(sum(int(row.source.split()[1]) for row in rows)))


def _source(count: int) -> str:
    return f"measured, {count} run{'s' if count != 1 else ''}"


def _axes(key: Key) -> dict[str, Any]:
    """Return axes of a job that ``key`` stands for."""
    axes = {
        method_axis(key.rule): key.method,
        "architecture": key.architecture,
        "dataset": key.dataset,
        "spc": key.spc,
        "protocol": key.protocol,
    }
    return {axis: value for axis, value in axes.items() if value not in ("", None)}


# --- the command -----------------------------------------------------------------------------------


def learn(results: Sequence[Path], table: Path, device: str) -> list[str]:
    """Rewrite ``table`` by what runs took; return lines that say what has changed.

    Args:
        results: folders of results, and tables of rows that were measured elsewhere (``.csv``).
        table: a table of costs.
        device: part of the name of the devices whose runs count; empty for all.

    Raises:
        ValueError: there are no such runs, or a file is missing or broken.
    """
    costs = Costs.load(table)
    tables = [path for path in results if path.suffix == ".csv"]
    rows = [row for path in tables for row in Costs.load(path).rows.values() if row.measured]
    found = [run for path in results if path not in tables for run in runs(path)]
    taken = [row for row in rows if device in row.device and row.key.dataset]
    chosen = [run for run in found if device in run.device]
    if not (taken or chosen):
        devices = {row.device for row in rows} | {run.device for run in found}
        there = ", ".join(sorted(devices)) or "none that ended well"
        raise ValueError(f"no run on a device named {device!r}: there are {there}")
    new = learned(_with(costs, taken), chosen)
    new.write()
    lines = []
    for key, row in new.rows.items():
        if costs.rows.get(key) != row:
            before = costs.row(key.rule, _axes(key)).estimate
            lines.append(f"{key}: {_change(before.seconds, row.estimate.seconds)} s, {row.source}")
    measured = sum(row.measured for row in new.rows.values())
    changed = f"{len(lines)} rows changed" if lines else "nothing changed"
    lines.append(f"{table}: {changed}; {measured} are measured, {len(new.rows) - measured} assumed.")
    return lines


def _change(before: float, after: float) -> str:
    texts = number_text(before), number_text(after)
    return " → ".join(texts) if texts[0] != texts[1] else texts[1]


def show(texts: Sequence[str], table: Path) -> list[str]:
    """Return lines that say what the jobs of a cell take.

    Args:
        texts: axes as ``KEY=VALUE``.
        table: a table of costs.

    Raises:
        ValueError: there is no such axis or method, or a value is no number.
    """
    costs, (axes, draws, num_draws) = Costs.load(table), _parsed(texts)
    epochs = Optimization().epochs
    lines = [f"{'rule':<18} {'seconds':>9}  {'of a':<16} {'MB':>7} {'disk, MB':>9}  source"]
    for rule, unit in UNITS.items():
        row = costs.row(rule, axes)
        seconds, memory, disk = map(number_text, row.estimate)
        lines.append(f"{rule:<18} {seconds:>9}  {unit:<16} {memory:>7} {disk:>9}  {row.source}, {row.device}")
    of_shard = graph.grouped_with("defend")
    shard = sum(num_draws * costs.estimate(rule, axes).seconds for rule in of_shard)
    training = epochs * costs.estimate("train", axes).seconds
    lines.append(f"Draws {draws} take {number_text(shard)} s, {epochs} epochs {number_text(training)} s.")
    return lines


class _Asked(NamedTuple):
    """The axes of a cell, and its draws as they were written, with their number."""

    axes: dict[str, Any]
    draws: str
    num_draws: int


def _parsed(texts: Sequence[str]) -> _Asked:
    given = {condition.axis: condition for condition in conditions.parse(texts)}
    draw = given.pop("draw", ALL_DRAWS)
    if not draw.num_values:
        raise ValueError(f"{str(draw)!r} doesn't say how many draws: write a range, as draw=0-9")
    axes = {axis: condition.only() for axis, condition in given.items()}
    for axis, kind in KINDS.items():
        if axes.get(axis, NO_METHOD) != NO_METHOD:
            registry.path(kind, str(axes[axis]))  # is there such a method?
    return _Asked(axes, draw.value, draw.num_values)
