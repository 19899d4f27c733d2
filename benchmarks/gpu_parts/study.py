"""Part 3, a real study: the clean model and eight attacks on real images, then defenses on what took.

The stages are those of the workflow, in one process, with the settings of :func:`settings`. As many epochs
are trained as fit into a share of the time; the rows say how many. Part 4 adds cells to the same tables.
"""

import contextlib
import dataclasses
import io
import logging
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image

import scenes
from detrojan import registry
from detrojan import rng as streams
from detrojan.analysis.statistics import collect
from detrojan.attacks.base import Attack, LabelMode, Trigger
from detrojan.attacks.training_control.base import TrainingControlledAttack
from detrojan.cells import NO_METHOD, NO_SAMPLES, Draws, Model, Shard, untouched
from detrojan.errors import DivergedError
from detrojan.images import DefenderSample, ImageSet
from detrojan.labels import LabelMap
from detrojan.models.base import Classifier
from detrojan.stages import classifier, defend, evaluate, ingest, poisoning, sampling
from detrojan.storage import artifacts, records
from detrojan.storage.columns import METRICS
from detrojan.study.files import load_study
from detrojan.study.schema import Study
from detrojan.workflow import job_costs
from gpu_parts.bench import NO_TIME, Bench
from gpu_parts.budget import OutOfTimeError

logger = logging.getLogger(__name__)

PART, UNTOUCHED = "study", "models"
DATASETS = ("cifar10", "gtsrb")
TINY_PER_CLASS = 30
FIRST = "preactresnet18"
RATIO, SPC = 0.1, 10
TRAINING_SHARE = 0.5  # of the part's time; what is left is the defenses'
TRIGGERS_SHARE = 0.3  # of that, for triggers that are learned
LONGEST = 0.2  # of the part's time: a model that takes more is cut off
MOST_EPOCHS = 100
# What an epoch takes beside one without an attack, until it is measured: IAB's generators, two more look-ups.
SLOWER = {"iab": 2.0, "wanet": 1.3, "bpp": 1.3}
CODE = "benchmarks/gpu.py"  # in place of the digest of the code that a job was planned with
CONFIG = Path(__file__).parents[2] / "config"


def settings(bench: Bench, names: list[str]) -> Study:
    """Return the study that the rows belong to: data sets as shipped, triggers learned in seconds."""
    datasets: dict[str, Any] = {}
    for name in names:
        shipped = yaml.safe_load((CONFIG / f"{name}.yaml").read_text())["datasets"][name]
        datasets[name] = shipped | {"path": str(bench.data / name)}
        if bench.tiny:
            datasets[name] |= {"per_class": TINY_PER_CLASS, "held_out": 0.4}
    attacks: dict[str, Any] = {
        "iab": {"mask_epochs": 4, "mask_batch_size": 16, "max_images": 1500},
        "ssba": {
            "epochs": 8,
            "batch_size": 32,
            "lr": 5e-4,
            "free_steps": 200,
            "ramp_steps": 400,
            "max_images": 4000,
        },
        "lf": {"num_images": 50, "max_passes": 5},
    }
    training: dict[str, Any] = {"batch_size": 128, "lr": 0.05}
    defenses: dict[str, Any] = {}
    if bench.tiny:
        attacks = {name: registry.declared("attacks", name).constants["smoke"] for name in attacks}
        defenses = {
            name: registry.declared("defenses", name).constants["smoke"]
            for name in registry.names("defenses")
        }
        training = {"batch_size": 32, "lr": 0.05}
    return load_study(
        {
            "pool": "held_out",
            "datasets": datasets,
            "architectures": bench.architectures,
            "training": training,
            "attacks": attacks,
            "defenses": defenses,
            "grid": {
                "datasets": list(datasets),
                "architectures": list(bench.architectures),
                "attacks": [NO_METHOD, *registry.names("attacks")],
                "ratios": [RATIO],
                "defenses": [NO_METHOD, *registry.names("defenses")],
                "spc": [2, SPC, 100],
                "draws": ["0-9"],
            },
        }
    )


def _write_shards(folder: Path) -> None:
    """Write patterned images as the Hugging Face hub keeps data sets, for a trial of the check."""
    folder.mkdir()
    for split, per_class in (("train", TINY_PER_CLASS), ("test", 10)):
        images = scenes.Images().patterned(split, per_class)
        encoded = []
        for pixels in images.images.permute(0, 2, 3, 1).numpy():
            Image.fromarray(pixels).save(content := io.BytesIO(), format="PNG")
            encoded.append({"bytes": content.getvalue(), "path": None})
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        table = pa.table({"image": pa.array(encoded, kind), "label": images.labels.numpy()})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")


@dataclasses.dataclass(frozen=True)
class Splits:
    """The images of a data set, on the CPU."""

    train: ImageSet
    pool: ImageSet
    test: ImageSet

    @property
    def most_spc(self) -> int:
        """How many images of each class the pool has."""
        return int(torch.bincount(self.pool.labels, minlength=self.pool.num_classes).min())


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model, what backdoors it, and where its weights are."""

    name: Model
    path: Path
    attack: Attack | None
    trigger: Trigger
    triggered: ImageSet | None

    @property
    def model(self) -> Classifier:
        """The classifier, on the CPU."""
        return artifacts.read_model(self.path)


class Work:
    """The study at work: data, models, and the rows of both tables.

    Attributes:
        bench: the run of the check.
        study: the settings.
        splits: of each data set.
        trained: the models so far, in order.
        epochs: that each model is trained, by data set.
        rows: of ``METRICS``.
    """

    def __init__(self, bench: Bench, folder: Path) -> None:
        self.bench = bench
        self._folder = folder
        if bench.tiny and not bench.data:
            bench.data = folder
            _write_shards(folder / DATASETS[0])
        names = [name for name in DATASETS if bench.data and (bench.data / name).is_dir()]
        for name in sorted(set(DATASETS) - set(names)):
            bench.record.leave_out(PART, name, "--data names no folder that has one of this name")
        self.study = settings(bench, names) if names else None
        self.labels = LabelMap(0)
        self.splits = {name: self._read(name) for name in names}
        self.trained: dict[Model, Trained] = {}
        self.epochs: dict[str, int] = {}
        self.rows: list[dict[str, Any]] = []
        self._cards: dict[str, list[Path]] = {kind: [] for kind in ("models", *collect.BESIDE_MODELS)}
        self._samples: dict[tuple[str, int, int], DefenderSample] = {}

    def _read(self, name: str) -> Splits:
        dataset = self.study.datasets[name]
        source = registry.load("datasets", dataset.source, dataset.source_settings)
        train, pool, test = ingest.build(
            source, name=name, augmentation=dataset.augmentation, **dataset.options
        )
        return Splits(train, pool, test)

    # --- models -------------------------------------------------------------------------------------

    def train(self, name: Model, epochs: int) -> Trained:
        """Learn the trigger, poison, train, measure, and write the tables.

        Raises:
            DivergedError: the loss is not finite.
            ValueError: the attack can't poison so many of these images.
        """
        splits, folder = self.splits[name.dataset], self._folder / "-".join(map(str, name))
        folder.mkdir()
        cards: dict[str, dict[str, Any]] = {}
        train, attack, trigger = splits.train, None, {}
        control = None
        if name.attack != NO_METHOD:
            attack = registry.load(
                "attacks", name.attack, self.study.method("attacks", name.attack, name._asdict())
            )
            learned = self._learned(attack, name)
            cards["triggers"] = poisoning.trigger_card(attack, learned)
            trigger = {key: value.cpu() for key, value in learned.items()}
            if isinstance(attack, TrainingControlledAttack):
                control = attack.control(trigger, self.labels)
            else:
                rng = streams.stream("poison", name.dataset, name.seed)
                rows = poisoning.poison(attack, trigger, train, name.ratio, self.labels, rng=rng)
                cards["poisoned"] = poisoning.card(attack, rows, train)
                train = train.replaced(rows)
        optimization = self.study.optimization(name._asdict()) | {"epochs": epochs}
        trained = classifier.train(
            train,
            name,
            architecture=self.study.method("models", name.architecture, name._asdict()),
            optimization=optimization,
            code=CODE,
            folder=folder,
            device=self.bench.device,
            control=control,
        )
        trained.checkpoint.remove()
        path = folder / "model.safetensors"
        artifacts.write_model(trained.model, path)
        triggered = None
        if attack:
            trigger = trained.trigger or trigger
            triggered = poisoning.triggered_test(attack, trigger, splits.test, self.labels)
            cards["triggered"] = poisoning.triggered_card(attack, triggered, splits.test, self.labels)
            clean = self.trained.get(name._replace(attack=NO_METHOD, ratio=0.0))
            if clean:
                cards["checks"] = self._checked(trained.model, clean, attack, trigger, triggered, splits.test)
        cards["models"] = trained.card
        runs = evaluate.untouched_run(untouched(name), self.bench.device, CODE)
        rows, _ = evaluate.evaluate(runs, lambda draw: path, splits.test, triggered, self.bench.device)
        # Only now: a model that is cut off before has no row, and so no cards.
        self.bench.budget.let_finish()
        for kind, card in cards.items():
            self._note(kind, name, card)
        done = self.trained[name] = Trained(name, path, attack, trigger, triggered)
        self._add(rows)
        return done

    def _learned(self, attack: Attack, name: Model) -> Trigger:
        """Return the trigger, where it was learned."""
        clean = self.splits[name.dataset].train.to(self.bench.device)
        against = None
        if attack.against_model:
            of_clean = self.trained[name._replace(attack=NO_METHOD, ratio=0.0)]
            against = of_clean.model.place(self.bench.device)
        rng = streams.stream("trigger", name.dataset, name.attack, name.seed)
        return attack.learn_trigger(clean, against, target=self.labels.target, rng=rng)

    def _checked(
        self, model: Classifier, clean: Trained, attack: Attack, trigger: Trigger, *images: ImageSet
    ) -> dict[str, Any]:
        """Return what a trigger does where it should do nothing; ``images`` are triggered and clean ones."""
        device = self.bench.device
        return evaluate.check_trigger(
            model.place(device),
            clean.model.place(device),
            attack,
            {tensor: value.to(device) for tensor, value in trigger.items()},
            *(part.to(device) for part in images),
        )

    def _note(self, kind: str, name: Model, card: dict[str, Any]) -> None:
        path = self._folder / f"{kind}-{len(self._cards[kind])}.json"
        records.write_card(name._asdict() | card, path)
        self._cards[kind].append(path)

    # --- cells --------------------------------------------------------------------------------------

    def defend(self, model: Model, defense: str, spc: int, draw: int) -> dict[str, Any]:
        """Repair a model, measure what is left, write the tables; return the row."""
        trained = self.trained[model]
        settings = self.study.method("defenses", defense, model._asdict() | {"spc": spc})
        method = registry.load("defenses", defense, settings)
        data_free = registry.threat_model("defenses", defense) == "data_free"
        shard = Shard(model, defense, NO_SAMPLES if data_free else spc, Draws(draw, draw))
        samples = {} if data_free else {draw: self._given(trained, defense, spc, draw)}
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            place = trained.model.place(self.bench.device)
            runs = defend.run_shard(method, place, samples, shard, Path(folder), code=CODE)
            rows, _ = evaluate.evaluate(
                runs,
                lambda draw: Path(folder, f"draw-{draw}.safetensors"),
                self.splits[model.dataset].test,
                trained.triggered,
                self.bench.device,
            )
        self.bench.budget.let_finish()
        self._add(rows)
        return rows[0]

    def _given(self, trained: Trained, defense: str, spc: int, draw: int) -> DefenderSample:
        """Return the defender's sample, with triggered copies only for those who know the trigger."""
        key = (trained.name.dataset, spc, draw)
        if key not in self._samples:
            pool = self.splits[trained.name.dataset].pool
            self._samples[key] = sampling.draw_samples(pool, trained.name.dataset, spc, [draw])[draw]
        sample = dataclasses.replace(self._samples[key], chosen={})
        if registry.threat_model("defenses", defense) == "known_trigger" and trained.attack:
            stamped = poisoning.stamp(trained.attack, trained.trigger, {draw: sample})
            sample = dataclasses.replace(sample, triggered=stamped[draw])
        return sample

    # --- tables -------------------------------------------------------------------------------------

    def _add(self, rows: list[dict[str, Any]]) -> None:
        self.rows += rows
        metrics = self._folder / "metrics.parquet"
        records.write_rows(self.rows, metrics, METRICS)
        cells = collect.cells({metrics: {}})
        cards = {kind: {path: {} for path in paths} for kind, paths in self._cards.items()}
        models = collect.models(cells, cards["models"], cards, self.study.gate)
        tables = self.bench.record.folder / "tables"
        records.write_table(models, tables / "models.parquet", collect.MODELS)
        records.write_table(collect.completed(cells, models), tables / "cells.parquet", collect.CELLS)
        self.models = {Model(*(row[axis] for axis in Model._fields)): row for row in models.to_pylist()}

    def took(self) -> list[Model]:
        """Return the attacked models whose attack took, in the order in which they were trained."""
        return [name for name in self.trained if self.models[name]["attack_took"]]


@contextlib.contextmanager
def begun(bench: Bench) -> Iterator[Work]:
    """Yield the study, with its images read; what it keeps on disk is gone when the block ends."""
    with tempfile.TemporaryDirectory(prefix="detrojan-gpu-") as folder:
        yield Work(bench, Path(folder))


def run(work: Work) -> None:
    """Train the models, then defend those whose attack took, draw by draw."""
    bench = work.bench
    names = list(work.splits)
    if not names:
        return
    whole = bench.budget.left
    started = time.monotonic()
    for dataset in names:
        work.epochs[dataset] = 1
    if not _calibrate(work, whole):
        return
    bench.say("epochs: " + ", ".join(f"{name} {number}" for name, number in work.epochs.items()))
    attacks = [
        "badnets",
        "blended",
        *(a for a in registry.names("attacks") if a not in ("badnets", "blended")),
    ]
    wanted = [(dataset, attack) for attack in [NO_METHOD, *attacks] for dataset in names]
    for dataset, attack in wanted:
        model = _model(work, dataset, attack)
        if model is None:
            continue
        limit = min(LONGEST * whole, max(0.0, 1.5 * TRAINING_SHARE * whole - (time.monotonic() - started)))
        train(work, model, work.epochs[dataset], limit)
    models = work.took()[: 1 if bench.tiny else None]
    defend_all(
        work, PART, ((model, SPC, draw) for draw in range(1 if bench.tiny else 10) for model in models)
    )


def _model(work: Work, dataset: str, attack: str) -> Model | None:
    """Return the model's name, with a ratio that is possible; None if none is worth it."""
    if attack == NO_METHOD:
        return Model(dataset, FIRST, attack, 0.0, 0)
    ratio = RATIO
    if registry.declared("attacks", attack).constants["label_mode"].endswith(LabelMode.CLEAN_LABEL.name):
        train = work.splits[dataset].train
        ratio = min(ratio, math.floor(1000 * float((train.labels == 0).double().mean())) / 1000)
        if ratio < 0.01:
            reason = f"class 0 is {ratio:.1%} of the training images, and no other may be poisoned"
            work.bench.record.leave_out(PART, f"{attack} on {dataset}", reason)
            return None
    return Model(dataset, FIRST, attack, ratio, 0)


def _calibrate(work: Work, whole: float) -> bool:
    """Choose the epochs by the time that one takes; return whether there was time for that."""
    try:
        with work.bench.budget.limited(), tempfile.TemporaryDirectory() as folder:
            seconds = {}
            for dataset, splits in work.splits.items():
                model = Model(dataset, FIRST, NO_METHOD, 0.0, 0)
                optimization = work.study.optimization(model._asdict()) | {"epochs": 2}
                trained = classifier.train(
                    splits.train,
                    model,
                    architecture=work.study.method("models", FIRST, model._asdict()),
                    optimization=optimization,
                    code=CODE,
                    folder=Path(folder),
                    device=work.bench.device,
                )
                trained.checkpoint.remove()
                seconds[dataset] = trained.history[-1]["seconds"]  # the first warms up
    except OutOfTimeError:
        work.bench.record.leave_out(PART, "all models", NO_TIME)
        return False
    epoch = sum(seconds.values()) * sum(
        SLOWER.get(name, 1.0) for name in [NO_METHOD, *registry.names("attacks")]
    )
    epochs = math.floor(TRAINING_SHARE * (1 - TRIGGERS_SHARE) * whole / epoch)
    work.epochs = dict.fromkeys(seconds, max(1, min(MOST_EPOCHS, 2 if work.bench.tiny else epochs)))
    return True


def train(work: Work, model: Model, epochs: int, limit: float) -> Trained | None:
    """Train a model within ``limit`` seconds and record what it does; None if it can't be had."""
    bench, what = work.bench, f"{model.attack} on {model.dataset}, {model.architecture}"
    try:
        with bench.budget.limited(limit):
            trained = work.train(model, epochs)
    except OutOfTimeError:
        bench.record.leave_out(
            UNTOUCHED, what, f"not done after {max(limit, 0):.0f} s" if limit > 1 else NO_TIME
        )
        return None
    except (ValueError, DivergedError, KeyError) as error:
        bench.record.leave_out(UNTOUCHED, what, " ".join(str(error).split()))
        return None
    row = work.models[model]
    kept = ("acc", "asr", "ra", "attack_took", "epochs", "images_per_second", "seconds", "peak_memory_bytes")
    bench.record.add(UNTOUCHED, model._asdict() | {name: row[name] for name in kept})
    return trained


def defend_all(work: Work, part: str, wanted: Iterator[tuple[Model, int, int]]) -> None:
    """Run every defense on each of the models, SPC and draws that are wanted, cheap ones first."""
    bench = work.bench
    for model, spc, draw in wanted:
        for defense in _by_cost(model, spc):
            free = registry.threat_model("defenses", defense) == "data_free"
            if (free and any(r["defense"] == defense and _of(r) == model for r in work.rows)) or (
                free and draw
            ):
                continue
            what = (
                f"{defense} on {model.attack}, {model.dataset}, {model.architecture}, spc {spc}, draw {draw}"
            )
            if spc > work.splits[model.dataset].most_spc:
                bench.record.leave_out(part, what, f"{model.dataset} has too few images of a class")
                continue
            try:
                with bench.budget.limited():
                    row = work.defend(model, defense, spc, draw)
            except OutOfTimeError:
                bench.record.leave_out(part, what, NO_TIME)
                if draw:  # further draws go without saying
                    return
                continue
            except Exception as error:  # a bug; the others go on
                logger.exception("%s", what)
                bench.record.leave_out(part, what, f"{type(error).__name__}: {error}".splitlines()[0])
                continue
            kept = ("defense", "spc", "draw", "status", "reason", "acc", "asr", "ra", "seconds")
            bench.record.add(
                part,
                model._asdict() | {name: row[name] for name in kept} | {"memory": row["peak_memory_bytes"]},
            )


def _of(row: dict[str, Any]) -> Model:
    return Model(*(row[axis] for axis in Model._fields))


def _by_cost(model: Model, spc: int) -> list[str]:
    axes = model._asdict() | {"spc": spc}
    return sorted(
        registry.names("defenses"),
        key=lambda name: job_costs.default().estimate("defend", axes | {"defense": name}).seconds,
    )
