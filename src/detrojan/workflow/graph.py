"""The graph of jobs: what each rule makes, from what, where that lies and what it runs on.

Declared here and nowhere else, in the order in which a study runs. The rules take inputs, outputs, logs
and constraints from here, and whatever follows the graph reads it too: ``plan``, ``why``, ``status``,
``reproduce``, what a closed study gives up, the units of the table of costs. Free of torch and of
Snakemake: the Snakefile reads it at every parse.

A file's path is ``results/FOLDER/PLACE``, then how the file is named; a place has one wildcard an axis.
Rules that share a folder make the same artifact for different cells: an attack, or a defense, has one.
"""

import dataclasses
import functools
import itertools
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from detrojan import registry
from detrojan.cells import (
    MODEL_AXES,
    NO_METHOD,
    NO_SAMPLES,
    ONE_DRAW,
    Cell,
    Model,
    Shard,
    axes_text,
    value_text,
)
from detrojan.storage import paths, provenance
from detrojan.study import grid
from detrojan.study.schema import Study
from detrojan.workflow import equal_code

RESULTS, LOGS = "results", "logs"
# How each job sets up torch before it computes: by `workflow.job`, which digests of code leave out.
DETERMINISM = registry.PACKAGE / "learning" / "determinism.py"
SCRIPTS = registry.CHECKOUT / "scripts"
ATTEMPTS = f"{LOGS}/attempts"  # of jobs that run or died

# --- places ----------------------------------------------------------------------------------------

DATASET = "{dataset}"
SAMPLE = "{dataset}/spc-{spc}/draws-{draws}"
# A trigger that all models of a data set and seed share, and one of an architecture.
TRIGGER = "{dataset}/{attack}/seed-{seed}"
OWN_TRIGGER = "{dataset}/{architecture}/{attack}/seed-{seed}"
POISONED = "{dataset}/{attack}/ratio-{ratio}/seed-{seed}"
MODEL = "{dataset}/{architecture}/{attack}/ratio-{ratio}/seed-{seed}"
STAMPED = f"{TRIGGER}/spc-{{spc}}/draws-{{draws}}"
OWN_STAMPED = f"{MODEL}/spc-{{spc}}/draws-{{draws}}"
SHARD = f"{MODEL}/{{defense}}/{{protocol}}/spc-{{spc}}/draws-{{draws}}"
UNTOUCHED = f"{MODEL}/{NO_METHOD}/{NO_METHOD}/spc-{NO_SAMPLES}/draws-{ONE_DRAW}"

# What a wildcard may be.
WILDCARDS = {
    "dataset": "[A-Za-z0-9_-]+",
    "architecture": "[a-z0-9_]+",
    "attack": "[a-z0-9_]+",
    "ratio": r"[0-9.]+",
    "seed": "[0-9]+",
    "defense": f"(?!{NO_METHOD}/)[a-z0-9_]+",
    "protocol": "[a-z]+(-[0-9]+)?",
    "spc": "[0-9]+",
    "draws": "[0-9]+-[0-9]+",
}

# --- what a rule says of itself --------------------------------------------------------------------

Owner = Literal["none", "all", "architecture", "model"]
DEFENDED = ("data_free", "clean_data", "known_trigger")


class Need(NamedTuple):
    """An input of a rule.

    Attributes:
        files: each ``FOLDER.FILE``; the first that is made for the attack and defense of the job is read,
            and where none is, the job goes without.
        given_to: threat models of the defenses that are given it; all if empty.
        clean: whether it is that of the clean model.
        each: of every ``model`` or ``shard`` of the study, and not of the job's.
    """

    files: tuple[str, ...]
    given_to: tuple[str, ...] = ()
    clean: bool = False
    each: Literal["", "model", "shard"] = ""


def read(*files: str, **more: Any) -> Need:
    """Return the need of one of ``files``, see :class:`Need`."""
    return Need(files, **more)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule of the workflow.

    Attributes:
        name: of the rule.
        folder: below the results, of its outputs.
        place: below that; its wildcards are the axes of the rule.
        needs: inputs by name.
        files: outputs by name: what follows the place in their paths, a list for several. In a rule
            without axes, ``{dataset}`` stands for each data set of the study.
        beside: outputs that hold timings, or that are for looking at, likewise.
        attacks: those that it serves, by whom their triggers belong to; empty if it looks at none.
        defenses: those that it serves, by threat model; empty if it looks at none.
        log: folder of its log, or its name if there are no axes.
        adds_to_log: whether it goes on in the log of another rule.
        script: the rule whose script it runs, itself if empty.
        methods: the kinds of methods whose code it runs, and the axis that names each; that of a data set
            is named by the study, as its ``source``.
        parts: what is found by its file, all of which it runs: tables, or figures.
        templates: a folder of the package, of files besides its code that it renders.
        keeps_code: whether its results say by which code they were made.
        streams: its random streams: a name, and the axes that key it. ``label`` and ``draw`` are keys
            of which a job has several.
        stage: its key in the table of costs, its name if empty.
        unit: of that table.
        gpu: whether it computes with a GPU, if there is one.
        group: of jobs that run as one on a cluster.
        temporary: whether its outputs go once they are read; they are folders then.
        shown: outputs that Snakemake's own report has, and under which head.
    """

    name: str
    folder: str = ""
    place: str = ""
    needs: Mapping[str, Need] = dataclasses.field(default_factory=dict)
    files: Mapping[str, str | list[str]] = dataclasses.field(default_factory=dict)
    beside: Mapping[str, str | list[str]] = dataclasses.field(default_factory=dict)
    attacks: tuple[Owner, ...] = ()
    defenses: tuple[str, ...] = ()
    log: str = ""
    adds_to_log: bool = False
    script: str = ""
    methods: Mapping[registry.Kind, str] = dataclasses.field(default_factory=dict)
    parts: tuple[registry.Part, ...] = ()
    templates: str = ""
    keeps_code: bool = False
    streams: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    stage: str = ""
    unit: str = ""
    gpu: bool = False
    group: str = ""
    temporary: bool = False
    shown: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """The axes that its wildcards name."""
        return tuple(field for _, field, _, _ in string.Formatter().parse(self.place) if field)

    @functools.cached_property
    def outputs(self) -> dict[str, str | list[str]]:
        """The patterns of all its outputs, by name."""
        return {
            name: [self._path(end) for end in ends] if isinstance(ends, list) else self._path(ends)
            for name, ends in {**self.files, **self.beside}.items()
        }

    def _path(self, end: str) -> str:
        return "/".join(filter(None, (RESULTS, self.folder, self.place))) + end

    def pattern(self, file: str) -> str:
        """Return the pattern of the output of this name."""
        found = self.outputs[file]
        assert isinstance(found, str), f"rule {self.name} makes several files {file}"
        return found

    def outputs_for(self, datasets: Sequence[str]) -> dict[str, str | list[str]]:
        """Return :attr:`outputs`; of a rule without axes, what is made of each data set by its name."""
        if self.axes:
            return self.outputs
        return {
            name: [text.format(dataset=name) for text in listed(found) for name in datasets]
            if "{dataset}" in "".join(found)
            else found
            for name, found in self.outputs.items()
        }

    @property
    def stage_name(self) -> str:
        """Its key in the table of costs; empty for the rule that only names targets."""
        return self.stage or (self.name if self.unit else "")

    @property
    def has_log(self) -> bool:
        """Whether it has a log of its own."""
        return bool(self.log) and not self.adds_to_log

    @property
    def log_pattern(self) -> str:
        """The pattern of the path of the log that it writes to; empty if there is none."""
        return "/".join(filter(None, (LOGS, self.log, self.place))) + ".log" if self.log else ""

    def serves(self, attack: str, defense: str) -> bool:
        """Return whether there is such a job for an attack and a defense, as far as it looks at them."""
        return (not self.attacks or owner(attack) in self.attacks) and (
            not self.defenses or registry.threat_model("defenses", defense) in self.defenses
        )

    @property
    def attack_names(self) -> list[str]:
        """The attacks that it serves; all of them, and none, if it looks at none."""
        names = [NO_METHOD, *registry.names("attacks")]
        return [name for name in names if not self.attacks or owner(name) in self.attacks]


def listed(files: str | list[str]) -> list[str]:
    """Return the patterns of one output, a single one in a list."""
    return [files] if isinstance(files, str) else files


@functools.cache
def owner(attack: str) -> Owner:
    """Return to whom an attack's finished trigger belongs; see :func:`detrojan.registry.trigger_owner`."""
    return "none" if attack == NO_METHOD else registry.trigger_owner(attack)


# --- the rules -------------------------------------------------------------------------------------

_dataset = Rule(
    "dataset",
    "datasets",
    DATASET,
    files={"train": "/train.parquet", "held_out": "/held_out.parquet", "test": "/test.parquet"},
    beside={"card": "/card.json"},
    log="dataset",
    methods={"datasets": "source"},
    streams={"held out": ("dataset", "label")},
    unit="job",
)

_sample = Rule(
    "sample",
    "samples",
    SAMPLE,
    needs={"pool": read("datasets.train")},  # or `held_out`, as the study says of its pool
    files={"sample": ".parquet"},
    log="sample",
    streams={"sample": ("dataset", "draw", "label"), "sample order": ("dataset", "spc", "draw")},
    unit="draw",
)

# Each stage of an attack twice: for triggers that all models share, and for those of some or of one.
_trigger = Rule(
    "trigger",
    "triggers",
    TRIGGER,
    needs={"train": read("datasets.train")},
    files={"trigger": "/trigger.safetensors"},
    beside={"card": "/card.json"},
    attacks=("all", "model"),
    log="trigger",
    methods={"attacks": "attack"},
    streams={"trigger": ("dataset", "attack", "seed")},
    unit="job",
    gpu=True,
)
_trigger_against_model = dataclasses.replace(
    _trigger,
    name="trigger_against_model",
    place=OWN_TRIGGER,
    needs={"train": read("datasets.train"), "model": read("models.model", clean=True)},
    attacks=("architecture",),
    script="trigger",
    stage="trigger",
    streams={"trigger": ("dataset", "architecture", "attack", "seed")},
)

_poison = Rule(
    "poison",
    "poisoned",
    POISONED,
    needs={"train": read("datasets.train"), "trigger": read("triggers.trigger")},
    files={"poisoned": "/train.parquet"},
    beside={"card": "/card.json", "preview": "/preview.png"},
    attacks=("all",),
    log="poison",
    methods={"attacks": "attack"},
    streams={"poison": ("dataset", "seed")},
    unit="training set",  # a poisoning ratio of it
)
_poison_own = dataclasses.replace(
    _poison, name="poison_own", place=MODEL, attacks=("architecture",), script="poison", stage="poison"
)

# A model that is trained with its trigger has the finished one beside it.
FINISHED = ("models.trigger", "triggers.trigger")

_triggered = Rule(
    "triggered",
    "triggered",
    TRIGGER,
    needs={"test": read("datasets.test"), "trigger": read(*FINISHED)},
    files={"triggered": "/test.parquet"},
    beside={"examples": "/examples.parquet", "card": "/card.json"},
    attacks=("all",),
    log="triggered",
    methods={"attacks": "attack"},
    unit="job",
)
_triggered_own = dataclasses.replace(
    _triggered,
    name="triggered_own",
    place=MODEL,
    attacks=("architecture", "model"),
    script="triggered",
    stage="triggered",
)

_stamp = Rule(
    "stamp",
    "stamped",
    STAMPED,
    needs={"trigger": read(*FINISHED), "sample": read("samples.sample")},
    files={"stamped": ".parquet"},
    attacks=("all",),
    log="stamp",
    methods={"attacks": "attack"},
    unit="draw",
)
_stamp_own = dataclasses.replace(
    _stamp,
    name="stamp_own",
    place=OWN_STAMPED,
    attacks=("architecture", "model"),
    script="stamp",
    stage="stamp",
)

# A clean model is trained on nothing but the training set.
_train = Rule(
    "train",
    "models",
    MODEL,
    needs={"train": read("datasets.train"), "poisoned": read("poisoned.poisoned")},
    files={"model": "/model.safetensors"},
    beside={"history": "/history.parquet", "card": "/card.json"},
    attacks=("none", "all", "architecture"),
    log="train",
    methods={"models": "architecture"},
    keeps_code=True,
    streams={"init": MODEL_AXES, "train": MODEL_AXES},
    unit="epoch",  # its disk is the job's
    gpu=True,
)
# The attack composes every batch; the trigger lies beside the model, as training has left it.
_train_controlled = dataclasses.replace(
    _train,
    name="train_controlled",
    needs={"train": read("datasets.train"), "trigger": read("triggers.trigger")},
    files={"model": "/model.safetensors", "trigger": "/trigger.safetensors"},
    attacks=("model",),
    methods={"models": "architecture", "attacks": "attack"},
    streams={"init": MODEL_AXES, "train": MODEL_AXES, "poisoner": MODEL_AXES},
    stage="train",
)

# No test image and no trigger among the inputs: the graph of jobs is the proof that no defense peeks. What
# a method may be given is decided by its folder.
_defend = Rule(
    "defend",
    "defended",
    SHARD,
    needs={
        "model": read("models.model"),
        "sample": read("samples.sample", given_to=("clean_data", "known_trigger")),
        "triggered_sample": read("stamped.stamped", given_to=("known_trigger",)),
    },
    files={"defended": ""},
    defenses=DEFENDED,
    log="shards",
    methods={"defenses": "defense"},
    keeps_code=True,
    streams={"defend": (*MODEL_AXES, "defense", "spc", "draw")},
    unit="draw",
    gpu=True,
    group="shard",
    temporary=True,
)

_evaluate = Rule(
    "evaluate",
    "metrics",
    SHARD,
    needs={
        "defended": read("defended.defended"),
        "test": read("datasets.test"),
        "triggered": read("triggered.triggered"),
    },
    files={"metrics": "/metrics.parquet", "predictions": "/predictions.parquet"},
    defenses=DEFENDED,
    # Adds to what defend has written. Were it a log of the rule, Snakemake would delete it first.
    log="shards",
    adds_to_log=True,
    unit="draw",
    gpu=True,
    group="shard",
)
_evaluate_untouched = Rule(
    "evaluate_untouched",
    "metrics",
    UNTOUCHED,
    needs={
        "model": read("models.model"),
        "test": read("datasets.test"),
        "triggered": read("triggered.triggered"),
    },
    files={"metrics": "/metrics.parquet", "predictions": "/predictions.parquet"},
    defenses=(NO_METHOD,),
    log="shards",
    keeps_code=True,
    unit="job",
    gpu=True,
)

# The trigger by itself, so that nobody takes for a backdoor what it does to any model. A job of its own: the
# attacked model is measured whatever becomes of the clean one.
_check_trigger = Rule(
    "check_trigger",
    "checks",
    MODEL,
    needs={
        "model": read("models.model"),
        "clean": read("models.model", clean=True),
        "test": read("datasets.test"),
        "trigger": read(*FINISHED),
        "triggered": read("triggered.triggered"),
    },
    files={"card": "/card.json"},
    attacks=("all", "architecture", "model"),
    log="checks",
    methods={"attacks": "attack"},
    stage="evaluate_untouched",  # as many images through as large a network
    unit="job",
    gpu=True,
)

# Those after the first two follow from them: each has a file of its own.
TABLES = ("cells", "models", *registry.names(registry.TABLES))

_aggregate = Rule(
    "aggregate",
    paths.TABLES,
    needs={
        "metrics": read("metrics.metrics", each="shard"),
        "models": read("models.card", each="model"),
        "triggers": read("triggers.card", each="model"),
        "poisoned": read("poisoned.card", each="model"),
        "triggered": read("triggered.card", each="model"),
        "checks": read("checks.card", each="model"),
    },
    files={name: f"/{name}.parquet" for name in TABLES},
    log="aggregate",
    parts=(registry.TABLES,),
    unit="thousand shards",
)

# Figures and tables beside the page, as `detrojan.analysis.report.report` writes them.
FIGURES = tuple(registry.names(registry.FIGURES))
LISTINGS = (
    *(f"{name}_{m}" for name in ("ranking", "comparisons", "heatmap") for m in ("der", "asr", "acc", "ra")),
    *("consistency", "protocol_effect", "tuning", "outcomes", "reasons", "models"),
)

_report = Rule(
    "report",
    "report",
    needs={name: read(f"{paths.TABLES}.{name}") for name in TABLES}
    | {
        "examples": read("triggered.examples", each="model"),
        "cards": read("datasets.card", each="model"),
    },
    files={
        "page": "/index.html",
        "figures": [f"/{paths.FIGURES}/{name}.svg" for name in FIGURES],
        "sheets": [f"/{paths.FIGURES}/triggers-{{dataset}}.svg"],
        "on_paper": [f"/{paths.FIGURES}/{name}.{kind}" for name in FIGURES for kind in ("png", "pdf")],
        "sheets_on_paper": [f"/{paths.FIGURES}/triggers-{{dataset}}.{kind}" for kind in ("png", "pdf")],
        "listings": [f"/{paths.TABLES}/{name}.{kind}" for name in LISTINGS for kind in ("csv", "tex")],
    },
    log="report",
    parts=(registry.FIGURES,),
    templates="analysis/report/page",
    unit="thousand shards",
    shown={"page": "Report", "figures": "Figures", "sheets": "Figures"},
)

_all = Rule(
    "all",
    needs={
        "cells": read(f"{paths.TABLES}.cells"),
        "models": read(f"{paths.TABLES}.models"),
        "summary": read(f"{paths.TABLES}.summary"),
        "page": read("report.page"),
    },
)

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        *(_dataset, _sample),
        *(_trigger, _trigger_against_model, _poison, _poison_own),
        *(_triggered, _triggered_own, _stamp, _stamp_own),
        *(_train, _train_controlled),
        *(_defend, _evaluate, _evaluate_untouched, _check_trigger),
        *(_aggregate, _report, _all),
    )
}


def known(rule: str) -> str:
    """Return the name that a rule has here: a workflow that uses ours may have put a prefix before it.

    Raises:
        KeyError: there is no such rule.
    """
    if rule in RULES:
        return rule
    ends = [name for name in RULES if rule.endswith(f"_{name}")]
    if not ends:
        raise KeyError(rule)
    return max(ends, key=len)


def grouped_with(rule: str) -> list[str]:
    """Return the names of the rules whose jobs run as one with those of ``rule`` on a cluster, itself too."""
    group = RULES[rule].group
    return [name for name, own in RULES.items() if name == rule or (group and own.group == group)]


def making(*folders: str) -> list[str]:
    """Return the names of the rules whose artifacts lie in ``folders``."""
    return [name for name, rule in RULES.items() if rule.folder in folders]


# --- jobs ------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """A job of the workflow; ``axes`` are those of its rule's wildcards, in that order."""

    rule: str
    axes: dict[str, Any]

    @property
    def key(self) -> tuple[Any, ...]:
        """What no other job has."""
        return (self.rule, *self.axes.values())

    def at(self, pattern: str) -> str:
        """Return ``pattern`` with the job's axes filled in."""
        return pattern.format(**{axis: value_text(value) for axis, value in self.axes.items()})

    def file(self, name: str) -> str:
        """Return the path of its output of this name."""
        return self.at(RULES[self.rule].pattern(name))

    @property
    def files(self) -> list[str]:
        """The paths of what it computes, without what lies beside that."""
        return [self.file(name) for name in RULES[self.rule].files]

    @property
    def log(self) -> str:
        """The path of its log."""
        return self.at(RULES[self.rule].log_pattern)


class Source(NamedTuple):
    """Where an input comes from: a rule, and the name of its output."""

    rule: str
    file: str


@functools.cache
def source(file: str, attack: str = NO_METHOD, defense: str = NO_METHOD) -> Source | None:
    """Return what makes ``FOLDER.FILE`` for an attack and a defense; None if nothing does."""
    folder, _, name = file.partition(".")
    for rule in RULES.values():
        if rule.folder == folder and name in rule.outputs and rule.serves(attack, defense):
            return Source(rule.name, name)
    return None


@functools.cache
def input_source(rule: str, need: str, attack: str = NO_METHOD, defense: str = NO_METHOD) -> Source | None:
    """Return what makes an input of a rule for an attack and a defense; None if it goes without."""
    wanted = RULES[rule].needs[need]
    if wanted.given_to and registry.threat_model("defenses", defense) not in wanted.given_to:
        return None
    of = NO_METHOD if wanted.clean else attack
    found = (source(file, of, defense) for file in wanted.files)
    return next(filter(None, found), None)


def input_pattern(rule: str, need: str, attack: str = NO_METHOD, defense: str = NO_METHOD) -> str | None:
    """Return the pattern of an input of a rule; arguments and None as for :func:`input_source`."""
    found = input_source(rule, need, attack, defense)
    if found is None:
        return None
    pattern = RULES[found.rule].pattern(found.file)
    if RULES[rule].needs[need].clean:
        return pattern.replace("{attack}", NO_METHOD).replace("{ratio}", "0")
    return pattern


def input_patterns(rule: str, need: str) -> set[str | None]:
    """Return all that :func:`input_pattern` may be for the attacks and defenses that a rule serves."""
    served = RULES[rule]
    attacks = served.attack_names if "attack" in served.axes else [NO_METHOD]
    defenses = registry.names("defenses") if "defense" in served.axes else [NO_METHOD]
    return {input_pattern(rule, need, attack, defense) for attack in attacks for defense in defenses}


def job_in(folder: str, axes: Mapping[str, Any]) -> Job:
    """Return the job whose artifact lies in a folder of results, for the cell that ``axes`` name.

    Raises:
        ValueError: the attack or the defense has none.
    """
    attack, defense = axes.get("attack", NO_METHOD), axes.get("defense", NO_METHOD)
    for name in making(folder):
        if RULES[name].serves(attack, defense):
            return job(name, axes)
    raise ValueError(f"nothing is made below {folder} for {axes_text(axes)}: name another artifact")


def job_of(file: str, axes: Mapping[str, Any]) -> Job | None:
    """Return the job that makes ``FOLDER.FILE`` for the cell that ``axes`` name; None if nothing does."""
    found = source(file, axes.get("attack", NO_METHOD), axes.get("defense", NO_METHOD))
    return found and job(found.rule, axes)


def job(rule: str, axes: Mapping[str, Any]) -> Job:
    """Return the job of a rule for the cell that ``axes`` name, or for a part of it."""
    return Job(rule, {axis: axes[axis] for axis in RULES[rule].axes})


def upstream(last: Job) -> Iterator[Job]:
    """Yield the jobs that make the inputs of ``last``; of those that are of the whole study, none."""
    attack, defense = last.axes.get("attack", NO_METHOD), last.axes.get("defense", NO_METHOD)
    for need, wanted in RULES[last.rule].needs.items():
        found = None if wanted.each else input_source(last.rule, need, attack, defense)
        if found:
            clean = {"attack": NO_METHOD, "ratio": 0.0} if wanted.clean else {}
            yield job(found.rule, last.axes | clean)


def steps(last: Job, known: set[tuple[Any, ...]] | None = None) -> Iterator[Job]:
    """Yield the jobs on the way to ``last``, each after those that it needs, once; then ``last``.

    Args:
        last: where they lead to.
        known: keys of the jobs to leave out, with what leads to them; those that were yielded are added.
    """
    known = set() if known is None else known
    if last.key not in known:
        known.add(last.key)
        for needed in upstream(last):
            yield from steps(needed, known)
        yield last


def study_jobs(need: Need, models: Iterable[Model], shards: Iterable[Shard]) -> Iterator[Job]:
    """Yield the jobs that make an input of each model or shard, once each."""
    (file,) = need.files
    each: Iterable[dict[str, Any]] = (
        (model._asdict() for model in models) if need.each == "model" else map(shard_axes, shards)
    )
    known = set()
    for axes in each:
        made = job_of(file, axes)
        if made and made.key not in known:
            known.add(made.key)
            yield made


def jobs(study: Study) -> Iterator[Job]:
    """Yield all jobs of a study that has not begun, each after those that it needs."""
    known: set[tuple[Any, ...]] = set()
    for rule in (rule for rule in RULES.values() if not rule.axes):
        for need in filter(lambda need: need.each, rule.needs.values()):
            for made in study_jobs(need, grid.models(study), grid.shards(study)):
                yield from steps(made, known)
        yield Job(rule.name, {})


def code_digest(rule: str, named: Mapping[str, str]) -> str:
    """Return the digest of all our code that a job runs.

    Args:
        rule: the job's.
        named: its axes; of ``dataset``, the ``source`` too, and of ``architecture`` the ``network`` if it
            has one. See :func:`methods_of`.

    Raises:
        ValueError: there is no such method.
    """
    own = RULES[rule]
    methods = [
        file for kind, axis in own.methods.items() for file in registry.sources(kind, _method(named, axis))
    ]
    methods += [registry.path(part, name) for part in own.parts for name in registry.names(part)]
    templates = sorted((registry.PACKAGE / own.templates).iterdir()) if own.templates else []
    script = SCRIPTS / f"{own.script or rule}.py"
    return provenance.code_digest(script, DETERMINISM, *methods, *templates)


def code_key(rule: str, named: Mapping[str, str]) -> str:
    """Return what jobs of one ``code_digest`` have in common: the rule, and the methods that it runs."""
    return "/".join([rule, *(_method(named, axis) for axis in RULES[rule].methods.values())])


def _method(named: Mapping[str, str], axis: str) -> str:
    return (named.get(registry.NETWORK) if axis == "architecture" else "") or named[axis]


def methods_of(study: Study, axes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``axes`` with what a study says of them: a data set's source, an architecture's network."""
    found = dict(axes)
    if axes.get("dataset"):
        found["source"] = study.datasets[axes["dataset"]].source
    if study.network(axes.get("architecture", "")):
        found[registry.NETWORK] = study.network(axes["architecture"])
    return found


def oldest_code(key: str, code: str) -> str:
    """Return the oldest code that is recorded to give the numbers of ``code``, itself if none is.

    Two codes are the same to whoever asks, the workflow too, if this is the same for both.

    Args:
        key: as ``code_key`` returns it.
        code: a digest, of today's code or of any other.
    """
    return equal_code.record().oldest(key, code)


def all_code(networks: Iterable[str] = ()) -> dict[str, str]:
    """Return the digests of all our code, by ``code_key``, and of ``networks`` of others."""
    found = {}
    for rule in (rule for rule in RULES.values() if rule.unit):
        known = [[*registry.names(kind), *(networks if kind == "models" else ())] for kind in rule.methods]
        for names in itertools.product(*known):
            named = dict(zip(rule.methods.values(), names, strict=True))
            found[code_key(rule.name, named)] = code_digest(rule.name, named)
    return found


# --- what is often asked for -----------------------------------------------------------------------


def shard_axes(shard: Shard) -> dict[str, Any]:
    """Return the axes of a shard."""
    return shard.axes | {"draws": shard.draws}


def shard_job(shard: Shard) -> Job:
    """Return the job that measures ``shard``."""
    axes = shard_axes(shard)
    return job("evaluate_untouched" if shard.defense == NO_METHOD else "evaluate", axes)


def model_job(model: Model) -> Job:
    """Return the job that trains ``model``."""
    return job("train_controlled" if owner(model.attack) == "model" else "train", model._asdict())


def of_model(model: Model) -> str:
    """Return the part of a path that names ``model``."""
    return Job("train", model._asdict()).at(MODEL)


def of_shard(shard: Shard) -> str:
    """Return the part of a path that names ``shard``."""
    return Job("evaluate", shard_axes(shard)).at(SHARD)


def metrics(shard: Shard) -> str:
    """Return the path of a shard's table of metrics."""
    return shard_job(shard).file("metrics")


def defended(shard: Shard) -> str:
    """Return the path of the folder that a shard's repaired models wait in to be evaluated."""
    return Job("defend", shard_axes(shard)).file("defended")


def model_card(model: Model) -> str:
    """Return the path of a model's card, which is there once it is trained."""
    # The rules that train have it in one place; so tables may name attacks that the code has not.
    return Job("train", model._asdict()).file("card")


def table(name: str, kind: str = "parquet") -> str:
    """Return the path of one of the study's tables, or of one that is kept beside them."""
    return paths.table(Path(RESULTS), name, kind).as_posix()


def below(results: Path, path: str) -> Path:
    """Return where a path of the workflow, ``results/...`` or ``logs/...``, lies.

    Args:
        results: the folder of results, whatever its name; logs lie beside it.
        path: as this module gives it.
    """
    first, _, rest = path.partition("/")
    return results / rest if first == RESULTS else results.parent / path


def find(results: Path, file: str) -> list[Path]:
    """Return all of ``FOLDER.FILE`` that lies in a folder of results, sorted by path."""
    folder, _, name = file.partition(".")
    ends = {Path(rule.pattern(name)).name for rule in RULES.values() if rule.folder == folder}
    return sorted(path for end in ends for path in (results / folder).rglob(end))


def streams(of: Job, draw: int | None = None) -> list[tuple[Any, ...]]:
    """Return the names of a job's random streams, see :mod:`detrojan.rng`.

    Args:
        of: the job.
        draw: which one's; ``DRAW`` stands for each of them if it is None, as ``LABEL`` does for labels.
    """
    values = of.axes if draw is None else of.axes | {"draw": draw}
    keyed = RULES[of.rule].streams.items()
    return [(name, *(values.get(axis, axis.upper()) for axis in axes)) for name, axes in keyed]


def parse(path: str) -> tuple[str, dict[str, str]] | None:
    """Return the folder that a path below the results leads to, and the wildcards that it names, or None."""
    folder, _, rest = path.partition("/")
    for rule in RULES.values():
        if rule.axes and rule.folder == folder:
            match = re.fullmatch(rf"{_expression(rule.place)}(\.parquet|/[^/]+)?", rest)
            if match:
                return folder, match.groupdict()
    return None


def placed(paths: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return for each path of the workflow, ``results/...`` below any folder, the axes that it names.

    Raises:
        ValueError: one is not the path of an artifact of a cell, or of a part of one.
    """
    found = {}
    for path in paths:
        parts = path.split("/")
        below = ("/".join(parts[at + 1 :]) for at, part in enumerate(parts) if part == RESULTS)
        named = next(filter(None, map(parse, below)), None)
        if named is None:
            raise ValueError(f"{path}: not where an artifact lies")
        found[path] = Cell.from_wildcards(named[1]).axes
    return found


def places(folder: str) -> list[str]:
    """Return the patterns of the places in a folder below the results, each once."""
    return list(dict.fromkeys(rule.place for rule in RULES.values() if rule.axes and rule.folder == folder))


def folders() -> list[str]:
    """Return the folders below the results that have a place a cell, each once."""
    return list(dict.fromkeys(rule.folder for rule in RULES.values() if rule.axes))


@functools.cache
def _expression(pattern: str) -> str:
    parts = string.Formatter().parse(pattern)
    # Names may be anything: some are of methods that the code has lost since.
    numbers = {axis: WILDCARDS[axis] for axis in ("ratio", "seed", "spc", "draws")}
    return "".join(
        re.escape(t) + (f"(?P<{f}>{numbers.get(f, '[^/]+')})" if f else "") for t, f, _, _ in parts
    )
