"""Optimizer steps of the methods that prune or bound channels, under both protocols, for nine sizes.

They are worked out by hand from the batches that the loader makes; loops that are long are only counted.
"""

import pytest
import torch
from torch import nn

from detrojan import models, registry, rng
from detrojan.defenses.clean_data.awn import AWN
from detrojan.images import Batch, DatasetInfo, DefenderSample, ImageSet, Loader, num_batches
from detrojan.learning import meter, training
from detrojan.settings import NO_AUGMENTATION
from detrojan.stages.sampling import num_validation
from detrojan.study import protocols

SIZES = [(classes, spc) for classes in (10, 43, 200) for spc in (2, 10, 100)]
STEPS = {
    "fp/survey": [100, 100, 400, 100, 200, 1600, 100, 800, 7100],
    "fp/paper": [1000, 1000, 1000, 1000, 1000, 1600, 1000, 1000, 7100],
    "awn/survey": [20, 20, 80, 20, 40, 340, 40, 160, 1580],
    "awn/paper": [300, 300, 700, 300, 300, 3300, 300, 1500, 15600],
    # Ascent and recovery.
    "rnp/survey": [20 + 20, 20 + 20, 80 + 80, 20 + 20, 40 + 40, 340 + 340, 40 + 40, 160 + 160, 1580 + 1580],
    "rnp/paper": [84 + 80, 84 + 80, 168 + 160, 84 + 80, 84 + 80, 714 + 680, 84 + 80, 336 + 320, 3297 + 3140],
    "mm_bd/survey": [50, 50, 200, 50, 100, 850, 100, 400, 3950],
    "mm_bd/paper": [150, 150, 250, 150, 150, 1100, 150, 500, 5000],
    "nft/survey": [100, 100, 400, 100, 200, 1700, 200, 800, 7900],
    "nft/paper": [1000, 1000, 1000, 1000, 1000, 1020, 1000, 1008, 1099],
    "bnp/survey": [0] * 9,
    "bnp/paper": [0] * 9,
    "clp/survey": [0] * 9,
    "clp/paper": [0] * 9,
}


class Tiny(nn.Module):
    """A convolution with its normalization, and a linear layer."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
        self.linear = nn.Linear(4, num_classes)

    def forward(self, images):
        return self.linear(self.relu(self.bn(self.conv(images))).mean((2, 3)))


def scene(num_classes, spc):
    """Return a model and a sample of images of one pixel."""
    info = DatasetInfo(1, 1, tuple(map(str, range(num_classes))), (0.5,) * 3, (0.5,) * 3, NO_AUGMENTATION)

    def images(count, name):
        pixels = torch.randint(256, (count * num_classes, 3, 1, 1), generator=rng.stream(name))
        rows = torch.arange(len(pixels))
        return ImageSet.clean(pixels.to(torch.uint8), rows % num_classes, rows, info)

    held = num_validation(spc)
    build = models.Build("tiny", {}, num_classes, info.mean, info.std)
    with rng.global_stream(rng.stream("tiny")):
        model = models.Classifier(Tiny(num_classes), build).eval()
    return model, DefenderSample(images(spc - held, "train"), images(held, "validation"))


def taken(name, num_classes, spc, **settings):
    """Return what a method takes of a tiny model under a protocol."""
    method, _, protocol = name.partition("/")
    facts = {"num_classes": num_classes, "image_size": 32, "architecture": "preactresnet18"}
    declared = protocols.settings(method, protocol, facts)
    # The authors' places and images are those of a network that has learned something.
    declared |= {"sites": ["relu"], "only_right": False} if method == "mm_bd" else {}
    # No ascent ends early.
    declared |= {"stop_accuracy": 0} if method == "rnp" else {}
    model, sample = scene(num_classes, spc)
    with meter.meter(torch.device("cpu")) as cost:
        registry.load("defenses", method, declared | settings)(model, sample, rng=rng.stream("test"))
    return cost


@pytest.fixture
def only_counted(monkeypatch):
    """Let loops count their steps without taking them."""

    def descend(parts, images, objective, *, epochs, batch_size, **_):
        for _ in range(epochs * num_batches(len(images), batch_size)):
            meter.count_step(0)
        return [training.Epoch(epochs, 0.0, 0.0, 1.0, 0, 0.0)]

    def mask(_self, _gated, _masks, _optimizer, _perturbation, batches):
        for batch in batches:
            meter.count_step(len(batch.rows))

    def any_images(_loader, count, _rng):
        return Batch(torch.empty(0), torch.empty(0), torch.arange(count))

    monkeypatch.setattr(Loader, "any", any_images)
    monkeypatch.setattr(training, "descend", descend)
    monkeypatch.setattr(AWN, "_mask", mask)
    monkeypatch.setattr(AWN, "_perturb", lambda _self, _gated, _masks, start, _batches: (start, 0.0))


@pytest.mark.parametrize(
    ("place", "size"), list(enumerate(SIZES)), ids=lambda v: f"{v[0]}x{v[1]}" if v in SIZES else ""
)
@pytest.mark.parametrize("name", STEPS)
def test_steps(name, place, size, only_counted):
    assert taken(name, *size).steps == STEPS[name][place]


@pytest.mark.parametrize("name", ["fp/survey", "awn/survey", "rnp/survey", "mm_bd/survey", "rnp/paper"])
def test_steps_that_are_taken(name):
    """At the smallest size, of all images at once: 20, of which FP learns from 10."""
    cost = taken(name, 10, 2)
    assert cost.steps == STEPS[name][0]
    assert cost.step_images == cost.steps * (10 if name == "fp/survey" else 20)


@pytest.mark.parametrize(("protocol", "images"), [("survey", 256), ("paper", 128)])
@pytest.mark.parametrize("size", [(10, 2), (43, 10)])
def test_anp_takes_2000_steps_whatever_the_sample(protocol, images, size):
    assert protocols.settings("anp", protocol, {"num_classes": size[0]})["iterations"] == 2000
    cost = taken(f"anp/{protocol}", *size, iterations=3)
    assert (cost.steps, cost.step_images) == (3, 3 * images)


def test_awn_s_few_images_come_32_at_a_time():
    cost = taken("awn/paper", 10, 2, epochs=2)
    assert (cost.steps, cost.step_images) == (2 * 15, 2 * 15 * 32)
    cost = taken("awn/paper", 10, 10, epochs=2)
    assert (cost.steps, cost.step_images) == (2 * 15, 2 * 15 * 128)
