"""The search for triggers: its schedule, its stack of classes, its bounds, and what it flags."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from detrojan import rng
from detrojan.defenses._parts import inversion
from detrojan.defenses._parts.inversion import (
    Schedule,
    TriggerInversion,
    Triggers,
    anomaly_index,
    search,
)
from detrojan.defenses._parts.subsets import stratified
from detrojan.images import ImageSet, to_float
from detrojan.learning.meter import meter

CPU = torch.device("cpu")


def found(norms, reached=None):
    """Return triggers with the given norms."""
    count = len(norms)
    return Triggers(
        masks=torch.zeros(count, 1, 2, 2),
        patterns=torch.zeros(count, 3, 2, 2),
        norms=torch.tensor(norms, dtype=torch.float64),
        hit_rates=torch.ones(count, dtype=torch.float64),
        reached=torch.ones(count, dtype=torch.bool) if reached is None else torch.tensor(reached),
        num_images=4,
        num_steps=8,
        capped=False,
    )


# --- what is flagged -------------------------------------------------------------------------------


def test_anomaly_index_by_hand():
    # Median 22, distances 12 2 0 2 4, their median 2.
    index = anomaly_index(torch.tensor([10.0, 20.0, 22.0, 24.0, 26.0], dtype=torch.float64))
    expected = [12 / 2.9652, 2 / 2.9652, 0, 2 / 2.9652, 4 / 2.9652]
    assert index.tolist() == pytest.approx(expected)
    # An even number: median 3, distances 2 1 1 5, their median 1.5.
    index = anomaly_index(torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64))
    assert index.tolist() == pytest.approx([2 / 2.2239, 1 / 2.2239, 1 / 2.2239, 5 / 2.2239])


def test_anomaly_index_is_zero_where_most_norms_are_equal():
    assert anomaly_index(torch.tensor([5.0, 5.0, 5.0, 1.0])).tolist() == [0, 0, 0, 0]


def test_small_masks_are_flagged_and_large_ones_never():
    norms = [20.0, 5.0, 22.0, 24.0, 90.0, 10.0, 23.0, 21.0, 22.0]
    assert anomaly_index(torch.tensor(norms))[4] > 2
    assert found(norms).flagged(2.0) == [1, 5]  # the smallest first
    assert found(norms).flagged(100.0) == []
    # What no search has brought to its class is no trigger.
    assert found(norms, [label != 1 for label in range(9)]).flagged(2.0) == [5]


def test_smallest_mask_counts_among_those_that_work():
    assert found([3.0, 1.0, 2.0]).smallest() == 1
    assert found([3.0, 1.0, 2.0], [True, False, True]).smallest() == 2
    assert found([3.0, 1.0, 2.0], [False, False, False]).smallest() == 1


# --- the schedule ----------------------------------------------------------------------------------


def one_search(rates, norms, last_rates, settings):
    """Return, epoch by epoch, weight, best norm, end and improvement of one class, by plain ifs."""
    weight, best, previous = settings.mask_weight, math.inf, math.inf
    above = below = stalled = 0
    raised = lowered = done = False
    states = []
    for rate, norm, last in zip(rates, norms, last_rates, strict=True):
        improved = rate >= settings.hit_rate and last >= settings.hit_rate and norm < best
        if improved:
            best = norm
        if best < math.inf:
            stalled = stalled + 1 if best >= 0.99 * previous else 0
        previous = best
        if stalled >= settings.stop_patience and raised and lowered:
            done = True
        if rate >= settings.hit_rate:
            above, below = above + 1, 0
        else:
            above, below = 0, below + 1
        if above == settings.weight_patience:
            weight, above, raised = weight * 2, 0, True
        if below == settings.weight_patience:
            weight, below, lowered = weight / 2**1.5, 0, True
        states.append((weight, best, done, improved))
    return states


def test_schedule_of_all_classes_equals_plain_ifs_on_each():
    settings = TriggerInversion(stop_patience=15, weight_patience=3)
    generator, classes, epochs = rng.stream("schedule"), 40, 80
    # Hit rates that stay on one side of 0.98 for some epochs; norms that fall and level out, or fall on.
    slow = torch.rand(classes, epochs // 4, generator=generator).repeat_interleave(4, 1)
    rates = 1 - 0.04 * (slow * 0.8 + torch.rand(classes, epochs, generator=generator) * 0.2)
    last_rates = rates - 0.01 * torch.rand(classes, epochs, generator=generator)
    level = torch.arange(classes).view(-1, 1) % 2 * 600
    norms = (1000 * 0.97 ** torch.arange(epochs)).maximum(level) + torch.rand(
        classes, epochs, generator=generator
    )
    schedule = Schedule(classes, settings, CPU)
    expected = [
        one_search(*rows, settings)
        for rows in zip(*map(torch.Tensor.tolist, (rates, norms, last_rates)), strict=True)
    ]
    assert 5 < sum(states[-1][2] for states in expected) < classes  # some end, some don't
    for epoch in range(epochs):
        improved = schedule.update(rates[:, epoch], norms[:, epoch], last_rates=last_rates[:, epoch])
        for label, states in enumerate(expected):
            weight, best, done, better = states[epoch]
            assert float(schedule.weight[label]) == pytest.approx(weight, rel=1e-5)
            assert float(schedule.best[label]) == pytest.approx(best)
            assert (bool(schedule.finished[label]), bool(improved[label])) == (done, better)


def test_weight_starts_at_a_thousandth_doubles_and_falls_after_five_epochs():
    schedule = Schedule(2, TriggerInversion(), CPU)
    rates, norms = torch.tensor([0.98, 0.97]), torch.tensor([50.0, 50.0])
    weights = []
    for _ in range(10):
        schedule.update(rates, norms, last_rates=rates)
        weights.append(schedule.weight.tolist())
    assert weights[3] == pytest.approx([1e-3, 1e-3])
    assert weights[4] == weights[8] == pytest.approx([2e-3, 1e-3 / 2**1.5])
    assert weights[9] == pytest.approx([4e-3, 1e-3 / 8])
    assert schedule.best.tolist() == [50, math.inf]


# --- the search ------------------------------------------------------------------------------------


@pytest.fixture
def quick():
    return TriggerInversion(inversion_epochs=6, inversion_batch_size=8, min_steps=12, weight_patience=2)


def test_classes_in_a_stack_are_searched_as_if_alone(toy_model, toy_images, quick):
    images = toy_images(count=12)
    together = search(toy_model, images, torch.arange(4), quick, rng=rng.stream("search"))
    for label in range(4):
        alone = search(toy_model, images, torch.tensor([label]), quick, rng=rng.stream("search"))
        for name in ("masks", "patterns"):
            torch.testing.assert_close(
                getattr(together, name)[label], getattr(alone, name)[0], rtol=0, atol=1e-5
            )
        assert together.norms[label] == pytest.approx(float(alone.norms[0]), abs=1e-4)
        assert (together.hit_rates[label], together.reached[label]) == (alone.hit_rates[0], alone.reached[0])


def test_memory_bound_does_not_change_the_result(toy_model, toy_images, quick, monkeypatch):
    images = toy_images(count=12)
    whole = search(toy_model, images, torch.arange(4), quick, rng=rng.stream("search"))
    monkeypatch.setattr(inversion, "PIXELS", 3 * 64)  # three images of 8×8 a pass
    parts = search(toy_model, images, torch.arange(4), quick, rng=rng.stream("search"))
    torch.testing.assert_close(whole.masks, parts.masks, rtol=0, atol=1e-5)
    torch.testing.assert_close(whole.patterns, parts.patterns, rtol=0, atol=1e-5)
    assert torch.equal(whole.hit_rates, parts.hit_rates)


def test_on_a_gpu_as_many_images_pass_as_its_memory_holds(planted, monkeypatch):
    shape, cpu, gpu = (8, 8), torch.device("cpu"), torch.device("cuda")
    # Of the planted model: maps of a convolution and a normalization, four channels each, and two logits.
    assert inversion.map_bytes(planted, shape, cpu) == 4 * (2 * 4 * 8 * 8 + 2)
    assert inversion.images_at_once(planted, shape, cpu) == 2**19 // 64
    memory = SimpleNamespace(total_memory=4 * 20_000 * inversion.map_bytes(planted, shape, cpu))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    size = inversion.map_bytes(planted, shape, cpu)
    monkeypatch.setattr(inversion, "map_bytes", lambda *_: size)
    assert inversion.images_at_once(planted, shape, gpu) == 20_000
    memory.total_memory = 1  # never fewer than on a CPU
    assert inversion.images_at_once(planted, shape, gpu) == 2**19 // 64


def test_norms_of_mixed_age_tell_nothing():
    """Why no class is dropped early: norms fall for long, and the target's is then no outlier any more.

    Made-up norms of 16 classes on 16×16 pixels: searched to the end, and with half of those that remained
    stopped after 10, 20 and 40 epochs.
    """
    grown = torch.tensor([6.0, 44, 48, 50, 51, 52, 53, 54, 55, 56, 57, 58, 60, 62, 64, 70])
    assert anomaly_index(grown.double())[0] > 5
    assert found(grown.tolist()).flagged(2.0) == [0]
    early, middle, late = [150.0, 160, 170, 185, 200, 210, 220, 226], [56.0, 60, 64, 70], [20.0, 22]
    mixed = torch.tensor([6.0, 10, *late, *middle, *early]).double()
    assert mixed[0] < mixed.quantile(0.5) / 9
    assert anomaly_index(mixed)[0] < 1
    assert found(mixed.tolist()).flagged(2.0) == []


def test_a_step_descends_the_loss_of_the_paper(toy_model, toy_images):
    images = to_float(toy_images().images)
    stack = inversion._Stack(toy_model, torch.arange(4), toy_images().info, lr=0.1)
    weight = torch.tensor([0.0, 1e-3, 1e-2, 1e-1])
    free_mask = torch.ones(1, 8, 8, requires_grad=True)
    free_pattern = torch.ones(3, 8, 8, requires_grad=True)
    mask, pattern = (free.tanh() / 2 + 0.5 for free in (free_mask, free_pattern))
    assert mask[0, 0, 0].item() == pytest.approx(0.8808, abs=1e-4)
    logits = toy_model((1 - mask) * images + mask * pattern)
    expected = F.cross_entropy(logits, torch.full((12,), 2)) + 1e-2 * mask.abs().sum()
    hits, losses = stack.step(images, torch.tensor([1, 2]), weight)
    assert losses[2].item() == pytest.approx(expected.item(), rel=1e-5)
    assert hits[2] == (logits.argmax(1) == 2).sum()
    assert losses[0] == losses[3] == 0  # not running
    # Adam's first step is 0.1 along the sign of the gradient.
    gradients = torch.autograd.grad(expected, [free_mask, free_pattern])
    for before, gradient, after in zip((mask, pattern), gradients, stack.triggers(), strict=True):
        stepped = (1 - 0.1 * gradient / (gradient.abs() + 1e-8)).tanh() / 2 + 0.5
        clear = gradient.abs() > 1e-6
        assert clear.double().mean() > 0.9
        torch.testing.assert_close(after[2][clear], stepped[clear], rtol=0, atol=1e-5)
        torch.testing.assert_close(after[0], before, rtol=0, atol=1e-5)


def test_model_is_left_alone(toy_model, toy_images, quick):
    before = copy.deepcopy(toy_model.state_dict())
    search(toy_model, toy_images(), torch.arange(4), quick, rng=rng.stream("search"))
    torch.testing.assert_close(toy_model.state_dict(), before, rtol=0, atol=0)
    assert all(p.requires_grad and p.grad is None for p in toy_model.parameters())


def test_every_pair_of_class_and_image_is_a_pass(toy_model, toy_images):
    settings = TriggerInversion(inversion_epochs=3, inversion_batch_size=8, min_steps=1)
    with meter(CPU) as spent:
        triggers = search(
            toy_model, toy_images(count=12), torch.arange(4), settings, rng=rng.stream("search")
        )
    assert triggers.num_steps == 3 * 2
    assert spent.backward_passes == 3 * 12 * 4
    assert spent.forward_passes == 3 * 12 * 4 + 12 * 4  # and once more for the final hit rates


def test_a_finished_class_costs_no_more_passes(toy_model, toy_images, monkeypatch):
    settings = TriggerInversion(inversion_epochs=5, min_steps=1)
    update = Schedule.update

    def ends_class_1_at_once(self, *args, **kwargs):
        improved = update(self, *args, **kwargs)
        self.finished[1] = True
        self.best[1] = 0
        return improved

    monkeypatch.setattr(Schedule, "update", ends_class_1_at_once)
    with meter(CPU) as spent:
        search(toy_model, toy_images(count=12), torch.arange(4), settings, rng=rng.stream("search"))
    assert spent.backward_passes == 12 * (4 + 4 * 3)


def test_a_class_out_of_reach_keeps_its_last_mask_and_is_no_find(toy_model, toy_images):
    model = copy.deepcopy(toy_model)
    model.network.linear.bias.data[3] = -1e4  # no image can get class 3
    settings = TriggerInversion(inversion_epochs=4, min_steps=1)
    triggers = search(model, toy_images(), torch.tensor([3]), settings, rng=rng.stream("search"))
    assert not triggers.reached[0]
    assert triggers.hit_rates[0] == 0
    assert triggers.norms[0] < 0.88 * 64 - 1  # three steps after the start


@pytest.mark.parametrize(
    ("num_images", "settings", "length"),
    [
        (100, {"min_steps": 80}, (1, 80)),  # the benchmark's way: a step an epoch
        (100, {}, (4, 320)),
        (1000, {}, (4, 320)),
        (4300, {}, (17, 1360)),
        (20000, {}, (79, 2000)),  # 25 epochs and a part of one
        (100, {"min_steps": 500}, (7, 560)),
        (257, {"min_steps": 1}, (1, 80)),  # 256 images and a last one, which joins them
        (1, {"min_steps": 1}, (1, 80)),
        (1000, {"min_steps": 1, "inversion_batch_size": 10}, (100, 2000)),
        (1000, {"inversion_epochs": 1, "inversion_batch_size": 2, "max_steps": 300}, (500, 300)),
    ],
)
def test_length_of_a_search(num_images, settings, length):
    assert inversion._length(num_images, TriggerInversion(**settings)) == length


def test_bounds_are_recorded(toy_model, toy_images):
    def capped(**settings):
        settings = TriggerInversion(**{"inversion_epochs": 4, "min_steps": 1, "max_images": 12, **settings})
        triggers = search(toy_model, toy_images(), torch.tensor([0]), settings, rng=rng.stream("search"))
        return triggers.num_images, triggers.num_steps, triggers.capped

    assert capped() == (12, 4, False)
    assert capped(max_images=8) == (8, 4, True)
    assert capped(max_steps=3) == (12, 3, True)


def test_the_cap_cuts_the_last_epoch_short(toy_model, toy_images, monkeypatch):
    rates, update = [], Schedule.update

    def spy(self, hits, norms, *, last_rates):
        rates.append((hits, norms))
        return update(self, hits, norms, last_rates=last_rates)

    monkeypatch.setattr(Schedule, "update", spy)
    settings = TriggerInversion(inversion_epochs=9, inversion_batch_size=4, min_steps=1, max_steps=4)
    with meter(CPU) as spent:
        triggers = search(
            toy_model, toy_images(count=12), torch.arange(4), settings, rng=rng.stream("search")
        )
    # Three batches of four images, then one: its means are over that one.
    assert (triggers.num_steps, triggers.capped, spent.steps, spent.step_images) == (4, True, 4, 16)
    assert len(rates) == 2
    side = toy_images().info.height
    assert ((rates[1][1] > 0.8 * side**2 / 2) & (rates[1][1] <= side**2)).all()


def test_a_loss_that_is_not_finite_stops_it(toy_model, toy_images, quick):
    model = copy.deepcopy(toy_model)
    model.network.linear.bias.data[0] = math.inf
    with pytest.raises(ArithmeticError, match="not finite"):
        search(model, toy_images(), torch.arange(4), quick, rng=rng.stream("search"))


def test_a_planted_trigger_is_found(backdoored):
    # Small for the sake of time; at the defaults the anomaly index is higher still.
    settings = TriggerInversion(inversion_epochs=80, min_steps=1, inversion_lr=0.2, max_images=20)
    triggers = settings.invert(backdoored.model, backdoored.sample.everything, rng=rng.stream("search"))
    assert triggers.flagged(2.0)[0] == triggers.smallest() == 0
    assert triggers.norms[0] < triggers.norms[1:].min() / 2
    assert triggers.hit_rates[0] >= 0.98
    # The patch is 2×2 pixels in the bottom-right corner.
    side = backdoored.test.info.height
    row, column = divmod(int(triggers.masks[0, 0].argmax()), side)
    assert min(row, column) >= side - 2
    stamped = triggers.stamp(backdoored.test, 0)
    with torch.inference_mode():
        hits = backdoored.model(to_float(stamped.images)).argmax(1) == 0
    assert hits.double().mean() > 0.9  # on images that the search hasn't seen


# --- stamps and samples ----------------------------------------------------------------------------


def test_stamps_by_hand(toy_images):
    images = toy_images(side=2, count=3)
    pixels = torch.tensor([0, 100, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    images = dataclasses.replace(images, images=pixels.contiguous())
    masks = torch.zeros(2, 1, 2, 2)
    masks[0, 0, 0, 0], masks[1, 0, 1, 1] = 0.5, 0.25
    patterns = torch.ones(2, 3, 2, 2)
    patterns[1, 0] = 0
    stamped = inversion.stamp(images, masks, patterns, torch.tensor([0, 1, 1]))
    assert isinstance(stamped, ImageSet)
    assert stamped.images[0, 0].tolist() == [[128, 0], [0, 0]]  # 127.5, rounded to even
    assert stamped.images[1, 0].tolist() == [[100, 100], [100, 75]]
    assert stamped.images[1, 1].tolist() == [[100, 100], [100, 139]]  # 0.75 · 100 + 0.25 · 255 = 138.75
    assert stamped.images[2, 0].tolist() == [[255, 255], [255, 191]]
    assert torch.equal(stamped.labels, images.labels)


def test_stratified_rows_are_balanced_and_random():
    labels = torch.arange(40) % 4
    rows = stratified(labels, 8, rng.stream("rows"))
    assert torch.bincount(labels[rows]).tolist() == [2, 2, 2, 2]
    assert len(set(rows.tolist())) == 8
    assert rows.tolist() != stratified(labels, 8, rng.stream("others")).tolist()
    # Fewer rows than classes: chance picks the classes, and no class comes twice.
    picks = [
        tuple(labels[stratified(labels, 2, rng.stream(seed))].sort().values.tolist()) for seed in range(40)
    ]
    assert len(set(picks)) == 6
    # In proportion where sizes differ.
    uneven = torch.tensor([0] * 30 + [1] * 10)
    assert torch.bincount(uneven[stratified(uneven, 8, rng.stream("rows"))]).tolist() == [6, 2]
