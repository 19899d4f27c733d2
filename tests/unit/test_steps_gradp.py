"""How many optimizer steps Grad-Prune and I-BAU take by protocol, and where their settings are from."""

import itertools
import re

import pytest
import torch
from torch import nn

from detrojan import models, registry, rng
from detrojan.images import DatasetInfo, DefenderSample, ImageSet, TriggeredSample
from detrojan.learning.meter import meter
from detrojan.settings import NO_AUGMENTATION
from detrojan.stages.sampling import num_validation
from detrojan.study import protocols, schema

SIZES = list(itertools.product((10, 43, 200), (2, 10, 100)))  # classes, SPC


def facts(num_classes, spc):
    own = {"num_classes": num_classes, "image_size": 32, "spc": spc, "architecture": "preactresnet18"}
    return own | {"attack": "badnets", "ratio": 0.1, "seed": 0}


def sample_of(num_classes, spc):
    """Return a sample of images of one pixel, whose triggered copies are the images themselves."""
    info = DatasetInfo(1, 1, tuple(map(str, range(num_classes))), (0.5,) * 3, (0.25,) * 3, NO_AUGMENTATION)
    held = num_validation(spc)

    def split(count, name):
        labels = torch.arange(num_classes).repeat_interleave(count)
        pixels = torch.randint(256, (len(labels), 3, 1, 1), generator=rng.stream(name)).to(torch.uint8)
        return ImageSet.clean(pixels, labels, torch.arange(len(labels)), info)

    train, validation = split(spc - held, "train"), split(held, "validation")
    return DefenderSample(train, validation, TriggeredSample(train, validation))


class TwoLayers(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.convolution, self.flatten = nn.Conv2d(3, 2, 1), nn.Flatten()
        self.linear = nn.Linear(2, num_classes)

    def forward(self, images):
        return self.linear(self.flatten(self.convolution(images)))


def cost_of(name, protocol, num_classes, spc, **settings):
    sample = sample_of(num_classes, spc)
    own = protocols.settings(name, protocol, facts(num_classes, spc))
    with rng.global_stream(rng.stream("init")):
        build = models.Build("two layers", {}, num_classes, (0.5,) * 3, (0.25,) * 3)
        model = models.Classifier(TwoLayers(num_classes), build).eval()
    with meter(torch.device("cpu")) as cost:
        registry.load("defenses", name, own | settings)(model, sample, rng=rng.stream("test"))
    return cost


OUTER = {
    "survey": [5, 5, 20, 5, 10, 85, 10, 40, 395],
    "paper": [50, 50, 50, 50, 50, 215, 60, 100, 1000],
}


@pytest.mark.parametrize(
    ("protocol", "size", "outer"),
    [
        (protocol, size, steps)
        for protocol in OUTER
        for size, steps in zip(SIZES, OUTER[protocol], strict=True)
    ],
)
def test_steps_of_ibau(protocol, size, outer):
    """As many on the perturbation as on the weights, in each of five rounds alike."""
    assert protocols.settings("ibau", protocol, facts(*size))["rounds"] == 5
    cost = cost_of("ibau", protocol, *size, rounds=1, iterations=0)  # the fixed point takes no step
    assert 5 * cost.steps == 2 * outer
    assert cost.step_images % (2 * size[0] * size[1]) == 0  # whole passes


AN_EPOCH = [1, 1, 8, 1, 4, 31, 2, 15, 141]


@pytest.mark.parametrize(("size", "steps"), list(zip(SIZES, AN_EPOCH, strict=True)))
@pytest.mark.parametrize("protocol", ["survey", "paper", "ours"])
def test_steps_of_an_epoch_of_grad_prune(protocol, size, steps):
    cost = cost_of("grad_prune", protocol, *size, max_rounds=1, max_epochs=1)
    assert cost.steps == steps
    # Clean ones; as many triggered ones go with them.
    assert cost.step_images == size[0] * (size[1] - num_validation(size[1]))


@pytest.mark.parametrize("name", ["ibau", "grad_prune", "grad_prune_inverted"])
def test_every_setting_has_a_source_in_every_protocol(name):
    declared = schema.shipped_file("defenses", name).protocols
    assert list(declared) == {"ibau": ["survey", "paper"], "grad_prune": ["survey", "paper", "ours"]}.get(
        name, ["survey", "ours"]
    )
    fields = registry.declared("defenses", name).settings.model_fields
    for protocol in declared.values():
        assert set(protocol.sources) == set(fields)
        assert all(re.match(r"(survey|paper|ours): .", source) for source in protocol.sources.values())
        assert set(protocol.set) <= set(fields)
    # The class's own values are those of the first.
    assert protocols.settings(name, "survey", facts(10, 10)) == {
        key: field.default for key, field in fields.items()
    }
