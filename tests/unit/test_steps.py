"""How many optimizer steps a method takes under each protocol, whatever the size of the defender's sample."""

import collections
import contextlib
import math

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from detrojan import images, models, registry, rng
from detrojan.defenses._parts import inversion
from detrojan.images import DatasetInfo, DefenderSample, ImageSet, num_batches
from detrojan.learning import training
from detrojan.learning.meter import count_step, meter
from detrojan.settings import NO_AUGMENTATION
from detrojan.study import protocols
from detrojan.study.schema import shipped_file

CPU = torch.device("cpu")
SPC = (2, 10, 100)
# Steps at 2, 10 and 100 images a class, of 10, 43 and 200 classes.
STEPS = {
    ("ft", "survey"): "100/100/400 100/200/1700 200/800/7900",
    ("ft", "paper"): "1000/1000/1000 1000/1000/1700 1000/1000/7900",
    ("ft_sam", "survey"): "100/100/400 100/200/1700 200/800/7900",
    ("ft_sam", "paper"): "1000/1000/1000 400/400/850 2000/2000/7900",
    ("fst", "survey"): "10/10/40 15/30/255 30/120/1185",
    ("fst", "paper"): "80/80/80 80/80/510 80/240/2355",
    ("nad", "survey"): "20/20/80 20/40/340 80/320/3140",
    ("nad", "paper"): "1200/1200/1200 1200/1211/2040 1211/1216/9390",
    ("npd", "survey"): "50/50/400 50/200/1700 200/800/7850",
    ("npd", "paper"): "1000/1000/1000 800/800/1700 2000/2000/7850",
    ("pbe", "survey"): "40/40/160 40/80/680 80/320/3160",
    ("pbe", "paper"): "400/400/400 400/400/680 400/400/3160",
    ("sau", "survey"): "100/100/400 100/200/1700 40/160/1580",
    ("sau", "paper"): "1000/1000/1000 800/800/1700 400/400/1580",
    # The search, then the tuning.
    ("nc", "survey"): "420/420/720 420/520/2020 720/1920/16120",
    ("nc", "paper"): "2157/2160/2160 2159/2168/2270 2169/2189/2625",
}
CASES = [
    (name, protocol, num_classes, spc, int(steps))
    for (name, protocol), row in STEPS.items()
    for num_classes, some in zip((10, 43, 200), row.split(), strict=True)
    for spc, steps in zip(SPC, some.split("/"), strict=True)
]
PLACES = {"nad": {"layers": ["conv1", "conv1", "conv2"]}, "npd": {"host": "conv2"}}


def tiny(num_classes, spc):
    """Return a network of two convolutions and a sample of images of 2×2 pixels."""
    info = DatasetInfo(2, 2, tuple(map(str, range(num_classes))), (0.0,) * 3, (1.0,) * 3, NO_AUGMENTATION)
    count = num_classes * spc
    pixels = torch.randint(256, (count, 3, 2, 2), generator=rng.stream("pixels")).to(torch.uint8)
    everything = ImageSet.clean(pixels, torch.arange(count) % num_classes, torch.arange(count), info)
    held = num_classes * max(1, spc // 10)
    validation, train = everything[torch.arange(held)], everything[torch.arange(held, count)]
    layers = {"conv1": nn.Conv2d(3, 2, 1), "conv2": nn.Conv2d(2, 2, 1), "flat": nn.Flatten()}
    network = nn.Sequential(collections.OrderedDict(layers | {"linear": nn.Linear(8, num_classes)}))
    build = models.Build("tiny", {}, num_classes, info.mean, info.std)
    return models.Classifier(network, build).eval(), DefenderSample(train, validation)


def found(count, num_steps):
    """Return what a search of so many steps finds: class 0 has a small mask."""
    norms = torch.arange(count, dtype=torch.float64) + 100
    norms[0] = 1
    reached, rates = torch.ones(count, dtype=torch.bool), torch.ones(count)
    parts = torch.zeros(count, 1, 2, 2), torch.zeros(count, 3, 2, 2)
    return inversion.Triggers(*parts, norms, rates, reached, 1, num_steps, capped=False)


@pytest.fixture
def counted_only(monkeypatch):
    """Let the training loop and the search count their steps without taking them."""

    def epoch(self, _rng):
        return iter([None] * num_batches(len(self._set), self._batch_size))

    def run_epoch(_parts, batches, *_):
        for _batch in batches:
            count_step(1)
        return 0.0, 0.0, 0

    def invert(self, _model, clean, *, rng):
        _, num_steps = inversion._length(min(len(clean), self.max_images), self)
        for _ in range(num_steps):
            count_step(1)
        return found(clean.num_classes, num_steps)

    monkeypatch.setattr(rng, "child", lambda generator, *_: generator)
    monkeypatch.setattr(rng, "global_stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(images.Loader, "epoch", epoch)
    monkeypatch.setattr(training, "_prepared", lambda batches, *_: batches)
    monkeypatch.setattr(training, "_run_epoch", run_epoch)
    monkeypatch.setattr(inversion.TriggerInversion, "invert", invert)


@pytest.mark.parametrize(("name", "protocol", "num_classes", "spc", "steps"), CASES)
def test_steps_by_size(name, protocol, num_classes, spc, steps, counted_only):
    model, sample = tiny(num_classes, spc)
    settings = protocols.settings(name, protocol, {"num_classes": num_classes, "image_size": 32})
    with meter(CPU) as cost:
        registry.load("defenses", name, settings | PLACES.get(name, {}))(model, sample, rng=rng.stream("x"))
    assert cost.steps == steps


FIXED = {name: {"epochs": 1, "min_steps": 320} for name in ("ft", "ft_sam", "fst", "npd", "pbe", "sau")} | {
    "nad": {"teacher_epochs": 1, "teacher_min_steps": 160, "epochs": 1, "min_steps": 160}
}


@pytest.mark.parametrize("name", FIXED)
def test_a_study_may_fix_the_steps_whatever_the_spc(name, counted_only):
    taken = set()
    for spc in SPC:
        with meter(CPU) as cost:
            defense = registry.load("defenses", name, FIXED[name] | PLACES.get(name, {}))
            defense(*tiny(10, spc), rng=rng.stream("x"))
        taken.add(cost.steps)
    assert taken == {320}


METHODS = sorted({name for name, _ in STEPS})


@pytest.mark.parametrize("name", METHODS)
def test_every_step_of_an_optimizer_is_counted(name, toy_model, sample):
    taken = []
    layers = {"layers": ["layer1", "layer2", "layer3"]} if name == "nad" else {}
    handle = register_optimizer_step_post_hook(lambda *_: taken.append(1))
    try:
        with meter(CPU) as cost:
            registry.load("defenses", name, layers, smoke=True)(toy_model, sample, rng=rng.stream("x"))
    finally:
        handle.remove()
    # FT-SAM's step ends with one of SGD, of which the hook hears too.
    assert cost.steps == len(taken) / (2 if name == "ft_sam" else 1) > 0


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_has_a_source_in_every_protocol(name):
    declared = shipped_file("defenses", name).protocols
    assert set(declared) == {"survey", "paper"}
    fields = registry.declared("defenses", name).settings.model_fields
    for protocol in declared.values():
        assert set(protocol.sources) == set(fields)
        for source in protocol.sources.values():
            whose, where = source.split(": ", 1)
            assert whose in ("survey", "paper", "ours")
            assert where
    # The class is the first protocol, with ten classes.
    assert (
        protocols.settings(name, "survey", {"num_classes": 10})
        == registry.load("defenses", name).model_dump()
    )


def test_the_cosine_falls_over_all_passes_of_a_floored_run(toy_model, sample, monkeypatch):
    rates, run_epoch = [], training._run_epoch

    def spy(parts, *rest):
        rates.extend(part.optimizer.param_groups[0]["lr"] for part in parts.values())
        return run_epoch(parts, *rest)

    monkeypatch.setattr(training, "_run_epoch", spy)
    tuning = registry.load("defenses", "ft", {"epochs": 2, "min_steps": 11, "batch_size": 16, "lr": 0.02})
    tuning(toy_model, sample, rng=rng.stream("x"))  # 40 images: three steps a pass, four passes
    assert rates == pytest.approx([0.01 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)])


def test_a_floor_is_of_the_images_that_are_tuned_on():
    """A flagged class more makes more images, and fewer passes reach the floor."""
    defense = registry.load("defenses", "nc", protocols.settings("nc", "paper", {"num_classes": 10}))
    assert [defense.in_steps(count, 157).epochs for count in (100, 120, 300)] == [40, 40, 16]
