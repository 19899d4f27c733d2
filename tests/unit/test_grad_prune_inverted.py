"""Grad-Prune without the trigger: its rounds, its pool of triggers, and that it peeks at none."""

import dataclasses
import json

import pytest
import torch

from detrojan import registry, rng
from detrojan.defenses._parts.gradient_pruning import Filters, GradientPruning, Tuned
from detrojan.defenses._parts.inversion import TriggerInversion, Triggers
from detrojan.defenses.clean_data import grad_prune_inverted as module
from detrojan.defenses.clean_data.grad_prune_inverted import GradPruneInverted
from detrojan.defenses.known_trigger.grad_prune import GradPrune
from detrojan.images import TriggeredSample
from detrojan.stages import sampling

# A search small enough for a test, which still finds the planted patch (see test_inversion).
QUICK = {"inversion_epochs": 80, "min_steps": 1, "inversion_lr": 0.1, "max_images": 20}


def defend(defense, model, clean):
    return defense(model, clean, rng=rng.stream("test"))


def found(norms, masks, patterns):
    count = len(norms)
    return Triggers(
        masks=masks.expand(count, -1, -1, -1),
        patterns=patterns.expand(count, -1, -1, -1),
        norms=torch.tensor(norms, dtype=torch.float64),
        hit_rates=torch.ones(count, dtype=torch.float64),
        reached=torch.ones(count, dtype=torch.bool),
        num_images=4,
        num_steps=8,
        capped=False,
    )


@pytest.fixture
def script(monkeypatch):
    """Return a function that lets each round find triggers of one colour, and the inputs of all rounds."""

    def prepare(rounds, side):
        calls = {"searched": [], "pruned": [], "tuned": []}

        def invert(self, model, images, *, rng):
            number = len(calls["searched"])
            calls["searched"].append((model, images, rng.initial_seed()))
            grey = torch.full((1, 3, side, side), (number + 1) / 5)
            return found(rounds[number], torch.ones(1, 1, side, side), grey)

        def prune(self, model, filters, limit, triggered, scored, *, rng):
            calls["pruned"].append((triggered, limit))
            scores = torch.arange(len(filters)).neg().float()
            scores[: len(filters.removed)] = -torch.inf
            filters.remove(scores)  # the next one, layer by layer

        def tune(self, model, filters, clean, triggered, *, rng):
            calls["tuned"].append((triggered, rng.initial_seed()))
            return Tuned(3, capped=len(calls["tuned"]) == 2)

        monkeypatch.setattr(TriggerInversion, "invert", invert)
        monkeypatch.setattr(GradientPruning, "prune", prune)
        monkeypatch.setattr(GradientPruning, "tune", tune)
        return calls

    return prepare


FLAG_0, FLAG_1, NO_FLAG = [1.0, 20.0, 21.0, 19.0], [20.0, 1.0, 21.0, 19.0], [20.0, 19.0, 23.0, 21.0]


def test_rounds_grow_a_pool_until_no_class_is_flagged(script, backdoored):
    clean = backdoored.sample
    calls = script([FLAG_0, FLAG_1, NO_FLAG], side=16)
    defend(GradPruneInverted(), backdoored.model, clean)
    assert [len(calls[key]) for key in ("searched", "pruned", "tuned")] == [3, 2, 2]
    assert all(images is clean.train for _, images, _ in calls["searched"])  # validation stays out
    first, second = (triggered for triggered, _ in calls["pruned"])
    for split, copies in (("train", first.train), ("validation", first.validation)):
        assert (copies.images == 51).all()  # the one colour of the first round
        assert torch.equal(copies.labels, getattr(clean, split).labels)  # true ones
        assert torch.equal(copies.index, getattr(clean, split).index)
    colours = second.train.images[:, 0, 0, 0]
    assert (second.train.images == colours.view(-1, 1, 1, 1)).all()  # one member an image
    assert set(colours.tolist()) == {51, 102}
    assert 0.3 < (colours == 102).double().mean() < 0.7
    assert [triggered for triggered, _ in calls["tuned"]] == [first, second]
    # Each round has streams of its own, and the drop of accuracy counts from the model as it came.
    assert len({seed for _, _, seed in calls["searched"]} | {seed for _, seed in calls["tuned"]}) == 5
    (first_limit, second_limit) = (limit for _, limit in calls["pruned"])
    assert first_limit is second_limit
    assert first_limit.images is clean.validation
    chosen = clean.chosen
    assert chosen["flagged"] == [[0], [1], []]
    assert chosen["trigger_label"] == [0, 1]
    assert chosen["num_pruned"] == [1, 2]
    assert chosen["pruned"] == ["conv1:0", "conv1:1"]
    assert chosen["tuning_epoch"] == [3, 3]
    assert chosen["tuning_capped"] == [False, True]
    assert (chosen["num_judged"], chosen["allowed_errors"]) == (10, 1)
    assert (chosen["any_flagged"], chosen["outcome"]) == (True, "no class flagged")
    assert json.loads(json.dumps(chosen)) == chosen


def test_rounds_are_bounded(script, backdoored):
    calls = script([FLAG_0] * 9, side=16)
    defend(GradPruneInverted(), backdoored.model, backdoored.sample)
    assert [len(calls[key]) for key in ("searched", "pruned", "tuned")] == [5, 5, 5]
    assert backdoored.sample.chosen["outcome"] == "last round"


def test_first_round_takes_the_smallest_mask_without_a_flag_and_says_so(script, backdoored):
    calls = script([NO_FLAG, NO_FLAG], side=16)
    defend(GradPruneInverted(), backdoored.model, backdoored.sample)
    assert [len(calls[key]) for key in ("searched", "pruned", "tuned")] == [2, 1, 1]
    chosen = backdoored.sample.chosen
    assert chosen["trigger_label"] == [1]
    assert chosen["any_flagged"] is False
    assert chosen["flagged"] == [[], []]
    assert chosen["anomaly_index"][0][1] < 2


def test_with_the_real_trigger_it_prunes_what_grad_prune_does(backdoored, monkeypatch):
    # One implementation: given the attack's own patch, both score and remove the same filters.
    side = 16
    mask = torch.zeros(1, 1, side, side)
    difference = (backdoored.sample.triggered.train.images != backdoored.sample.train.images).any(1).any(0)
    mask[0, 0, difference] = 1.0
    values = backdoored.sample.triggered.train.images[0].float().div(255)[None]
    real = found([1.0] + [20.0, 21.0, 19.0] * 3, mask, values)
    monkeypatch.setattr(TriggerInversion, "invert", lambda *args, **kwargs: real)
    stamped = module._stamped(backdoored.sample, mask, values, rng.stream("members"))
    assert torch.equal(stamped.train.images, backdoored.sample.triggered.train.images)
    assert torch.equal(stamped.validation.images, backdoored.sample.triggered.validation.images)
    removed = []
    for defense in (GradPrune(max_epochs=1), GradPruneInverted(max_epochs=1, max_inversions=1)):
        sample = dataclasses.replace(backdoored.sample, chosen={})
        defend(defense, backdoored.model, sample)
        removed.append(sample.chosen["pruned"])
    assert removed[0] == removed[1]
    assert len(removed[0]) > 1
    assert GradPrune.prune is GradPruneInverted.prune is GradientPruning.prune


def test_removes_a_patch_without_knowing_it(backdoored):
    accuracy, asr, _ = backdoored.rates(backdoored.model)
    assert asr > 0.9
    settings = {**QUICK, "max_inversions": 2, "max_epochs": 5}
    clean = dataclasses.replace(backdoored.sample, triggered=None)
    repaired = defend(GradPruneInverted(**settings), backdoored.model, clean)
    repaired_accuracy, repaired_asr, recovered = backdoored.rates(repaired)
    assert repaired_asr < 0.1
    assert recovered > 0.9
    assert repaired_accuracy > accuracy - 0.05
    assert clean.chosen["trigger_label"][0] == 0
    # What was removed is still gone after the last round.
    filters = Filters(repaired)
    for name, channel in (text.split(":") for text in clean.chosen["pruned"]):
        assert (filters.layers[filters.names.index(name)].weight[int(channel)] == 0).all()


def test_it_never_looks_at_triggered_images(toy_model, toy_images):
    class Forbidden(TriggeredSample):
        def __getattribute__(self, name):
            raise AssertionError("the real trigger was looked at")

    sample = sampling.draw_samples(toy_images(count=24), "toy", 6, [0])[0]
    peeking = dataclasses.replace(sample, triggered=object.__new__(Forbidden))
    defense = registry.load("defenses", "grad_prune_inverted", smoke=True)
    repaired = defend(defense, toy_model, peeking)
    again = defend(defense, toy_model, dataclasses.replace(sample, chosen={}))
    torch.testing.assert_close(repaired.state_dict(), again.state_dict(), rtol=0, atol=0)


def test_it_belongs_to_the_defenses_with_clean_data_alone():
    assert registry.threat_model("defenses", "grad_prune_inverted") == "clean_data"
    own, other = (registry.declared("defenses", name) for name in ("grad_prune_inverted", "grad_prune"))
    assert own.constants["min_spc"] == other.constants["min_spc"] == 2
    shared = set(GradPrune.model_fields)
    assert shared < set(own.settings.model_fields)
    for name in shared:
        assert own.settings.model_fields[name].default == other.settings.model_fields[name].default
