"""Holds shorter searches for triggers against the full one: flagged classes, index, norm and hits.

    python benchmarks/search_pilot.py run --folder pilot --data gtsrb=DATA/gtsrb   # resumes where it stopped
    python benchmarks/search_pilot.py compare --folder pilot

A shorter search is worth its name if it accuses the classes that the full one accuses. Whoever shortens it
must ask it on a model that is half repaired, too: there a mask is caught in another minimum more easily, and
every easy model agrees with everything. So each model comes twice: as it was trained, and after a round of
pruning and tuning against the trigger that was found in it. The control is the full search with another
sample: what differs between those two, no schedule can be blamed for.

``run`` writes a line of JSON a search into ``searches.jsonl``, and keeps its models beside it. ``compare``
prints a line a search, with the full search of the same model and sample.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from detrojan import models, registry
from detrojan import rng as streams
from detrojan.defenses._parts.inversion import TriggerInversion, Triggers, anomaly_index
from detrojan.images import DefenderSample, ImageSet
from detrojan.labels import LabelMap
from detrojan.learning import inference, training
from detrojan.learning.meter import meter
from detrojan.settings import Augmentation, Optimization
from detrojan.stages import ingest, poisoning, sampling
from detrojan.storage import artifacts

LABELS = LabelMap(0)
FULL = "full"
FASTER = {"weight_patience": 3, "inversion_epochs": 53, "min_steps": 212}
TOO_FAST = {"weight_patience": 2, "inversion_epochs": 40, "min_steps": 160}
FEWER_IMAGES = 0.256  # 256 for 1,000
# What may be shortened, and one schedule that is too fast: a pilot that passes it shows nothing.
SCHEDULES = (FULL, "fewer", "faster", "both", "too_fast")


class Images(NamedTuple):
    """A data set of the pilot, and how a small network learns it."""

    side: int
    width: int
    epochs: int
    batch_size: int
    spc: int
    searched: int  # images of a full search

    def settings(self, schedule: str) -> dict[str, int]:
        """Return the settings of a search; a step takes a quarter of its images."""
        count = self.searched * (FEWER_IMAGES if schedule in ("fewer", "both") else 1)
        settings = {"max_images": round(count), "inversion_batch_size": max(2, round(count / 4))}
        if schedule in ("faster", "both"):
            settings |= FASTER
        return settings | (TOO_FAST if schedule == "too_fast" else {})


# Some images a class, as 1,000 are of 200 classes: 5, or 3 where one core would take too long.
DATASETS = {
    "digits": Images(16, 8, 10, 32, 10, 50),
    "gtsrb": Images(16, 4, 16, 64, 8, 129),
    "cifar10": Images(32, 8, 12, 64, 10, 50),
    "tiny_imagenet": Images(64, 16, 12, 64, 10, 1000),
}
ATTACKS = {"badnets": 0.1, "blended": 0.1, "none": 0.0}
AS_IT_WAS, HALF_REPAIRED = "as it was", "half repaired"


class Bed(NamedTuple):
    """A model to search, by data set, attack and whether it is half repaired."""

    dataset: str
    attack: str
    state: str

    @property
    def file(self) -> str:
        """The name of the file that keeps it."""
        return f"{self.dataset}-{self.attack}-{self.state.replace(' ', '_')}.safetensors"


@dataclasses.dataclass
class Scene:
    """The images of a data set, and what makes models of them."""

    name: str
    train: ImageSet
    pool: ImageSet
    test: ImageSet

    @classmethod
    def read(cls, name: str, data: Mapping[str, Path]) -> "Scene":
        """Return a data set, ``digits`` or shards in a folder."""
        images = DATASETS[name]
        source = "digits" if name == "digits" else "huggingface_parquet"
        settings = {} if name == "digits" else {"path": data[name]}
        splits = ingest.build(
            registry.load("datasets", source, settings),
            name=name,
            side=images.side,
            held_out=0.0,
            classes=None,
            per_class=None,
            augmentation=Augmentation(crop_padding=1),
            mean=None,
            std=None,
            overlap="allowed",
        )
        train, _, test = splits
        return cls(name, train, train, test)

    def sample(self, draw: int) -> DefenderSample:
        """Return the defender's images."""
        return sampling.draw_samples(self.pool, self.name, DATASETS[self.name].spc, [draw])[draw]

    def trained(self, attack: str) -> models.Classifier:
        """Return a model that has learned the images, and a backdoor if there is an attack."""
        images = DATASETS[self.name]
        train = self.train
        if attack != "none":
            method = registry.load("attacks", attack)
            trigger = method.learn_trigger(train, rng=streams.stream("pilot trigger", self.name))
            rows = poisoning.poison(
                method, trigger, train, ATTACKS[attack], LABELS, rng=streams.stream("pilot poison", self.name)
            )
            train = train.replaced(rows)
        info = train.info
        build = models.Build(
            "preactresnet18", {"width": images.width}, train.num_classes, info.mean, info.std
        )
        with streams.global_stream(streams.stream("pilot model", self.name)):
            model = models.build(build)
        optimization = Optimization(epochs=images.epochs, batch_size=images.batch_size, lr=0.05)
        training.fit(
            model,
            train,
            optimization,
            rng=streams.stream("pilot training", self.name, attack),
            augmentation=info.augmentation,
        )
        return model.eval()

    def repaired(self, model: models.Classifier) -> models.Classifier:
        """Return a model after a round of pruning and tuning, on a sample that no search meets."""
        method = registry.load(
            "defenses", "grad_prune_inverted", {"max_inversions": 1, "max_epochs": 5, "max_images": 40}
        )
        repaired = method(model, self.sample(100), rng=streams.stream("pilot repair", self.name))
        assert isinstance(repaired, models.Classifier)
        return repaired

    def rates(self, model: models.Classifier, attack: str) -> dict[str, float]:
        """Return ACC, and ASR if there is an attack."""
        rates = {"acc": inference.num_right(model, self.test) / len(self.test)}
        if attack != "none":
            method = registry.load("attacks", attack)
            trigger = method.learn_trigger(self.train, rng=streams.stream("pilot trigger", self.name))
            stamped = poisoning.triggered_test(method, trigger, self.test, LABELS)
            rates["asr"] = inference.num_right(model, stamped) / len(stamped)
        return rates

    def hits(self, model: models.Classifier, triggers: Triggers) -> float:
        """Return the share of test images of other classes that the target's trigger sends to it."""
        others = self.test[self.test.labels != LABELS.target]
        stamped = triggers.stamp(others, LABELS.target)
        wanted = dataclasses.replace(stamped, labels=torch.full_like(stamped.labels, LABELS.target))
        return inference.num_right(model, wanted) / len(wanted)


def models_of(scene: Scene, attack: str, folder: Path) -> Iterator[tuple[Bed, models.Classifier]]:
    """Yield a model as it was trained, then half repaired; both are kept in ``folder``."""
    model = None
    for state in (AS_IT_WAS, HALF_REPAIRED):
        bed = Bed(scene.name, attack, state)
        file = folder / bed.file
        if not file.exists():
            model = scene.trained(attack) if model is None else scene.repaired(model)
            artifacts.write_model(model, file)
        model = artifacts.read_model(file).eval()
        yield bed, model


def search(scene: Scene, bed: Bed, model: models.Classifier, schedule: str, draw: int) -> dict[str, Any]:
    """Return what a search finds, as plain values."""
    settings = TriggerInversion(**DATASETS[scene.name].settings(schedule))
    stream = streams.stream("pilot search", scene.name, draw)  # the same batches for every schedule
    with meter(torch.device("cpu")) as cost:
        triggers = settings.invert(model, scene.sample(draw).everything, rng=stream)
    index = anomaly_index(triggers.norms)
    return {
        **bed._asdict(),
        "schedule": schedule,
        "draw": draw,
        "images": triggers.num_images,
        "steps": triggers.num_steps,
        "passes": cost.forward_passes,
        "seconds": round(cost.seconds, 1),
        "flagged": triggers.flagged(settings.anomaly_threshold),
        "index": round(float(index[LABELS.target]), 2),
        "norm": round(float(triggers.norms[LABELS.target]), 2),
        "hits": round(scene.hits(model, triggers), 3),
        "norms": [round(norm, 2) for norm in triggers.norms.tolist()],
        **scene.rates(model, bed.attack),
    }


def run(arguments: argparse.Namespace) -> None:
    """Search every model with every schedule that has no line yet, until time is up."""
    torch.set_num_threads(1)
    ends = time.monotonic() + 60 * arguments.minutes
    arguments.folder.mkdir(parents=True, exist_ok=True)
    lines = arguments.folder / "searches.jsonl"
    done = {_name(row) for row in read(lines)}
    for dataset in arguments.datasets:
        scene = Scene.read(dataset, dict(arguments.data))
        for attack in arguments.attacks:
            for bed, model in models_of(scene, attack, arguments.folder):
                for draw in range(arguments.draws):
                    for schedule in arguments.schedules:
                        name = (*bed, schedule, draw)
                        if name in done or time.monotonic() > ends:
                            continue
                        row = search(scene, bed, model, schedule, draw)
                        with lines.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(row) + "\n")


def read(lines: Path) -> list[dict[str, Any]]:
    """Return the searches of a file; none if there is no file."""
    if not lines.exists():
        return []
    return [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]


def _name(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in (*Bed._fields, "schedule", "draw"))


def jaccard(some: list[int], others: list[int]) -> float:
    """Return the share of the classes of either list that both have; 1 where both are empty."""
    union = {*some, *others}
    return len({*some} & {*others}) / len(union) if union else 1.0


def equal(row: Mapping[str, Any], full: Mapping[str, Any]) -> bool:
    """Return whether a search says of the target what the full one says, in verdict, norm and hits.

    Where neither flags it, its mask is a trigger of nothing, and only the verdict counts.
    """
    target = LABELS.target
    if (target in row["flagged"]) != (target in full["flagged"]):
        return False
    if target not in full["flagged"]:
        return True
    return abs(row["norm"] / full["norm"] - 1) <= 0.25 and abs(row["hits"] - full["hits"]) <= 0.03


def compare(arguments: argparse.Namespace) -> None:
    """Print every search beside the full one of the same model and sample."""
    rows = read(arguments.folder / "searches.jsonl")
    full = {_name(row): row for row in rows if row["schedule"] == FULL}
    print(
        f"{'model':<34} {'ASR':>5} {'draw':>4} {'schedule':<9} {'passes':>9} {'flagged':<18} {'index':>6} "
        f"{'norm':>7} {'hits':>5} {'Jaccard':>7} equal"
    )
    for row in rows:
        model = f"{row['dataset']} {row['attack']} {row['state']}"
        beside = full.get((*(row[key] for key in Bed._fields), FULL, row["draw"]))
        again = full.get((*(row[key] for key in Bed._fields), FULL, 0))
        # The full search itself stands beside that of the first sample: the control.
        other = again if row["schedule"] == FULL else beside
        shown = f"{jaccard(row['flagged'], other['flagged']):7.2f} {equal(row, other)}" if other else ""
        print(
            f"{model:<34} {row.get('asr', float('nan')):5.2f} {row['draw']:4} {row['schedule']:<9} "
            f"{row['passes']:9,} {row['flagged']!s:<18} {row['index']:6.2f} {row['norm']:7.2f} "
            f"{row['hits']:5.2f} {shown}"
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run", help=(run.__doc__ or "").splitlines()[0])
    runs.set_defaults(does=run)
    runs.add_argument("--data", type=_place, nargs="*", default=[], metavar="NAME=FOLDER")
    runs.add_argument("--datasets", nargs="+", default=["digits"], choices=DATASETS)
    runs.add_argument("--attacks", nargs="+", default=[*ATTACKS], choices=ATTACKS)
    runs.add_argument("--schedules", nargs="+", default=[*SCHEDULES], choices=SCHEDULES)
    runs.add_argument("--draws", type=int, default=1, help="samples that each model is searched with")
    runs.add_argument("--minutes", type=float, default=25, help="begin no search after so many")
    shows = commands.add_parser("compare", help=(compare.__doc__ or "").splitlines()[0])
    shows.set_defaults(does=compare)
    for command in (runs, shows):
        command.add_argument("--folder", type=Path, required=True, help="of models and lines")
    return parser.parse_args()


def _place(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    return name, Path(folder)


if __name__ == "__main__":
    arguments = _arguments()
    arguments.does(arguments)
