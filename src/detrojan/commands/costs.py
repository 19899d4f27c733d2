"""Shows what jobs cost, and learns it from finished studies.

:mod:`detrojan.workflow.job_costs` says what a row of the table stands for.
"""

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detrojan import registry
from detrojan.cells import NO_METHOD, NO_SAMPLES, SURVEY
from detrojan.settings import Optimization
from detrojan.study import conditions
from detrojan.workflow import graph, image_passes
from detrojan.workflow.cost_formula import CPU
from detrojan.workflow.job_costs import (
    UNITS,
    Costs,
    CountKey,
    Estimate,
    Key,
    Row,
    key_axes,
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
    """What one draw of a defense, or one epoch of a training, has taken.

    ``counts`` says how often the loops of a defense went round, by name.
    """

    key: Key
    seconds: float
    peak_memory_mb: float
    device: str
    counts: Mapping[str, float] = {}


def runs(results: Path) -> Iterator[Run]:
    """Yield what is known of finished draws and trainings in a folder of results.

    The tables tell; before there are any, the metrics and cards that they are made from.

    Raises:
        ValueError: there are none of either, or a file is broken.
    """
    rows = list(_cells(results))
    for row in rows:
        if row["defense"] != NO_METHOD and row["status"] == "ok":
            counts = image_passes.counts_of(row["defense"], json.loads(row["chosen"]))
            yield _run(of_draw(row), row, 1)._replace(counts=counts)
    models = list(_models(results))
    for row in models:
        key = Key("train", row["attack"], row["architecture"], row["dataset"])
        yield _run(key, row, row["epochs"])
    if not (rows or models):
        raise ValueError(f"{results}: no tables, metrics or models of a study: name its folder of results")


def _run(key: Key, row: Mapping[str, Any], units: int) -> Run:
    return Run(key, row["seconds"] / units, row["peak_memory_bytes"] / 1e6, row["device"])


def _cells(results: Path) -> Iterator[dict[str, Any]]:
    columns = ["dataset", "architecture", "defense", "protocol", "spc", "status", "chosen", *MEASURED]
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
    """Return ``costs`` with rows and counts for what was measured.

    Seconds are the 90th percentile, and beside them the median, which is what to expect. Memory is the
    largest on a CPU; a GPU's runs tell the GPU's memory, so there the host's stays what it was.

    Raises:
        ValueError: there are runs of CPUs and of GPUs.
    """
    by_key: dict[Key, list[Run]] = {}
    for run in found:
        by_key.setdefault(run.key, []).append(run)
    devices = sorted({run.device for of_key in by_key.values() for run in of_key})
    if CPU in devices and len(devices) > 1:
        raise ValueError(f"runs on {', '.join(devices)}: choose a device, such as --device {devices[1]!r}")
    measured = {key: _measured(costs, key, of_key) for key, of_key in by_key.items()}
    counts = dict(costs.counts) | _counts(by_key)
    return Costs((costs.rows | measured).values(), costs.path, counts, costs.study)


def _measured(costs: Costs, key: Key, of_key: list[Run]) -> Row:
    before = costs.row(key.rule, key_axes(key)).estimate
    seconds = sorted(run.seconds for run in of_key)
    on_cpu = all(run.device == CPU for run in of_key)
    estimate = Estimate(
        seconds[math.ceil(QUANTILE * len(seconds)) - 1],
        max(run.peak_memory_mb for run in of_key) if on_cpu else before.memory_mb,
        before.disk_mb,
    )
    device = " / ".join(sorted({run.device for run in of_key}))
    # The lower of the middle two, where their mean could lie above the ninth decile's run.
    expected = statistics.median_low(seconds)
    return Row(key, estimate, device, _source(len(of_key)), expected)


def _counts(by_key: Mapping[Key, Sequence[Run]]) -> dict[CountKey, dict[str, tuple[float, int]]]:
    """Return the median of each count by method, data set, SPC and protocol, over all networks."""
    pooled: dict[CountKey, list[Mapping[str, float]]] = {}
    for key, of_key in by_key.items():
        own = CountKey(key.method, key.dataset, key.spc or NO_SAMPLES, key.protocol or SURVEY)
        pooled.setdefault(own, []).extend(run.counts for run in of_key if run.counts)
    return {
        key: {name: (median, len(counts)) for name, median in image_passes.medians(counts).items()}
        for key, counts in pooled.items()
        if counts
    }


def _source(count: int) -> str:
    return f"measured, {count} run{'s' if count != 1 else ''}"


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
    taken = {row.key: row for row in rows if device in row.device}
    chosen = [run for run in found if device in run.device]
    if not (taken or chosen):
        devices = {row.device for row in rows} | {run.device for run in found}
        there = ", ".join(sorted(devices)) or "none that ended well"
        raise ValueError(f"no run on a device named {device!r}: there are {there}")
    new = learned(Costs((costs.rows | taken).values(), table, costs.counts), chosen)
    new.write()
    lines = []
    for key, row in new.rows.items():
        if costs.rows.get(key) != row:
            before = costs.row(key.rule, key_axes(key)).estimate
            lines.append(f"{key}: {_change(before.seconds, row.estimate.seconds)} s, {row.source}")
    changed = f"{len(lines)} rows changed" if lines else "nothing changed"
    lines += _count_lines(costs, new)
    lines.append(f"{table}: {changed}; it has {len(new.rows)}. What has no row goes by the formula.")
    return lines


def _count_lines(before: Costs, after: Costs) -> list[str]:
    """Return lines that say which counts have changed."""
    return [
        f"{key.method} {key.dataset} spc {key.spc}, {key.protocol}: {name} {number_text(median)}, "
        f"the median of {runs}"
        for key, counts in after.counts.items()
        if before.counts.get(key) != counts
        for name, (median, runs) in counts.items()
    ]


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
    heads = f"{'expected':>9} {'at most, s':>10}  {'of a':<16} {'MB':>7} {'disk, MB':>9}"
    lines = [f"{'rule':<18} {heads}  source"]
    for rule, unit in UNITS.items():
        row = costs.row(rule, axes)
        seconds, memory, disk = map(number_text, row.estimate)
        expected = number_text(row.expected_s)
        taken = f"{expected:>9} {seconds:>10}  {unit:<16} {memory:>7} {disk:>9}"
        lines.append(f"{rule:<18} {taken}  {row.source}, {row.device}")
    of_shard = graph.grouped_with("defend")
    shard = sum(num_draws * costs.estimate(rule, axes).seconds for rule in of_shard)
    training = epochs * costs.estimate("train", axes).seconds
    lines.append(
        f"Draws {draws} take at most {number_text(shard)} s, {epochs} epochs {number_text(training)} s."
    )
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
