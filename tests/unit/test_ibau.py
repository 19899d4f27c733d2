"""I-BAU: the hypergradient against known ones, and each step of a round against its equation."""

import copy
import dataclasses
import functools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detrojan import models, rng
from detrojan.defenses.clean_data import ibau as module
from detrojan.defenses.clean_data.ibau import IBAU, hypergradient, twice_differentiable
from detrojan.images import Batch, Loader, to_float
from detrojan.learning import inference
from detrojan.settings import NO_AUGMENTATION, Augmentation
from detrojan.stages import sampling
from detrojan.study import protocols

FACTS = {"num_classes": 10, "image_size": 32, "architecture": "preactresnet18", "attack": "badnets"}
FACTS |= {"ratio": 0.1, "seed": 0, "spc": 10}


@pytest.fixture
def sample(toy_images):
    """Return 32 images, 8 a class, that are cropped and flipped at random."""
    images = toy_images(count=40, augmentation=Augmentation(crop_padding=1, flip=True))
    return sampling.draw_samples(images, "toy", 8, [0])[0]


def defend(clean, model, **settings):
    return IBAU(**settings)(model, clean, rng=rng.stream("test"))


def in_double(*shape, name):
    return torch.randn(*shape, generator=rng.stream(name), dtype=torch.float64)


# --- The hypergradient -----------------------------------------------------------------------------


@dataclasses.dataclass
class Quadratic:
    """Inner loss ½ dᵀA d - dᵀB w, at its minimum d = A⁻¹B w; outer loss ½|d - c|² + ½|w|²."""

    a: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor
    w: torch.Tensor

    def inner(self, d):
        return d @ self.a @ d / 2 - d @ self.b @ self.w

    def outer(self, d):
        return (d - self.c).square().sum() / 2 + self.w.square().sum() / 2

    @property
    def minimum(self):
        return torch.linalg.solve(self.a, self.b @ self.w.detach())

    def gradient(self, iterations, step=0.3):
        (gradient,) = hypergradient(
            self.outer, self.inner, self.minimum, [self.w], iterations=iterations, step=step
        )[1]
        return gradient


@pytest.fixture
def quadratic():
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -2.0, 0.5], [0.3, 1.0, 2.0]], dtype=torch.float64)
    c, w = torch.tensor([3.0, -1.0]).double(), torch.tensor([1.0, 2.0, -1.0]).double().requires_grad_()
    return Quadratic(a, b, c, w)


def test_hypergradient_of_a_quadratic_comes_to_the_implicit_gradient(quadratic):
    # w + Bᵀ A⁻¹ (d - c), by the implicit function theorem.
    away = torch.linalg.solve(quadratic.a, quadratic.minimum - quadratic.c)
    exact = quadratic.w.detach() + quadratic.b.T @ away
    errors = [float((quadratic.gradient(k) - exact).norm()) for k in (0, 1, 5, 20, 200)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1
    assert errors[-1] < 1e-9
    assert quadratic.w.grad is None


def test_hypergradient_after_few_iterations_is_the_truncated_sum(quadratic):
    # v after k iterations: the sum of (I - step A)^i (d - c) for i < k.
    pull, shrink = quadratic.minimum - quadratic.c, torch.eye(2).double() - 0.3 * quadratic.a
    v = torch.zeros(2).double()
    for iterations in range(6):
        expected = quadratic.w.detach() + 0.3 * quadratic.b.T @ v
        torch.testing.assert_close(quadratic.gradient(iterations), expected, rtol=1e-12, atol=1e-12)
        v = shrink @ v + pull


def test_hypergradient_returns_the_outer_loss(quadratic):
    loss, _ = hypergradient(
        quadratic.outer, quadratic.inner, quadratic.minimum, [quadratic.w], iterations=2, step=0.3
    )
    assert not loss.requires_grad
    assert float(loss) == pytest.approx(quadratic.outer(quadratic.minimum).item())


def classifier(*layers):
    """Return a classifier of 8×8 pixels, 3 classes, whose trunk ends in ``layers``; in double precision."""
    trunk = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 3), *layers
    network = nn.Sequential(*trunk, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    spec = models.Build("toy", {}, 3, (0.5,) * 3, (0.25,) * 3)
    model = models.Classifier(network, spec).double().eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.data = 0.5 * in_double(*parameter.shape, name=f"weights {number}")
    return model


def test_hypergradient_is_the_slope_of_the_outer_loss_through_the_inner_minimum():
    # A strong penalty makes the inner loss convex, and no activation has a kink: its minimum moves smoothly.
    model, defense, step = classifier(nn.SiLU()), IBAU(penalty=0.5), 0.3
    images, labels = in_double(6, 3, 8, 8, name="images").sigmoid(), torch.arange(6) % 3
    mask = torch.tensor([1.0, 0, 1, 1, 0, 0]).double().view(-1, 1, 1, 1)
    inner = functools.partial(defense.inner_loss, model, images, labels)
    outer = functools.partial(module._outer_loss, model, Batch(images, labels, labels), mask)
    parameters = list(model.parameters())
    directions = [in_double(*p.shape, name=f"direction {n}") for n, p in enumerate(parameters)]

    def minimum():
        perturbation = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
        for _ in range(250):
            moving = perturbation.requires_grad_()
            (slope,) = torch.autograd.grad(inner(moving), moving)
            perturbation = (perturbation - step * slope).detach()
        return perturbation

    def along(iterations):
        _, gradients = hypergradient(outer, inner, minimum(), parameters, iterations=iterations, step=step)
        return sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True))

    def moved(distance):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=distance)
        return outer(minimum()).item()

    implicit, direct = along(250), along(0)
    slope = (moved(1e-5) - moved(-2e-5)) / 2e-5
    assert implicit == pytest.approx(slope, rel=1e-5)
    assert abs(direct - slope) > 0.5 * abs(slope)  # holding the perturbation is no approximation here


# --- Hard sigmoids ---------------------------------------------------------------------------------


def test_hard_sigmoids_are_rewritten_for_a_while():
    model = classifier(nn.Hardsigmoid(inplace=True), nn.Sequential(nn.Hardsigmoid()))
    images = in_double(4, 3, 8, 8, name="images").sigmoid()
    before, modules = model(images), list(model.modules())

    def second_derivatives():
        inputs = images.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(inputs).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(slope.sum(), inputs)

    with pytest.raises(RuntimeError, match="hardsigmoid_backward is not implemented"):
        second_derivatives()

    def interrupted():
        with twice_differentiable(model):
            torch.testing.assert_close(model(images), before, rtol=1e-12, atol=1e-12)
            second_derivatives()
            raise KeyError  # the modules come back even so

    with pytest.raises(KeyError):
        interrupted()
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]


def test_rewritten_hard_sigmoid_is_the_same_function():
    inputs = torch.linspace(-5, 5, 1001, requires_grad=True)
    rewritten, original = module._HardSigmoid()(inputs), F.hardsigmoid(inputs)
    torch.testing.assert_close(rewritten, original)
    slopes = [torch.autograd.grad(y.sum(), inputs)[0] for y in (rewritten, original)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize(
    "layer",
    [nn.Hardswish(), nn.SiLU(), module._HardSigmoid(), nn.BatchNorm2d(2).eval(), nn.MaxPool2d(2)],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_of_the_architectures_have_right_second_derivatives(layer):
    inputs = 2 * in_double(3, 2, 4, 4, name="inputs")
    assert torch.autograd.gradgradcheck(layer.double(), inputs.requires_grad_())


# --- The perturbation ------------------------------------------------------------------------------


def linear_classifier():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with torch.no_grad():
        network[1].weight.copy_(in_double(3, 12, name="linear"))
    return models.Classifier(network, models.Build("linear", {}, 3, (0.0,) * 3, (1.0,) * 3)).eval()


def batches_of(count):
    images = in_double(count, 5, 3, 2, 2, name="pixels").sigmoid().float()
    # Labels that no network gave: the perturbation should lead away from predictions.
    return [Batch(some, torch.full((5,), 2), torch.arange(5)) for some in images]


def test_perturbation_ascends_the_loss_of_the_predictions_a_step_a_batch():
    model, defense = linear_classifier(), IBAU(inner_lr=0.7, penalty=0.05)
    weight = model.network[1].weight.detach()
    expected = torch.zeros(12)
    for batch in batches_of(3):
        with torch.no_grad():
            predicted = model(batch.images).argmax(1)
            probabilities = model(batch.images + expected.view(1, 3, 2, 2)).softmax(1)
        ascent = ((probabilities - F.one_hot(predicted, 3)) @ weight).mean(0)
        expected = expected + 0.7 * (ascent - 0.1 * expected)
    perturbation = defense.perturb(model, batches_of(3))
    assert perturbation.shape == (1, 3, 2, 2)
    torch.testing.assert_close(perturbation.flatten(), expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_defaults_are_the_published_steps_behind_a_normalization(toy_images):
    # The same network reads images divided by 1/4: there lr is 10 and the penalty 0.001.
    inside = linear_classifier()
    outside = models.Classifier(inside.network, dataclasses.replace(inside.build, std=(0.25,) * 3))
    batches = batches_of(3)
    normalized = [dataclasses.replace(batch, images=batch.images / 0.25) for batch in batches]
    theirs = IBAU(units="pixels").perturb(inside, normalized)
    ours = IBAU().in_pixels(with_deviation(toy_images, 0.25, 0.25, 0.25))
    torch.testing.assert_close(ours.perturb(outside, batches), 0.25 * theirs)
    assert ours.fixed_point_step == 0.1 * 0.25**2


def with_deviation(toy_images, *std):
    return dataclasses.replace(toy_images().info, std=std)


@pytest.mark.parametrize(
    ("protocol", "std", "expected"),
    [
        ("survey", (0.5, 0.5, 0.5), (2.5, 0.004, 0.025)),
        # The mean of the squares, 0.18, and not the square of a mean.
        ("survey", (0.1, 0.2, 0.7), (1.8, 0.001 / 0.18, 0.018)),
        ("survey", (1.0, 1.0, 1.0), (10, 0.001, 0.1)),  # no normalization
        ("paper", (0.5, 0.5, 0.5), (10, 0.001, 0.1)),
        ("paper", (1.0, 1.0, 1.0), (10, 0.001, 0.1)),
    ],
)
def test_steps_follow_the_deviation_of_the_images_and_no_name(toy_images, protocol, std, expected):
    defense = IBAU(**protocols.settings("ibau", protocol, FACTS))
    found = defense.in_pixels(with_deviation(toy_images, *std))
    assert (found.inner_lr, found.penalty, found.fixed_point_step) == pytest.approx(expected)
    assert found.in_pixels(with_deviation(toy_images, *std)) == found
    assert found.model_copy(update=defense.model_dump()) == defense  # nothing else has changed


@pytest.mark.parametrize("protocol", ["survey", "paper"])
def test_large_images_take_fewer_in_the_inner_loss_under_every_protocol(protocol):
    inner = [
        protocols.settings("ibau", protocol, FACTS | {"image_size": side})["inner_images"]
        for side in (32, 64)
    ]
    assert inner == [256, 128]


def test_a_run_takes_the_steps_of_its_images(toy_model, toy_images):
    """The same pixels under two deviations: where they differ fourfold, so do the first steps, 16 times."""
    norms = []
    for deviation in (0.25, 1.0):
        images = toy_images(count=40)
        images = dataclasses.replace(images, info=with_deviation(toy_images, *[deviation] * 3))
        clean = sampling.draw_samples(images, "toy", 8, [0])[0]
        defend(clean, toy_model, rounds=1, iterations=0, penalty=0.0)
        norms += clean.chosen["perturbation_norms"]
    assert norms[1] == pytest.approx(16 * norms[0], rel=1e-4)


def test_loss_at_no_perturbation_can_be_differentiated_twice(toy_model, sample):
    images = to_float(sample.train.images[:4])
    zero = torch.zeros(1, *images.shape[1:], requires_grad=True)
    loss = IBAU().inner_loss(toy_model, images, sample.train.labels[:4], zero)
    (slope,) = torch.autograd.grad(loss, zero, create_graph=True)
    (bent,) = torch.autograd.grad(slope.square().sum(), zero)
    assert bent.isfinite().all()


# --- A round ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "count", "stamped"),
    [(0.01, 20, 1), (0.01, 99, 1), (0.01, 256, 2), (0.01, 300, 3), (0.29, 100, 29), (1, 7, 7), (0, 256, 0)],
)
def test_a_share_of_a_batch_is_stamped_but_one_at_least(share, count, stamped):
    assert IBAU(share=share).num_stamped(count) == stamped
    mask = module._mask(count, stamped, rng.stream("mask"))
    assert mask.sum() == stamped
    assert set(mask.unique().tolist()) <= {0.0, 1.0}


def test_without_stamps_it_is_adam_on_the_same_batches_every_round(toy_model, sample):
    """Augmentation is on: batches drawn anew in the second round would give other weights."""
    repaired = defend(sample, toy_model, rounds=2, batch_size=12, share=0, lr=1e-3)
    expected = copy.deepcopy(toy_model)
    optimizer = torch.optim.Adam(expected.parameters(), lr=1e-3, amsgrad=True)
    images = sample.everything
    loader = Loader(images, 12, images.info.augmentation)
    batches = list(loader.epoch(rng.child(rng.stream("test"), "outer")))
    assert len(batches) == 3
    for batch in batches + batches:
        optimizer.zero_grad()
        F.cross_entropy(expected(batch.images), batch.labels).backward()
        optimizer.step()
    torch.testing.assert_close(repaired.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)
    assert sample.chosen["num_stamped"] == [0, 0, 0]


def test_without_stamps_the_authors_is_plain_adam_on_plain_batches_in_one_order(toy_model, sample):
    """For four steps a round there are two passes over three batches; crops and flips are off."""
    own = {**protocols.settings("ibau", "paper", FACTS), "batch_size": 12, "min_steps": 4, "rounds": 2}
    own["share"] = 0
    repaired = defend(sample, toy_model, **own)
    expected = copy.deepcopy(toy_model)
    optimizer = torch.optim.Adam(expected.parameters(), lr=1e-3)
    loader = Loader(sample.everything, 12, NO_AUGMENTATION)
    batches = list(loader.epoch(rng.child(rng.stream("test"), "outer")))
    assert len(batches) == 3
    for batch in batches * 4:
        optimizer.zero_grad()
        F.cross_entropy(expected(batch.images), batch.labels).backward()
        optimizer.step()
    torch.testing.assert_close(repaired.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fixed", [False, True])
def test_the_perturbation_sees_new_batches_or_those_that_unlearn_it(toy_model, sample, monkeypatch, fixed):
    seen = {"inner": [], "outer": []}

    def perturb(self, model, batches):
        seen["inner"].append([batch.rows.tolist() for batch in batches])
        return torch.zeros(1, 3, 8, 8)

    def outer_loss(model, batch, mask, perturbation):
        seen["outer"].append(batch.rows.tolist())
        return model(batch.images).square().sum()

    monkeypatch.setattr(IBAU, "perturb", perturb)
    monkeypatch.setattr(module, "_outer_loss", outer_loss)
    defend(sample, toy_model, rounds=2, batch_size=12, min_steps=5, iterations=0, fixed_batches=fixed)
    assert [len(batches) for batches in seen["inner"]] == [6, 6]  # two passes over three batches
    outer = seen["outer"]
    assert len(outer) == 12
    assert outer[:3] == outer[3:6] == outer[6:9] == outer[9:]
    inner = [batches[start : start + 3] for batches in seen["inner"] for start in (0, 3)]
    assert all((batches == outer[:3]) == fixed for batches in inner)
    assert len({str(batches) for batches in inner}) == (1 if fixed else 4)


def test_the_step_holds_the_implicit_term(toy_model, sample, monkeypatch):
    """A round's steps are Adam's on the hypergradient, with the first batch's inner loss throughout."""
    settings = {"rounds": 1, "batch_size": 12, "share": 0.5, "inner_lr": 5.0, "fixed_point_step": 5.0}
    settings["units"] = "pixels"
    calls = []

    def recorded(outer, inner, perturbation, parameters, **kwargs):
        calls.append((inner(perturbation).item(), perturbation, kwargs))
        return hypergradient(outer, inner, perturbation, parameters, **kwargs)

    monkeypatch.setattr(module, "hypergradient", recorded)
    repaired = defend(sample, toy_model, inner_images=9, **settings)
    assert [call[2] for call in calls] == [{"iterations": 5, "step": 5.0}] * 3
    assert all(call[1] is calls[0][1] for call in calls)  # one perturbation a round
    loader = Loader(sample.everything, 12, sample.everything.info.augmentation)
    first = next(loader.epoch(rng.child(rng.stream("test"), "outer")))
    loss = IBAU().inner_loss(toy_model, first.images[:9], first.labels[:9], calls[0][1])
    assert calls[0][0] == pytest.approx(loss.item(), rel=1e-5)
    assert sample.chosen["num_stamped"] == [6, 6, 4]
    assert sample.chosen["inner_images"] == 9
    assert sample.chosen["perturbation_norms"] == [pytest.approx(float(calls[0][1].norm()))]
    direct = defend(sample, toy_model, inner_images=9, iterations=0, **settings)
    assert not torch.equal(repaired.network.linear.weight, direct.network.linear.weight)


def test_statistics_modes_and_modules_stay(toy_images):
    images = toy_images(num_classes=3, count=24)
    clean = sampling.draw_samples(images, "toy", 8, [0])[0]
    model = classifier(nn.Hardsigmoid()).float()
    types = [type(m) for m in model.modules()]
    repaired = defend(clean, model, rounds=1, lr=0.1)
    assert [type(m) for m in repaired.modules()] == types
    assert not any(m.training for m in repaired.modules())
    assert all(p.grad is None for p in (*repaired.parameters(), *model.parameters()))
    torch.testing.assert_close(dict(repaired.named_buffers()), dict(model.named_buffers()), rtol=0, atol=0)
    for (name, before), after in zip(model.named_parameters(), repaired.parameters(), strict=True):
        assert not torch.equal(before, after), name


def test_a_collapse_is_reported_and_not_hidden(backdoored):
    clean = backdoored.sample
    collapsed = defend(clean, backdoored.model, rounds=1, iterations=0, lr=1.0)
    before, after = clean.chosen["sample_accuracy"]
    assert before > 0.9
    assert after == inference.evaluate(collapsed, clean.everything)[0] < 0.4
    assert clean.chosen["collapsed"]
    kept = dataclasses.replace(clean, chosen={})
    defend(kept, backdoored.model, rounds=1, iterations=0)
    assert kept.chosen["sample_accuracy"][0] == before
    assert not kept.chosen["collapsed"]


def test_a_loss_that_is_not_finite_stops_it(toy_model, sample):
    broken = copy.deepcopy(toy_model)
    broken.network.linear.bias.data[0] = math.inf
    with pytest.raises(ArithmeticError, match="not finite"):
        defend(sample, broken, rounds=1)


def test_it_removes_a_patch_backdoor_and_its_batches_alone_do_not(backdoored):
    """One of ten images a step carries the perturbation; the same steps without it are the control."""
    assert backdoored.rates(backdoored.model)[1] > 0.95
    settings = {"rounds": 8, "batch_size": 10, "inner_lr": 5.0, "penalty": 0.1, "iterations": 2, "lr": 2e-3}
    settings["units"] = "pixels"
    accuracy, success, recovery = backdoored.rates(defend(backdoored.sample, backdoored.model, **settings))
    assert backdoored.sample.chosen["num_stamped"] == [1] * 10
    assert success < 0.3
    assert accuracy > 0.85
    assert recovery > 0.6
    tuned = defend(backdoored.sample, backdoored.model, share=0, **(settings | {"iterations": 0}))
    assert backdoored.rates(tuned)[1] > success + 0.3
