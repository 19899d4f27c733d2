"""Says why a result is what it is: ``python -m detrojan.commands.why PATH``, or ``KEY=VALUE ...`` for a cell.

It follows the rules of the workflow from a result back to its data set, and tells of each step what is
known: settings, code, random streams, files, logs, attempts that died. Free of torch.
"""

import argparse
import hashlib
import io
import json
import re
import string
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from detrojan import paths, registry
from detrojan.cells import MODEL_AXES, NO_METHOD, Cell, Draws, Model, Shard, axes_text, value_text
from detrojan.paths import LOGS, MODEL, OWN_TRIGGER, POISONED, RESULTS, SHARD, TRIGGER, UNTOUCHED
from detrojan.settings import Optimization
from detrojan.storage import provenance
from detrojan.study.schema import MethodKind
from detrojan.study.site import Site, axes_of, find_cell, find_model, one_draw, parse_axes, read_rows
from detrojan.workflow import attempts

Axes = Mapping[str, Any]
Facts = dict[str, Any]

WIDTH = 100
SHORT = 12  # digits of a file's SHA-256
MEASURES = ("status", "reason", "acc", "asr", "ra", "num_test", "num_triggered", "chosen", "attack_took")
COST = ("device", "seconds", "peak_memory_bytes", "forward_passes", "backward_passes")
DATASET = "{dataset}"
SAMPLE = "{dataset}/spc-{spc}/draws-{draws}"
LABEL, DRAW = "LABEL", "DRAW"  # in a stream's name: one stream each
# What a folder below results/ holds, as the rules write it.
FOLDERS = {
    "datasets": [DATASET],
    "samples": [SAMPLE],
    "triggers": [TRIGGER, OWN_TRIGGER],
    "poisoned": [POISONED, MODEL],
    "triggered": [TRIGGER, MODEL],
    "stamped": [f"{TRIGGER}/spc-{{spc}}/draws-{{draws}}", f"{MODEL}/spc-{{spc}}/draws-{{draws}}"],
    "models": [MODEL],
    "defended": [SHARD],
    "metrics": [SHARD],
}
NUMBERS = {"ratio": r"[0-9.]+", "seed": "[0-9]+", "spc": "[0-9]+", "draws": "[0-9]+-[0-9]+"}
# What the `code` param of these rules covers beside the script, which has the rule's name: a kind of
# method, and the axis that names it. Of these rules the results keep the digest.
CODE: dict[str, dict[registry.Kind, str]] = {
    "train": {"models": "architecture"},
    "train_controlled": {"models": "architecture", "attacks": "attack"},
    "defend": {"defenses": "defense"},
    "evaluate_untouched": {},
}


# --- the steps to a result, as the rules have them -------------------------------------------------


class Step(NamedTuple):
    """One step on the way to a result.

    Attributes:
        rule: of the workflow.
        axes: those that its wildcards name.
        files: what it writes and others read, as paths of the workflow.
        log: path of its log.
        streams: names of its random streams, see :mod:`detrojan.rng`.
    """

    rule: str
    axes: dict[str, Any]
    files: list[str]
    log: str
    streams: list[tuple[Any, ...]]


def _step(
    rule: str,
    pattern: str,
    axes: Axes,
    files: Sequence[str],
    log: str,
    streams: Iterable[tuple[Any, ...]] = (),
) -> Step:
    """Return a step whose artifact lies under ``pattern``, which stands for ``{}`` in the other paths."""
    own = {field: axes[field] for _, field, _, _ in string.Formatter().parse(pattern) if field}
    place = pattern.format(**{axis: value_text(value) for axis, value in own.items()})
    written = [f"{RESULTS}/{file.format(place)}" for file in files]
    return Step(rule, own, written, f"{LOGS}/{log}/{place}.log", list(streams))


def dataset_steps(axes: Axes) -> list[Step]:
    """Return the step to the data set that ``axes`` name."""
    splits = [f"datasets/{{}}/{split}.parquet" for split in ("train", "held_out", "test")]
    return [_step("dataset", DATASET, axes, splits, "dataset", [("held out", axes["dataset"], LABEL)])]


def sample_steps(axes: Axes) -> list[Step]:
    """Return the steps to a defender's samples; with ``draw`` among the axes, its streams are named."""
    dataset, draw = axes["dataset"], axes.get("draw", DRAW)
    streams = [("sample", dataset, draw, LABEL), ("sample order", dataset, axes["spc"], draw)]
    sample = _step("sample", SAMPLE, axes, ["samples/{}.parquet"], "sample", streams)
    return [*dataset_steps(axes), sample]


def trigger_steps(axes: Axes) -> list[Step]:
    """Return the steps to an attack's trigger, as it is before any training of the attacked model."""
    against_model = registry.trigger_owner(axes["attack"]) == "architecture"
    pattern = OWN_TRIGGER if against_model else TRIGGER
    before = dataset_steps(axes)
    if against_model:
        before = model_steps({**axes, "attack": NO_METHOD, "ratio": 0.0})
    rule = "trigger_against_model" if against_model else "trigger"
    files = [f"triggers/{{}}/{file}" for file in ("trigger.safetensors", "card.json")]
    trigger = _step(rule, pattern, axes, files, "trigger")
    return [*before, trigger._replace(streams=[("trigger", *trigger.axes.values())])]


def poison_steps(axes: Axes) -> list[Step]:
    """Return the steps to the poisoned rows of a training set."""
    own = registry.trigger_owner(axes["attack"]) != "all"
    files = [f"poisoned/{{}}/{file}" for file in ("train.parquet", "card.json")]
    streams = [("poison", axes["dataset"], axes["seed"])]
    rule, pattern = ("poison_own", MODEL) if own else ("poison", POISONED)
    return [*trigger_steps(axes), _step(rule, pattern, axes, files, "poison", streams)]


def model_steps(axes: Axes) -> list[Step]:
    """Return the steps to a model."""
    model = [axes[axis] for axis in MODEL_AXES]
    streams = [("init", *model), ("train", *model)]
    files = [f"models/{{}}/{file}" for file in ("model.safetensors", "card.json")]
    rule = "train"
    if axes["attack"] == NO_METHOD:
        before = dataset_steps(axes)
    elif registry.trigger_owner(axes["attack"]) == "model":
        before, rule = trigger_steps(axes), "train_controlled"
        streams.append(("poisoner", *model))
        files.append("models/{}/trigger.safetensors")
    else:
        before = poison_steps(axes)
    return [*before, _step(rule, MODEL, axes, files, "train", streams)]


def _trigger_or_model_steps(axes: Axes) -> list[Step]:
    """Return the steps to a trigger as it is stamped on images: its model may have trained it further."""
    controlled = registry.trigger_owner(axes["attack"]) == "model"
    return model_steps(axes) if controlled else trigger_steps(axes)


def triggered_steps(axes: Axes) -> list[Step]:
    """Return the steps to a triggered test set."""
    own = registry.trigger_owner(axes["attack"]) != "all"
    rule, pattern = ("triggered_own", MODEL) if own else ("triggered", TRIGGER)
    files = [f"triggered/{{}}/{file}" for file in ("test.parquet", "card.json")]
    return [*_trigger_or_model_steps(axes), _step(rule, pattern, axes, files, "triggered")]


def stamp_steps(axes: Axes) -> list[Step]:
    """Return the steps to triggered copies of a defender's samples."""
    own = registry.trigger_owner(axes["attack"]) != "all"
    rule = "stamp_own" if own else "stamp"
    stamp = _step(rule, FOLDERS["stamped"][own], axes, ["stamped/{}.parquet"], "stamp")
    return _once([*_trigger_or_model_steps(axes), *sample_steps(axes), stamp])


def shard_steps(axes: Axes) -> list[Step]:
    """Return the steps to the measures of a shard; with ``draw`` among the axes, its streams are named."""
    attacked = axes["attack"] != NO_METHOD
    triggered = triggered_steps(axes) if attacked else []
    measures = [f"metrics/{{}}/{file}.parquet" for file in ("metrics", "predictions")]
    if axes["defense"] == NO_METHOD:
        last = [_step("evaluate_untouched", UNTOUCHED, axes, measures, "shards")]
        return _once([*model_steps(axes), *triggered, *last])
    threat_model = registry.threat_model("defenses", axes["defense"])
    given = [] if threat_model == "data_free" else sample_steps(axes)
    if threat_model == "known_trigger" and attacked:
        given = stamp_steps(axes)
    model = [axes[axis] for axis in MODEL_AXES]
    streams = [("defend", *model, axes["defense"], axes["spc"], axes.get("draw", DRAW))]
    last = [
        _step("defend", SHARD, axes, ["defended/{}"], "shards", streams),
        _step("evaluate", SHARD, axes, measures, "shards"),
    ]
    return _once([*model_steps(axes), *given, *triggered, *last])


def cell_steps(shard: Shard, draw: int | None = None) -> list[Step]:
    """Return the steps to the measures of a shard, or of one of its draws."""
    axes = {**shard.model._asdict(), "defense": shard.defense, "spc": shard.spc, "draws": shard.draws}
    return shard_steps(axes if draw is None else {**axes, "draw": draw})


def _once(steps: Iterable[Step]) -> list[Step]:
    """Return ``steps``, each where it stands first."""
    found: list[Step] = []
    for step in steps:
        if step not in found:
            found.append(step)
    return found


# What a folder that holds neither models nor shards has, and the steps to it.
ARTIFACTS: dict[str, tuple[str, Callable[[Axes], list[Step]]]] = {
    "datasets": ("data set", dataset_steps),
    "samples": ("sample", sample_steps),
    "triggers": ("trigger", trigger_steps),
    "poisoned": ("poisoned rows", poison_steps),
    "triggered": ("triggered test set", triggered_steps),
    "stamped": ("triggered sample", stamp_steps),
}


def parse_path(path: Path, results: Path) -> tuple[str, dict[str, Any]]:
    """Return which folder of ``results`` a path leads to, and the axes that it names.

    Raises:
        ValueError: it does not lie there, or names no artifact.
    """
    if not path.resolve().is_relative_to(results.resolve()):
        raise ValueError(f"{path} is not below {results}: name its folder of results with --results")
    folder, _, rest = path.resolve().relative_to(results.resolve()).as_posix().partition("/")
    if folder not in FOLDERS:
        raise ValueError(
            f"{path} is no artifact: name one below {', '.join(FOLDERS)}, or a cell as KEY=VALUE ..."
        )
    for pattern in FOLDERS[folder]:
        match = re.fullmatch(rf"{_expression(pattern)}(\.parquet|/[^/]+)?", rest)
        if match:
            return folder, Cell.from_wildcards(match.groupdict()).axes
    ways = " or ".join(f"{results}/{folder}/{pattern}" for pattern in FOLDERS[folder])
    raise ValueError(f"{path} names no artifact: it should go on as {ways}")


def _expression(pattern: str) -> str:
    parts = string.Formatter().parse(pattern)
    return "".join(
        re.escape(t) + (f"(?P<{f}>{NUMBERS.get(f, '[^/]+')})" if f else "") for t, f, _, _ in parts
    )


# --- what is known of it ---------------------------------------------------------------------------


class Lookup:
    """Answers from the files of a site: rows, cards, records of attempts."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.records = attempts.read(site.at(str(attempts.FOLDER)))
        self.slurm = attempts.slurm_states(self.records)

    def cell_row(self, shard: Shard, cell: Shard) -> dict[str, Any] | None:
        """Return a cell's row, None where there is none, with two columns more: ``row_in`` and ``in_tables``.

        The shard's own table is the newest; a cell that was given up has none, and a table that was
        copied from elsewhere comes without. ``in_tables`` says whether the study's table has the row.
        """
        path = self.site.at(paths.metrics(shard))
        axes = axes_of(cell)
        own = read_rows(path, axes) if path.exists() else []
        table = self.site.rows("cells", axes)
        if not own:
            where = {"row_in": str(self.site.table("cells")), "in_tables": "yes"}
            return table[0] | where if table else None
        if not table:
            return own[0] | {"row_in": str(path), "in_tables": "not yet"}
        same = all(table[0][name] == value for name, value in own[0].items())
        said = "yes" if same else "with other values: run the workflow to bring them up to date"
        return table[0] | own[0] | {"row_in": str(path), "in_tables": said}

    def model_card(self, model: Model) -> dict[str, Any]:
        """Return a model's card, or what the table of models has of it; empty where there is neither."""
        path = self.site.at(paths.model_card(model))
        if path.exists():
            return _card(path)
        rows = self.site.rows("models", model._asdict())
        for row in rows:
            for name in ("architecture_settings", "optimization"):
                row[name] = json.loads(row[name])
        return rows[0] if rows else {}

    def attack_settings(self, trigger: Step, model: Axes) -> dict[str, Any] | None:
        """Return the attack's settings, as resolved; None where they are not known."""
        (card,) = (self.site.at(file) for file in trigger.files if file.endswith("card.json"))
        if card.exists():
            return dict(_card(card)["hyperparameters"])
        if not all(axis in model for axis in MODEL_AXES):
            return None
        rows = self.site.rows("models", {axis: model[axis] for axis in MODEL_AXES})
        kept = rows[0]["attack_hyperparameters"] if rows else None
        return None if kept is None else dict(json.loads(kept))

    def record(self, step: Step) -> attempts.Record | None:
        """Return the attempts of a step that is under way or died."""
        own = {axis: str(v) if isinstance(v, Draws) else v for axis, v in step.axes.items()}
        return next((r for r in self.records if r.rule == step.rule and r.axes == own), None)

    def state(self, steps: Sequence[Step], *, planned: bool) -> str:
        """Return how far the last of ``steps`` is, which has left nothing yet."""
        for step in reversed(steps):
            record = self.record(step)
            if record:
                return f"{record.states(self.slurm)[-1]}: rule {step.rule}, see {self.site.at(record.log)}"
        return "planned, not started" if planned else "not in the study"


def _card(path: Path) -> dict[str, Any]:
    try:
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a whole card ({error})") from None
    return card


def digest_today(rule: str, axes: Axes) -> str | None:
    """Return the digest of today's code of a rule of ``CODE``; None if it has lost the method."""
    script = registry.CHECKOUT / "scripts" / f"{rule}.py"
    try:
        return provenance.code_digest(
            script, *(registry.path(kind, axes[a]) for kind, a in CODE[rule].items())
        )
    except ValueError:
        return None


def source_digest(site: Site, dataset: str) -> str | None:
    """Return the digest of a data set's images, labels and classes; None if it is not there."""
    path = site.at(f"{RESULTS}/datasets/{dataset}/train.parquet")
    try:
        return str(json.loads(pq.read_schema(path).metadata[b"detrojan"])["digest"])
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError, TypeError, KeyError, ValueError):
        raise ValueError(f"{path}: not a whole Parquet table of images") from None


def file_digest(path: Path) -> str | None:
    """Return the first digits of a file's SHA-256; None if there is no such file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:SHORT]


def _settings_facts(name: str, kept: Facts, default: Facts | None, study: Facts | None) -> Facts:
    """Return settings as they were, the defaults that differ, and what the study says now if it differs."""

    def differing(other: Facts | None) -> Facts:
        return {name: value for name, value in (other or {}).items() if kept.get(name, ...) != value}

    return {"name": name, "values": kept, "defaults": differing(default), "study_now": differing(study)}


def _method_settings(site: Site, kind: MethodKind, name: str, kept: Facts, axes: Axes) -> Facts:
    """Return the settings of a method, as :func:`_settings_facts` does."""
    if name not in registry.names(kind):  # the code has lost it since
        return _settings_facts(name, kept, None, None)
    default = registry.declared(kind, name).settings().model_dump(mode="json")
    return _settings_facts(name, kept, default, site.study.method(kind, name, axes) if site.study else None)


def settings(lookup: Lookup, steps: Sequence[Step], row: Mapping[str, Any] | None) -> Facts:
    """Return the settings of all methods among ``steps``, as far as known.

    Args:
        lookup: where to find cards.
        steps: to the result.
        row: of the cell, if it is one and has a row.
    """
    found: Facts = {}
    site = lookup.site
    for step in steps:
        axes = step.axes
        if step.rule == "defend" and row and row["code"]:
            kept = json.loads(row["hyperparameters"])
            found["defense"] = _method_settings(site, "defenses", axes["defense"], kept, axes)
        elif step.rule in ("train", "train_controlled"):
            card = lookup.model_card(Model(**axes))
            if card:
                whose = _whose(step, steps)
                kept = card["architecture_settings"]
                name = axes["architecture"]
                found[f"architecture{whose}"] = _method_settings(site, "models", name, kept, axes)
                study = site.study.optimization(axes) if site.study else None
                default = Optimization().model_dump(mode="json")
                kept = card["optimization"]
                found[f"training{whose}"] = _settings_facts("SGD", kept, default, study)
        elif step.rule in ("trigger", "trigger_against_model"):
            kept = lookup.attack_settings(step, steps[-1].axes)
            if kept is not None:
                found["attack"] = _method_settings(site, "attacks", axes["attack"], kept, axes)
    return found


def _whose(step: Step, steps: Sequence[Step]) -> str:
    """Return a mark for the clean model that an attack learns against."""
    return ", clean model" if step.axes["attack"] != steps[-1].axes["attack"] else ""


def code(lookup: Lookup, steps: Sequence[Step], row: Mapping[str, Any] | None) -> Facts:
    """Return code, versions, device and cost by rule, where kept; arguments as for :func:`settings`."""
    found: Facts = {}
    for step in steps:
        if step.rule not in CODE:
            continue
        trained = step.rule.startswith("train")
        kept = lookup.model_card(Model(**step.axes)) if trained else row
        if kept and kept["code"]:
            today = digest_today(step.rule, step.axes)
            found[f"{step.rule}{_whose(step, steps)}"] = {
                "digest": kept["code"],
                "today": today,
                "same": kept["code"] == today,
                "git_commit": kept["git_commit"],
                "git_commit_today": provenance.git_commit(),
                "versions": json.loads(kept["versions"]),
                **{column: kept[column] for column in COST if column in kept},
            }
    return found


def _attempt_facts(lookup: Lookup, steps: Iterable[Step]) -> list[Facts]:
    found = []
    for step in steps:
        record = lookup.record(step)
        if record:
            for attempt, state in zip(record.attempts, record.states(lookup.slurm), strict=True):
                found.append(
                    {
                        "rule": step.rule,
                        "state": state,
                        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt.started)),
                        "host": attempt.host,
                        "slurm_job": attempt.slurm_job,
                        "reason": attempt.reason,
                        "log": str(lookup.site.at(record.log)),
                    }
                )
    return found


def _common_facts(lookup: Lookup, steps: Sequence[Step], row: Mapping[str, Any] | None) -> Facts:
    """Return what is said of every kind of result."""
    site, axes = lookup.site, steps[-1].axes
    dataset = axes["dataset"]
    # A data set is known by its source's digest; its files are the largest, and follow from it.
    # Of cards, which hold timings, and of repaired models, which rarely stay, only those are told.
    files = [file for step in steps[1:] for file in step.files if not file.endswith("card.json")]
    files = [file for file in files if "/defended/" not in file or site.at(file).exists()]
    logs = dict.fromkeys(step.log for step in steps)
    return {
        "settings": settings(lookup, steps, row),
        "code": code(lookup, steps, row),
        "seeds": {axis: axes[axis] for axis in ("seed", "draw") if axis in axes},
        "streams": [list(stream) for step in steps for stream in step.streams],
        "source_digest": source_digest(site, dataset),
        "files": [
            {
                "path": str(site.at(file)),
                "there": site.at(file).exists(),
                "sha256": file_digest(site.at(file)),
            }
            for file in files
        ],
        "logs": [{"path": str(site.at(log)), "there": site.at(log).exists()} for log in logs],
        "attempts": _attempt_facts(lookup, steps),
    }


def explain_cells(lookup: Lookup, shard: Shard, draws: Sequence[int]) -> Facts:
    """Return what is known of cells of one shard: their rows, and what they stand on."""
    own: Facts = {"draw": draws[0]} if len(draws) == 1 else {"draws": str(shard.draws)}
    steps = cell_steps(shard, *draws) if len(draws) == 1 else cell_steps(shard)
    results = []
    first = None
    for draw in draws:
        cell = one_draw(shard, draw)
        row = lookup.cell_row(shard, cell)
        first = first or row
        if row:
            measures = {name: row.get(name) for name in MEASURES} | {"seconds": row["seconds"]}
            measures["chosen"] = json.loads(row["chosen"])
            where = {name: row[name] for name in ("row_in", "in_tables")}
            results.append({"draw": draw, "state": "done"} | where | measures)
        else:
            planned = any(True for _ in lookup.site.planned(axes_of(cell)))
            results.append({"draw": draw, "state": lookup.state(steps, planned=planned)})
    common = _common_facts(lookup, steps, first)
    common["seeds"] = {"seed": shard.model.seed} | own
    what = "cell" if len(draws) == 1 else "shard"
    axes = {**shard.model._asdict(), "defense": shard.defense, "spc": shard.spc, **own}
    return {"what": what, "axes": axes, "results": results, **common}


def explain_model(lookup: Lookup, model: Model) -> Facts:
    """Return what is known of a model."""
    steps = model_steps(model._asdict())
    card = lookup.model_card(model)
    rows = lookup.site.rows("models", model._asdict())
    planned = bool(lookup.site.planned_models(model._asdict()))
    result: Facts = {"state": "done" if card else lookup.state(steps, planned=planned)}
    for name in ("acc", "asr", "ra", "attack_took", "gate_reason", "trigger_weakness"):
        if rows:
            result[name] = rows[0][name]
    for name in ("train_loss", "train_accuracy", "num_train", "num_parameters", "seconds"):
        if card:
            result[name] = card[name]
    return {
        "what": "model",
        "axes": model._asdict(),
        "results": [result],
        **_common_facts(lookup, steps, None),
    }


def explain_artifact(lookup: Lookup, folder: str, axes: Axes) -> Facts:
    """Return what is known of a data set, a sample, a trigger, or of images that carry it."""
    what, steps_to = ARTIFACTS[folder]
    steps = steps_to(axes)
    site, last = lookup.site, steps[-1]
    there = all(site.at(file).exists() for file in last.files)
    result: Facts = {"state": "done" if there else lookup.state(steps, planned=False)}
    card = next((site.at(file) for file in last.files if file.endswith("card.json")), None)
    if card and card.exists():
        hidden = ("hyperparameters", "history", *last.axes)
        result |= {name: value for name, value in _card(card).items() if name not in hidden}
    return {
        "what": what,
        "axes": {axis: str(v) if isinstance(v, Draws) else v for axis, v in last.axes.items()},
        "results": [result],
        **_common_facts(lookup, steps, None),
    }


def explain(site: Site, what: Sequence[str]) -> Facts:
    """Return what is known of what the texts name: one path, or ``KEY=VALUE`` texts.

    Raises:
        ValueError: they name nothing, or several things.
    """
    lookup = Lookup(site)
    if len(what) == 1 and ("=" not in what[0] or Path(what[0]).exists()):
        folder, axes = parse_path(Path(what[0]), site.results)
        named = Cell(**axes)
        if folder == "models":
            return explain_model(lookup, named.model)
        if folder in ("metrics", "defended"):
            return explain_cells(lookup, named.shard, list(named.shard.draws.numbers()))
        return explain_artifact(lookup, folder, axes)
    given = parse_axes(what)
    if "defense" in given:
        cell = find_cell(site, given)
        return explain_cells(lookup, site.shard_of(cell), [cell.draws.first])
    if "spc" in given or "draw" in given:
        raise ValueError(
            "spc and draw belong to a defense: add defense=..., or leave them out to name a model"
        )
    return explain_model(lookup, find_model(site, given))


# --- in words --------------------------------------------------------------------------------------


def lines(facts: Facts) -> Iterator[str]:
    """Yield ``facts`` as lines of text."""
    yield wrapped(f"{facts['what']}: {axes_text(facts['axes'])}")
    results = facts["results"]
    yield from ["", "Result"]
    yield from _table(results) if len(results) > 1 else _pairs(results[0])
    if facts["settings"]:
        yield from ["", "Settings (in brackets: the default of the class, where it differs)"]
        for name, found in facts["settings"].items():
            yield from _pair(name, f"{found['name']}: {_settings_text(found)}")
            if found["study_now"]:
                yield from _pair("", f"the study file now: {_assignments(found['study_now'])}")
    for name, made in facts["code"].items():
        yield from ["", f"Made by rule {name}"]
        yield from _pairs(_origin(made))
    yield from ["", "Seeds and random streams (LABEL, DRAW: one for each)"]
    yield from _pairs(facts["seeds"])
    yield from (f"  {json.dumps(stream)}" for stream in facts["streams"])
    yield from ["", f"Files (first {SHORT} digits of the SHA-256)"]
    source = (facts["source_digest"] or "not there")[:SHORT]
    yield f"  {source:{SHORT}}  the images of data set {facts['axes']['dataset']}, as read from their source"
    for file in facts["files"]:
        yield f"  {file['sha256'] or _there(file):{SHORT}}  {file['path']}"
    yield from ["", "Logs"]
    yield from (f"  {_there(log):{SHORT}}  {log['path']}" for log in facts["logs"])
    yield from ["", "Attempts that run or died"]
    for attempt in facts["attempts"]:
        job = f", SLURM job {attempt['slurm_job']}" if attempt["slurm_job"] else ""
        said = f": {attempt['reason']}" if attempt["reason"] else ""
        where = f"{attempt['started']} on {attempt['host']}{job}"
        yield from _pair(attempt["rule"], f"{attempt['state']}, started {where}{said}; {attempt['log']}")
    if not facts["attempts"]:
        yield "  none"


def wrapped(text: str) -> str:
    """Return ``text`` in lines that fit, further ones indented; a path is never broken."""
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _there(file: Facts) -> str:
    return "there" if file["there"] else "not there"


def _origin(made: Facts) -> Facts:
    today = (
        "the same as today's"
        if made["same"]
        else f"today's is {made['today'] or 'gone'}: a rerun would remake it"
    )
    commit = made["git_commit"]
    if commit != made["git_commit_today"]:
        commit += f" (today: {made['git_commit_today']})"
    cost = {column: made[column] for column in COST if column in made}
    return {"code": f"{made['digest']}, {today}", "git commit": commit, "versions": made["versions"]} | cost


def _settings_text(found: Facts) -> str:
    def shown(name: str, value: Any) -> str:
        default = f" [{_text(found['defaults'][name])}]" if name in found["defaults"] else ""
        return f"{name}={_text(value)}{default}"

    return ", ".join(shown(name, value) for name, value in found["values"].items()) or "none"


def _assignments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_text(value)}" for name, value in values.items())


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return _assignments(value) or "nothing"
    return json.dumps(value) if isinstance(value, list) else str(value)


def _pairs(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        yield from _pair(name.replace("_", " "), _text(value))


def _pair(name: str, value: str) -> Iterator[str]:
    """Yield a name and its value, in columns; a path is never broken."""
    indent = 28
    wrapped = textwrap.wrap(value, WIDTH - indent, break_long_words=False, break_on_hyphens=False) or [""]
    head = f"  {name:{indent - 3}} "
    for place, part in enumerate(wrapped):
        yield f"{head if place == 0 else ' ' * indent}{part}"


def _table(results: Sequence[Facts]) -> Iterator[str]:
    """Yield a line a draw."""
    columns = ("draw", "status", "acc", "asr", "ra", "seconds")
    rows = [columns, *([_cell_text(r, column) for column in columns] for r in results)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(columns))]
    for row in rows:
        yield "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
    for reason in dict.fromkeys(r["reason"] for r in results if r.get("reason")):
        yield from _pair("reason", reason)


def _cell_text(result: Facts, column: str) -> str:
    if column == "status":
        return str(result.get("status", result["state"]))
    return _text(result.get(column))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m detrojan.commands.why", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "what",
        nargs="+",
        metavar="WHAT",
        help="a path below the results, or KEY=VALUE ... that name one cell; without defense=..., a model",
    )
    parser.add_argument("--results", default="results", type=Path, help="the folder of results")
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what is known of what ``arguments`` name; return the exit code."""
    asked = _arguments().parse_intermixed_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a log may know no –
    try:
        facts = explain(Site(asked.results), asked.what)
    except ValueError as error:
        print(f"detrojan.commands.why: {error}", file=sys.stderr)  # noqa: T201
        return 1
    text = json.dumps(facts, indent=2) if asked.json else "\n".join(lines(facts))
    print(text)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
