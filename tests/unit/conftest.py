"""Backdoored classifiers: one made by hand, whose every weight is known, and those that were trained."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detrojan import models, registry, rng
from detrojan.images import DatasetInfo, DefenderSample, ImageSet, TriggeredSample, to_float
from detrojan.labels import LabelMap
from detrojan.learning import inference, metrics
from detrojan.settings import NO_AUGMENTATION, Augmentation
from detrojan.stages import ingest, poisoning, sampling
from detrojan.storage import artifacts

SIDE = 8

# Trained models, which `python -m tests.unit.backdoored` made: where in so small a network a backdoor ends
# up, and what then removes it, depends on the seed, and on how the processor rounds.
KEPT = {
    name: Path(__file__).with_name(f"backdoored-{name}.safetensors") for name in ("badnets", "blended", "bpp")
}
SETTINGS = {"bpp": {"levels": 3}}  # digits have 17 grey levels; of 8 they show nothing


class Planted(nn.Module):
    """Two classes: filter 0 sees brightness, filter 1 the trigger alone, filters 2 and 3 nothing.

    Bright images are class 1, dark ones class 0; a white corner pixel outvotes brightness for class 0.
    """

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 2)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.bias.zero_()
            self.conv.weight[0, 0] = 1.0  # red: what the images show
            self.conv.weight[1, 1] = 1.0  # green: the trigger
            self.conv.weight[2:, 2] = 0.01
            self.linear.weight.zero_()
            self.linear.weight[1, 0], self.linear.weight[0, 0] = 4.0, -4.0
            self.linear.weight[0, 1] = 100.0
            self.linear.bias.copy_(torch.tensor([2.0, -2.0]))

    def forward(self, images):
        return self.linear(F.relu(self.bn(self.conv(images))).mean((2, 3)))


@pytest.fixture
def planted():
    build = models.Build("planted", {}, 2, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return models.Classifier(Planted(), build).eval()


@pytest.fixture
def planted_sample():
    """Return dark and bright red images, and copies whose corner is green."""
    info = DatasetInfo(SIDE, SIDE, ("dark", "bright"), (0.0,) * 3, (1.0,) * 3, NO_AUGMENTATION)

    def split(count, first):
        labels = torch.arange(count) % 2
        images = torch.zeros(count, 3, SIDE, SIDE, dtype=torch.uint8)
        images[:, 0] = (labels * 255).view(-1, 1, 1).to(torch.uint8)
        index = torch.arange(first, first + count)
        stamped = images.clone()
        stamped[:, 1, -3:, -3:] = 255
        return ImageSet.clean(images, labels, index, info), ImageSet.clean(stamped, labels, index, info)

    train, stamped_train = split(16, 0)
    validation, stamped_validation = split(8, 16)
    return DefenderSample(train, validation, TriggeredSample(stamped_train, stamped_validation))


@pytest.fixture
def red_images():
    """Return a function that makes images of noise, every second one of them red."""
    info = DatasetInfo(SIDE, SIDE, ("dark", "red"), (0.0,) * 3, (1.0,) * 3, NO_AUGMENTATION)

    def make(count, name):
        labels = torch.arange(count) % 2
        pixels = torch.randint(40, (count, 3, SIDE, SIDE), generator=rng.stream(name))
        pixels[:, 0] += (200 * labels).view(-1, 1, 1)
        return ImageSet.clean(pixels.to(torch.uint8), labels, torch.arange(count), info)

    return make


@pytest.fixture
def red_sample(red_images):
    return DefenderSample(red_images(32, "train"), red_images(16, "validation"))


@pytest.fixture
def red_or_green(planted, red_images):
    """Return a function that makes a model of two channels that count, and two that don't.

    Channel 0 sees red, what the images show, and votes for class 1; channel 1 green, which idles on
    clean images, and votes for class 0. Its running statistics are those of clean images.
    """

    def make(*, red, green, bias):
        network = planted.network
        with torch.no_grad():
            network.linear.weight.zero_()
            network.linear.weight[1, 0] = red
            network.linear.weight[0, 1] = green
            network.linear.bias.copy_(torch.tensor([bias, 0.0]))
            network.bn.momentum = 1.0
            planted.train()(to_float(red_images(256, "statistics").images))
        network.bn.momentum = 0.1
        return planted.eval()

    return make


def share(model, images, labels):
    """Return the share of ``images``, uint8 (N, 3, H, W), that ``model`` gives ``labels``, one or (N,)."""
    with torch.inference_mode():
        return float((model(to_float(images)).argmax(1) == labels).double().mean())


@pytest.fixture
def sample(toy_images):
    return sampling.draw_samples(toy_images(count=48), "toy", 10, [0])[0]


def digits():
    """Return digits of 16×16 pixels: training, pool, test."""
    return ingest.build(
        registry.load("datasets", "digits"),
        name="digits",
        side=16,
        held_out=0.2,
        classes=None,
        per_class=None,
        augmentation=Augmentation(crop_padding=1),
        mean=None,
        std=None,
    )


def attack_on(train, name):
    """Return an attack and its trigger for a training set."""
    attack = registry.load("attacks", name, SETTINGS.get(name, {}))
    return attack, attack.learn_trigger(train, rng=rng.stream("trigger"))


def poisoned_rows(train, attack, trigger):
    return poisoning.poison(attack, trigger, train, 0.15, LabelMap(0), rng=rng.stream("poison"))


@dataclasses.dataclass
class Backdoored:
    """A backdoored classifier of digits, 16×16 pixels, and what is around it.

    Attributes:
        model: one of ``KEPT``: a PreAct-ResNet-18 of width 8 to which an attack has given a backdoor to
            class 0.
        sample: 10 images a class that it was not trained on, 9 for training and 1 for validation,
            with triggered copies, which only methods that know the trigger may use.
        test: clean test images.
        triggered: triggered test images whose true class is not 0; ``labels`` are 0.
    """

    model: models.Classifier
    sample: DefenderSample
    test: ImageSet
    triggered: ImageSet

    def rates(self, model):
        """Return ACC, ASR and RA of ``model``."""
        clean, stamped = (inference.logits(model, s).argmax(1) for s in (self.test, self.triggered))
        return (
            metrics.accuracy(clean, self.test.labels),
            metrics.accuracy(stamped, self.triggered.labels),
            metrics.accuracy(stamped, self.triggered.true_labels),
        )


def kept_backdoor(name="badnets"):
    """Return the classifier that an attack was given to, and what is around it."""
    train, pool, test = digits()
    attack, trigger = attack_on(train, name)
    model = artifacts.read_model(KEPT[name]).float()
    (sample,) = sampling.draw_samples(pool, "digits", 10, [0]).values()
    stamped = poisoning.stamp(attack, trigger, {0: sample})[0]
    triggered = poisoning.triggered_test(attack, trigger, test, LabelMap(0))
    return Backdoored(model, dataclasses.replace(sample, triggered=stamped), test, triggered)


@pytest.fixture(scope="session")
def trained_backdoor():
    return kept_backdoor()


@pytest.fixture
def backdoored(trained_backdoor):
    """Return the trained classifier, its sample with a fresh record of what a method chose."""
    sample = dataclasses.replace(trained_backdoor.sample, chosen={})
    return dataclasses.replace(trained_backdoor, sample=sample)
