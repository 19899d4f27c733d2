"""What benchmarks train and defend that need no data: patterned images, and a backdoored model of them."""

import copy
import dataclasses
import functools
import json
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from detrojan import models, registry
from detrojan import rng as streams
from detrojan.images import DatasetInfo, DefenderSample, ImageSet, empty, to_uint8
from detrojan.labels import LabelMap
from detrojan.learning import inference, training
from detrojan.models.base import Classifier
from detrojan.settings import NO_AUGMENTATION, Augmentation, Optimization
from detrojan.stages import poisoning, sampling

LABELS = LabelMap(0)
RGB = tuple[float, float, float]


class Images(NamedTuple):
    """How large the images are, and of how many classes."""

    side: int = 32
    classes: int = 10

    def patterned(self, part: str, per_class: int, augmentation: Augmentation = NO_AUGMENTATION) -> ImageSet:
        """Return noise around a blurred pattern of each class; all parts have the same patterns."""
        side, count = self.side, self.classes
        info = DatasetInfo(side, side, tuple(map(str, range(count))), (0.5,) * 3, (0.25,) * 3, augmentation)
        patterns = torch.rand(count, 3, 4, 4, generator=streams.stream("benchmark patterns"))
        patterns = F.interpolate(patterns, size=(side, side), mode="bilinear")
        labels = torch.arange(count).repeat(per_class)
        noise = torch.randn(len(labels), 3, side, side, generator=streams.stream("benchmark", part))
        pixels = to_uint8(0.3 + 0.35 * patterns[labels] + 0.1 * noise)
        return ImageSet.clean(pixels, labels, torch.arange(len(labels)), info)


def fresh_model(architecture: str, settings: dict[str, Any], images: ImageSet) -> Classifier:
    """Return an untrained classifier of ``images``, on their device; equal calls give equal weights."""
    info = images.info
    # As text, which can be looked up: to draw the weights of the large networks anew takes seconds.
    model = _drawn(architecture, json.dumps(settings), images.num_classes, info.mean, info.std)
    return copy.deepcopy(model).place(images.device)


@functools.lru_cache(maxsize=4)
def _drawn(architecture: str, settings: str, num_classes: int, mean: RGB, std: RGB) -> Classifier:
    build = models.Build(architecture, json.loads(settings), num_classes, mean, std)
    with streams.global_stream(streams.stream("benchmark model")):
        return models.build(build)


@dataclasses.dataclass
class Scene:
    """A backdoored model on the device, and what a defender may hold.

    Attributes:
        model: the classifier.
        sample: the defender's images, with triggered copies, on the CPU.
        acc, asr: of the untouched model, in [0, 1].
    """

    model: Classifier
    sample: DefenderSample
    acc: float
    asr: float

    def given(self, defense: str) -> DefenderSample:
        """Return what a defense's threat model allows it, on the device, with nothing noted yet."""
        threat_model = registry.threat_model("defenses", defense)
        if threat_model == "data_free":
            nothing = empty(self.sample.train.num_classes)
            return DefenderSample(nothing, nothing)
        triggered = self.sample.triggered if threat_model == "known_trigger" else None
        device = next(self.model.parameters()).device
        return dataclasses.replace(self.sample, triggered=triggered, chosen={}).to(device)


def backdoored(
    architecture: str,
    settings: dict[str, Any],
    images: Images,
    device: torch.device,
    *,
    spc: int,
    per_class: int = 100,
    epochs: int = 5,
    batch_size: int = 32,
) -> Scene:
    """Train a classifier with a backdoor, in seconds, and draw the defender's sample.

    Args:
        architecture: file name in ``models/``.
        settings: of the architecture, where they differ from its defaults.
        images: their size.
        device: to train on.
        spc: clean samples per class that the defender holds.
        per_class: training images of each class.
        epochs: passes over them.
        batch_size: images a step.
    """
    train, pool, test = (
        images.patterned(part, count) for part, count in (("train", per_class), ("pool", spc), ("test", 20))
    )
    attack = registry.load("attacks", "badnets", {"side": 8})  # a small patch takes longer to be learned
    trigger = attack.learn_trigger(train, rng=streams.stream("benchmark trigger"))
    rows = poisoning.poison(attack, trigger, train, 0.1, LABELS, rng=streams.stream("benchmark poison"))
    poisoned = train.replaced(rows).to(device)
    model = fresh_model(architecture, settings, poisoned)
    optimization = Optimization(epochs=epochs, batch_size=batch_size, lr=0.05)
    training.fit(model, poisoned, optimization, rng=streams.stream("benchmark training"))
    samples = sampling.draw_samples(pool, "benchmark", spc, [0])
    sample = dataclasses.replace(samples[0], triggered=poisoning.stamp(attack, trigger, samples)[0])
    stamped = poisoning.triggered_test(attack, trigger, test, LABELS)
    acc, asr = (inference.evaluate(model, shown.to(device))[0] for shown in (test, stamped))
    return Scene(model, sample, acc, asr)
