"""Says why a result is what it is: ``detrojan why PATH``, or ``KEY=VALUE ...`` for a cell or a data set.

It follows the rules of the workflow from a result back to its data set, and tells of each step what is
known: settings, code, random streams, files, logs, attempts that died. Free of torch.
"""

import hashlib
import json
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq

from detrojan import registry
from detrojan.cells import MODEL_AXES, Cell, Draws, Model, Shard, axes_text
from detrojan.settings import Optimization
from detrojan.stages import data_card
from detrojan.storage import provenance, seals
from detrojan.study.schema import MethodKind
from detrojan.workflow import attempts, equal_code, graph
from detrojan.workflow.equal_code import Proof
from detrojan.workflow.graph import Job
from detrojan.workflow.site import Site, axes_of, find_cell, find_model, one_draw, parse_axes, read_rows

Axes = Mapping[str, Any]
Facts = dict[str, Any]

WIDTH = 100
SHORT = 12  # digits of a file's SHA-256
MEASURES = ("status", "reason", "acc", "asr", "ra", "num_test", "num_triggered", "chosen", "attack_took")
COST = ("device", "seconds", "peak_memory_bytes", "forward_passes", "backward_passes")
# What lies in a folder that holds neither models nor shards.
ARTIFACTS = {
    "datasets": "data set",
    "samples": "sample",
    "triggers": "trigger",
    "poisoned": "poisoned rows",
    "triggered": "triggered test set",
    "stamped": "triggered sample",
}


def parse_path(path: Path, results: Path) -> tuple[str, dict[str, Any]]:
    """Return which folder of ``results`` a path leads to, and the axes that it names.

    Raises:
        ValueError: it does not lie there, or names no artifact.
    """
    if not path.resolve().is_relative_to(results.resolve()):
        raise ValueError(f"{path} is not below {results}: name its folder of results with --results")
    below = path.resolve().relative_to(results.resolve()).as_posix()
    folder = below.partition("/")[0]
    if folder not in graph.folders():
        raise ValueError(
            f"{path} is no artifact: name one below {', '.join(graph.folders())}, or a cell as KEY=VALUE ..."
        )
    found = graph.parse(below)
    if not found:
        ways = " or ".join(f"{results}/{folder}/{place}" for place in graph.places(folder))
        raise ValueError(f"{path} names no artifact: it should go on as {ways}")
    return folder, Cell.from_wildcards(found[1]).axes


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
        path = self.site.at(graph.metrics(shard))
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
        path = self.site.at(graph.model_card(model))
        if path.exists():
            return _card(path)
        rows = self.site.rows("models", model._asdict())
        for row in rows:
            for name in ("architecture_settings", "optimization"):
                row[name] = json.loads(row[name])
        return rows[0] if rows else {}

    def attack_settings(self, trigger: Job, model: Axes) -> dict[str, Any] | None:
        """Return the attack's settings, as resolved; None where they are not known."""
        card = self.site.at(trigger.file("card"))
        if card.exists():
            return dict(_card(card)["hyperparameters"])
        if not all(axis in model for axis in MODEL_AXES):
            return None
        rows = self.site.rows("models", {axis: model[axis] for axis in MODEL_AXES})
        kept = rows[0]["attack_hyperparameters"] if rows else None
        return None if kept is None else dict(json.loads(kept))

    def record(self, step: Job) -> attempts.Record | None:
        """Return the attempts of a step that is under way or died."""
        own = {axis: str(v) if isinstance(v, Draws) else v for axis, v in step.axes.items()}
        return next((r for r in self.records if r.rule == step.rule and r.axes == own), None)

    def state(self, steps: Sequence[Job], *, planned: bool) -> str:
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
    """Return the digest of today's code of a job; None if it has lost the method."""
    try:
        return graph.code_digest(rule, axes)
    except ValueError:
        return None


def _proofs(key: str, code: str, today: str | None) -> list[Proof]:
    """Return what shows that one code gives the numbers of today's; nothing if that is not recorded."""
    if today is None or graph.oldest_code(key, code) != graph.oldest_code(key, today):
        return []
    return equal_code.record().between(key, today, code)


def source_digest(site: Site, dataset: str) -> str | None:
    """Return the digest of a data set's images, labels and classes; None if it is not there."""
    path = site.at(graph.job("dataset", {"dataset": dataset}).file("train"))
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


def settings(lookup: Lookup, steps: Sequence[Job], row: Mapping[str, Any] | None) -> Facts:
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
        elif step.rule in graph.making("models"):
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
        elif step.rule in graph.making("triggers"):
            kept = lookup.attack_settings(step, steps[-1].axes)
            if kept is not None:
                found["attack"] = _method_settings(site, "attacks", axes["attack"], kept, axes)
    return found


def _whose(step: Job, steps: Sequence[Job]) -> str:
    """Return a mark for the clean model that an attack learns against."""
    return ", clean model" if step.axes["attack"] != steps[-1].axes["attack"] else ""


def code(lookup: Lookup, steps: Sequence[Job], row: Mapping[str, Any] | None) -> Facts:
    """Return code, versions, device and cost by rule, where kept; arguments as for :func:`settings`."""
    found: Facts = {}
    for step in steps:
        if not graph.RULES[step.rule].keeps_code:
            continue
        trained = step.rule in graph.making("models")
        kept = lookup.model_card(Model(**step.axes)) if trained else row
        if kept and kept["code"]:
            settings = kept.get("architecture_settings", {}) if trained else {}
            named = step.axes | {registry.NETWORK: settings.get(registry.NETWORK)}
            today = digest_today(step.rule, named)
            proofs = _proofs(graph.code_key(step.rule, named), kept["code"], today)
            found[f"{step.rule}{_whose(step, steps)}"] = {
                "digest": kept["code"],
                "today": today,
                "same": kept["code"] == today or bool(proofs),
                "recorded": [proof._asdict() for proof in proofs],
                "git_commit": kept["git_commit"],
                "git_commit_today": provenance.git_commit(),
                "versions": json.loads(kept["versions"]),
                **{column: kept[column] for column in COST if column in kept},
            }
    return found


def _attempt_facts(lookup: Lookup, steps: Iterable[Job]) -> list[Facts]:
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


def _common_facts(
    lookup: Lookup, steps: Sequence[Job], row: Mapping[str, Any] | None, draw: int | None = None
) -> Facts:
    """Return what is said of every kind of result."""
    site, axes = lookup.site, steps[-1].axes
    dataset = axes["dataset"]
    # A data set is known by its source's digest; its files are the largest, and follow from it.
    # Of repaired models, which rarely stay, only those are told.
    files = [
        file
        for step in steps
        for file in step.files
        if step.rule != "dataset" and (not graph.RULES[step.rule].temporary or site.at(file).exists())
    ]
    logs = dict.fromkeys(step.log for step in steps)
    return {
        "settings": settings(lookup, steps, row),
        "code": code(lookup, steps, row),
        "seeds": {axis: axes[axis] for axis in ("seed", "draw") if axis in axes},
        "streams": [list(stream) for step in steps for stream in graph.streams(step, draw)],
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
    steps = list(graph.steps(graph.shard_job(shard)))
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
    common = _common_facts(lookup, steps, first, own.get("draw"))
    common["seeds"] = {"seed": shard.model.seed} | own
    what = "cell" if len(draws) == 1 else "shard"
    axes = shard.axes | own
    return {"what": what, "axes": axes, "results": results, **common}


def explain_model(lookup: Lookup, model: Model) -> Facts:
    """Return what is known of a model."""
    steps = list(graph.steps(graph.model_job(model)))
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


def explain_data_set(lookup: Lookup, axes: Axes) -> Facts:
    """Return what is known of a data set.

    Raises:
        ValueError: it is neither there nor in the study.
    """
    planned = lookup.site.study.grid.datasets if lookup.site.study else []
    if axes["dataset"] not in planned and source_digest(lookup.site, axes["dataset"]) is None:
        known = f"those of the study are {', '.join(planned)}" if planned else "no study was run here"
        raise ValueError(f"no data set is called {axes['dataset']}: {known}")
    return explain_artifact(lookup, "datasets", axes, planned=axes["dataset"] in planned)


def explain_artifact(lookup: Lookup, folder: str, axes: Axes, *, planned: bool = False) -> Facts:
    """Return what is known of a data set, a sample, a trigger, or of images that carry it."""
    site, last = lookup.site, graph.job_in(folder, axes)
    steps = list(graph.steps(last))
    files = [*last.files, *([last.file("card")] if "card" in graph.RULES[last.rule].beside else [])]
    there = all(site.at(file).exists() for file in files)
    result: Facts = {"state": "done" if there else lookup.state(steps, planned=planned)}
    if len(files) > len(last.files) and site.at(files[-1]).exists():
        hidden = ("hyperparameters", "history", seals.KEY, *last.axes)
        card = _card(site.at(files[-1]))
        result |= {name: value for name, value in card.items() if name not in hidden}
    told = list(data_card.lines(result)) if last.rule == "dataset" and "images" in result else []
    return {
        "what": ARTIFACTS[folder],
        "axes": {axis: str(v) if isinstance(v, Draws) else v for axis, v in last.axes.items()},
        "results": [result],
        "told": told,
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
    if set(given) == {"dataset"}:
        return explain_data_set(lookup, given)
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
    if facts.get("told"):  # of a data set: its card as people read it, which JSON has as it is
        yield from _pairs({"state": results[0]["state"]})
        yield from (f"  {line}" for line in facts["told"])
    else:
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
    if made["recorded"]:
        shown = "; ".join(dict.fromkeys(f"recorded {p['date']}, on {p['study']}" for p in made["recorded"]))
        today = f"which gives the numbers of today's, {made['today']} ({shown})"
    elif made["same"]:
        today = "the same as today's"
    else:
        today = f"today's is {made['today'] or 'gone'}: a rerun would remake it"
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


def main(what: Sequence[str], results: Path, *, as_json: bool) -> None:
    """Print what is known of what the texts name; they and the errors are those of :func:`explain`."""
    facts = explain(Site(results), what)
    click.echo(json.dumps(facts, indent=2) if as_json else "\n".join(lines(facts)))
