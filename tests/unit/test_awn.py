"""AWN: its two steps against hand-made networks where the answer is known, and a trained backdoor."""

import copy
import functools
import math

import pytest
import torch
from torch import nn

from detrojan import models, registry, rng
from detrojan.defenses._parts.channels import Channels
from detrojan.defenses.clean_data import awn
from detrojan.errors import DivergedError, NotApplicableError
from detrojan.images import Batch, DefenderSample, Loader, to_float
from detrojan.learning import inference
from detrojan.settings import NO_AUGMENTATION, Augmentation


def load(**settings):
    return registry.load("defenses", "awn", settings)


def defend(model, clean, **settings):
    return load(**settings)(model, clean, rng=rng.stream("test"))


def gated_by(model):
    frozen = copy.deepcopy(model).requires_grad_(False)
    return functools.partial(Channels(frozen).logits, frozen)


@pytest.fixture
def ajar(planted):
    """Return the planted model with the trigger's channel slightly open on every image.

    A ReLU that is shut on all of them has no gradient that a perturbation could follow.
    """
    planted.network.bn.running_mean[1] = -0.01
    return planted


def start_for(images):
    return torch.zeros(1, 3, images.info.height, images.info.width)


def batches_of(images, num_passes=1, batch_size=256):
    """Return the batches of half a round."""
    loader = Loader(images, batch_size, NO_AUGMENTATION)
    return load(passes=num_passes)._batches(loader, len(images), rng.stream("any"))


# --- The perturbation ------------------------------------------------------------------------------


def linear(images, masks):
    """Return two logits: 0, and the mean red of each image times the first mask."""
    red = images[:, 0].mean((1, 2)) * masks[0]
    return torch.stack([torch.zeros_like(red), red], 1)


def test_perturbation_is_the_ascent_worked_out_by_hand(planted_sample):
    dark = planted_sample.train[planted_sample.train.labels == 0]
    pixels, rate = 64, 10.0
    # Red is 0, so both logits are, and the first class is what the model says. One step in the mean
    # of -log softmax: the gradient of each red pixel is its share 1/64 of the other class's 1/2.
    defense = load(perturbation_lr=rate)
    found, norm = defense._perturb(linear, torch.ones(1), start_for(dark), batches_of(dark))
    expected = torch.zeros(1, 3, 8, 8)
    expected[:, 0] = rate * 0.5 / pixels
    torch.testing.assert_close(found, expected)
    assert norm == pytest.approx(rate * 0.5)
    # The second step starts there: red is now that value, and the labels are still those of the images.
    found, _ = load()._perturb(linear, torch.ones(1), start_for(dark), batches_of(dark, 2))
    red = rate * 0.5 / pixels
    assert found[0, 0, 0, 0].item() == pytest.approx(red + rate / pixels / (1 + math.exp(-red)))


def test_each_batch_is_a_step(planted_sample):
    dark = planted_sample.train[planted_sample.train.labels == 0]
    norms = [
        load()._perturb(linear, torch.ones(1), start_for(dark), batches_of(dark, num_passes, size))[1]
        for num_passes, size in ((4, 8), (2, 4), (1, 2))
    ]
    assert norms[0] == pytest.approx(norms[1])
    assert norms[0] == pytest.approx(norms[2])


def test_perturbation_is_scaled_to_the_bound_and_keeps_its_direction(toy_model, toy_images):
    images = toy_images()
    masks = torch.ones(len(Channels(toy_model)))

    def perturb(bound):
        return load(bound=bound)._perturb(
            gated_by(toy_model), masks, start_for(images), batches_of(images, 5)
        )

    (free, norm), (bounded, same_norm) = perturb(1e9), perturb(2.0)
    assert norm == same_norm > 2
    assert free.abs().sum().item() == pytest.approx(norm)
    assert 2 * (1 - 1e-6) < bounded.abs().sum() <= 2 * (1 + 1e-6)
    torch.testing.assert_close(bounded * norm / 2, free)


def test_perturbation_hurts_the_model_as_gated(toy_model, toy_images):
    images = toy_images(count=24)
    gated, masks = gated_by(toy_model), torch.rand(len(Channels(toy_model)), generator=rng.stream("masks"))
    ascent = load(perturbation_lr=1000)  # an untrained network's logits hardly move
    found, _ = ascent._perturb(gated, masks, start_for(images), batches_of(images, 5))
    pixels = to_float(images.images)
    noise = found.flatten()[torch.randperm(found.numel(), generator=rng.stream("shuffle"))].view_as(found)
    said = gated(pixels, masks).argmax(1)

    def loss(perturbation):
        return nn.functional.cross_entropy(gated(pixels + perturbation, masks), said)

    untouched = loss(torch.zeros_like(found))
    assert loss(found) > untouched + 0.1
    assert loss(found) - untouched > 3 * (loss(noise) - untouched)  # the same values in other places


def test_a_perturbation_that_is_not_finite_stops_the_method(toy_model, toy_images):
    broken = copy.deepcopy(toy_model)
    broken.network.linear.bias.data[0] = math.nan
    images = toy_images(count=8)
    with pytest.raises(DivergedError, match="perturbation"):
        defend(broken, DefenderSample(images, images), epochs=1)


# --- The masks -------------------------------------------------------------------------------------


def test_loss_is_that_of_clean_images_and_of_clipped_moved_ones():
    seen = []

    def gated(images, masks):
        seen.append(images)
        return images.flatten(1)[:, :2] * masks.sum()

    pixels = torch.rand(4, 3, 2, 2, generator=rng.stream("pixels"))
    labels = torch.tensor([0, 1, 0, 1])
    perturbation = torch.tensor([0.9, -0.9, 0.0, 0.1] * 3).view(1, 3, 2, 2)
    masks = torch.tensor([0.5, 0.25, 1.0])
    loss = load(clean_weight=0.7, sparsity=0.01)._loss(
        gated, masks, perturbation, Batch(pixels, labels, torch.arange(4))
    )
    (both,) = seen  # one doubled batch
    assert torch.equal(both[:4], pixels)
    assert torch.equal(both[4:], (pixels + perturbation).clamp(0, 1))
    assert 0 <= both.min() <= both.max() <= 1
    logs = (both.flatten(1)[:, :2] * 1.75).log_softmax(1)
    clean, moved = -logs[range(4), labels], -logs[range(4, 8), labels]
    assert loss.item() == pytest.approx((0.7 * clean.mean() + 0.3 * moved.mean() + 0.01 * 1.75).item())


def test_each_round_starts_from_no_perturbation_and_at_a_lower_rate(toy_model, toy_images, monkeypatch):
    images, rounds = toy_images(count=8), []
    defense = load(epochs=3, passes=2, lr=0.2, lr_decay=0.5, max_drop=1)
    perturb, mask = type(defense)._perturb, type(defense)._mask

    def found(_self, gated, masks, start, batches):
        rounds.append([bool(start.any()), masks.clone()])
        return perturb(_self, gated, masks, start, batches)

    def fitted(_self, gated, masks, optimizer, perturbation, batches):
        batches = list(batches)
        rounds[-1] += [len(batches), optimizer.param_groups[0]["lr"]]
        mask(_self, gated, masks, optimizer, perturbation, iter(batches))

    monkeypatch.setattr(type(defense), "_perturb", found)
    monkeypatch.setattr(type(defense), "_mask", fitted)
    defense(toy_model, DefenderSample(images, images[torch.arange(0)]), rng=rng.stream("test"))
    assert [(started, *some) for started, _, *some in rounds] == [(False, 2, r) for r in (0.2, 0.1, 0.05)]
    # Each attack is on the model as masked by then.
    masks = [masks for _, masks, *_ in rounds]
    assert (masks[0] == 1).all()
    assert not torch.equal(masks[1], masks[0])
    assert not torch.equal(masks[2], masks[1])


def test_masks_of_a_loss_that_is_not_finite_stop_the_method():
    masks = nn.Parameter(torch.ones(1))
    batch = Batch(torch.zeros(2, 3, 2, 2), torch.tensor([0, 1]), torch.arange(2))

    def gated(images, masks):
        return images.flatten(1)[:, :2] * masks + math.inf

    with pytest.raises(DivergedError, match="masks"):
        load()._mask(gated, masks, torch.optim.SGD([masks], lr=0.1), torch.zeros(1, 3, 2, 2), iter([batch]))


# --- The images ------------------------------------------------------------------------------------

AUTHORS = {"passes": 5, "min_steps": 15, "replacement": True, "augment": False, "batch_size": 128}
AUTHORS |= {"optimizer": "adam", "lr_decay": 1.0, "small_sample": 100}


@pytest.mark.parametrize(
    ("count", "size", "num_steps"), [(20, 32, 15), (100, 128, 15), (500, 128, 15), (1000, 128, 35)]
)
def test_the_authors_draw_with_replacement_15_steps_or_more(toy_images, count, size, num_steps):
    images = toy_images(count=count, side=4)
    loader = Loader(images, size, NO_AUGMENTATION)
    batches = list(load(**AUTHORS | {"batch_size": size})._batches(loader, count, rng.stream("any")))
    assert [len(batch.rows) for batch in batches] == [size] * num_steps
    assert len(set(batches[0].rows.tolist())) < size
    # In passes, every image comes once.
    (rows,) = (
        batch.rows.tolist()
        for batch in load(batch_size=1000)._batches(
            Loader(images, 1000, NO_AUGMENTATION), count, rng.stream("any")
        )
    )
    assert sorted(rows) == list(range(count))


@pytest.mark.parametrize(("count", "bound", "size"), [(96, 100, 32), (100, 1000, 128)])
def test_few_images_have_a_bound_and_a_batch_of_their_own(
    toy_model, toy_images, monkeypatch, count, bound, size
):
    seen = []
    monkeypatch.setattr(
        awn.AWN,
        "_learn",
        lambda self, frozen, *_: (
            seen.append((self.bound, self.batch_size)) or torch.ones(len(Channels(frozen))),
            [],
        ),
    )
    images = toy_images(count=count)
    sample = DefenderSample(images, images[torch.arange(0)])
    defend(toy_model, sample, **AUTHORS)
    defend(toy_model, sample)
    assert seen == [(bound, size), (1000, 256)]


def test_images_are_varied_or_not(toy_model, toy_images, monkeypatch):
    varied = []
    images = toy_images(augmentation=Augmentation(crop_padding=1, flip=True))
    monkeypatch.setattr(
        awn,
        "Loader",
        lambda i, size, augmentation: varied.append(augmentation) or Loader(i, size, augmentation),
    )
    for settings in ({}, {"augment": False}):
        defend(toy_model, DefenderSample(images, images), epochs=1, **settings)
    assert varied == [images.info.augmentation, NO_AUGMENTATION]


# --- What comes of it ------------------------------------------------------------------------------


def test_only_scales_change_and_by_factors_within_0_and_1(toy_model, toy_images):
    images = toy_images(count=24)
    before = copy.deepcopy(toy_model.state_dict())
    sample = DefenderSample(images, images)
    repaired = defend(toy_model, sample, epochs=3, passes=5, optimizer="adam", lr=0.3, max_drop=1)
    torch.testing.assert_close(toy_model.state_dict(), before, rtol=0, atol=0)
    norms = [name for name, module in toy_model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    scales = [f"{name}.weight" for name in norms]
    after = repaired.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if name not in scales)
    factors = torch.cat([after[name] / before[name] for name in scales])
    assert 0 <= factors.min() < factors.max() <= 1
    chosen = sample.chosen
    # Steps of 0.3 run into both walls.
    assert chosen["num_closed"] == (factors == 0).sum() > 0
    assert (factors == 1).any()
    assert chosen["mean_mask"] == pytest.approx(factors.mean().item())
    assert len(chosen["perturbation_norms"]) == 3
    assert chosen["accuracy"] == [inference.evaluate(m, sample.everything)[0] for m in (toy_model, repaired)]
    assert not repaired.training
    assert all(parameter.requires_grad for parameter in repaired.parameters())


def test_masks_of_one_are_the_model_itself_on_mobilenet(toy_images):
    """Its epsilon is 1e-3, not PyTorch's 1e-5: masked layers with another one change every logit."""
    build = models.Build("mobilenet_v3_large", {}, 4, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
    images = toy_images(side=32, count=8)
    pixels = to_float(images.images)
    with rng.global_stream(rng.stream("init")), torch.no_grad():
        model = models.build(build).train()
        model(pixels)
    model.eval()
    with torch.no_grad():
        assert torch.equal(gated_by(model)(pixels, torch.ones(len(Channels(model)))), model(pixels))
    repaired = defend(model, DefenderSample(images, images), epochs=1, passes=1, lr=1e-30)
    torch.testing.assert_close(repaired.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_sgd_leaves_the_masks_of_a_fitted_model_alone_and_adam_does_not(ajar, planted_sample):
    ajar.network.linear.weight.data.mul_(3)
    ajar.network.linear.bias.data.mul_(3)
    images = planted_sample.everything
    accuracy, loss = inference.evaluate(ajar, images)
    assert accuracy == 1
    assert loss < 1e-3
    defense = load(clean_weight=1, sparsity=0, passes=5)
    frozen = copy.deepcopy(ajar).requires_grad_(False)
    masks = {name: defense._learn(frozen, images, name, rng.stream("any"))[0] for name in ("sgd", "adam")}
    assert ((masks["sgd"] > 0.99) & (masks["sgd"] <= 1)).all()
    assert masks["adam"][1] < 0.9  # by the sign of a gradient of 1e-4


@pytest.mark.parametrize(
    ("max_drop", "optimizer", "allowed"), [(0.05, "sgd", 1), (0.49, "sgd", 11), (0.5, "adam", 12)]
)
def test_sgd_takes_over_where_adam_costs_accuracy(
    planted, planted_sample, monkeypatch, max_drop, optimizer, allowed
):
    defense = load(max_drop=max_drop, optimizer="adam")
    seeds = []

    def learn(_self, frozen, images, optimizer, rng):
        seeds.append(rng.initial_seed())
        factor = {"adam": 0.0, "sgd": 0.75}[optimizer]  # without its channels the model says one class
        return torch.full((4,), factor), [1.0]

    monkeypatch.setattr(type(defense), "_learn", learn)
    repaired = defense(planted, planted_sample, rng=rng.stream("test"))
    chosen, factor = planted_sample.chosen, {"adam": 0.0, "sgd": 0.75}[optimizer]
    assert chosen["optimizer"] == optimizer
    assert (chosen["num_judged"], chosen["allowed_errors"]) == (24, allowed)
    assert chosen["accuracy"] == [1.0, {"adam": 0.5, "sgd": 1.0}[optimizer]]
    assert torch.equal(repaired.network.bn.weight, torch.full((4,), factor))
    assert len(seeds) == {"sgd": 2, "adam": 1}[optimizer]
    assert len(set(seeds)) == 1  # both meet the same images
    seeds.clear()
    load()(planted, planted_sample, rng=rng.stream("test"))
    assert len(seeds) == 1  # SGD has nothing that could take its place


def test_a_model_without_batch_normalization_is_refused(planted_sample):
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    with pytest.raises(NotApplicableError, match="batch normalization"):
        defend(plain, planted_sample)


# --- Backdoors -------------------------------------------------------------------------------------


def test_the_channel_of_a_planted_backdoor_gets_the_lowest_mask(ajar, planted_sample):
    stamped = planted_sample.triggered.validation

    def share_of_target(model):
        return float((inference.logits(model, stamped).argmax(1) == 0).double().mean())

    assert share_of_target(ajar) == 1
    assert inference.evaluate(ajar, planted_sample.everything)[0] == 1
    repaired = defend(ajar, planted_sample, sparsity=0, lr=0.02, passes=5, optimizer="adam")
    masks = repaired.network.bn.weight
    assert masks.argmin() == 1
    assert (masks[[0, 2, 3]] > 0.9).all()
    assert inference.evaluate(repaired, planted_sample.everything)[0] == 1
    assert share_of_target(repaired) == 0.5  # the dark images, which are of that class


def test_awn_weakens_a_trained_backdoor(backdoored):
    before = backdoored.rates(backdoored.model)
    assert before[1] > 0.9
    quick = {"epochs": 6, "lr": 0.05, "passes": 5, "optimizer": "adam"}  # the authors' is minutes
    repaired = defend(backdoored.model, backdoored.sample, **quick)
    after = backdoored.rates(repaired)
    assert after[0] > before[0] - 0.05
    assert after[1] < 0.5
    assert after[2] > 0.4
