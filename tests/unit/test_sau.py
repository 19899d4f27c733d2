"""SAU: the losses against values worked out by hand, the search, and what stays fixed."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

from detrojan import models, registry, rng
from detrojan.defenses.clean_data import sau as sau_module
from detrojan.images import Batch, to_float
from detrojan.learning import training
from detrojan.learning.meter import meter
from detrojan.study.schema import shipped


@pytest.fixture
def batch(sample):
    images = sample.everything
    return Batch(to_float(images.images), images.labels, torch.arange(len(images)))


@pytest.fixture
def wavering(toy_model, batch):
    """Return the toy model with a sharp head: it predicts every class, and brightness flips some images."""
    with torch.no_grad():
        toy_model.network.linear.weight.mul_(20)
        toy_model.network.linear.bias.zero_().sub_(toy_model(batch.images).mean(0))
    return toy_model


def load(**settings):
    return registry.load("defenses", "sau", settings)


def defend(defense, model, clean):
    return defense(model, clean, rng=rng.stream("test"))


def logits_of(probabilities):
    return torch.tensor(probabilities).log()


# --- the losses ------------------------------------------------------------------------------------


def test_divergence_by_hand():
    first = logits_of([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]])
    second = logits_of([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]])
    middle = 0.5 * (0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3))
    middle += 0.5 * (0.9 * math.log(0.9 / 0.7) + 0.1 * math.log(0.1 / 0.3))
    assert middle == pytest.approx(0.10175, abs=1e-5)
    expected = torch.tensor([middle, middle, 0.0])
    torch.testing.assert_close(sau_module.divergence(first, second), expected, rtol=0, atol=1e-6)


def test_divergence_of_certain_opposites_is_log_2_and_of_equals_has_no_gradient():
    sure = torch.tensor([[90.0, -90.0]])
    assert sau_module.divergence(sure, -sure).item() == pytest.approx(math.log(2), abs=1e-5)
    same = torch.randn(8, 5, generator=rng.stream("logits")).requires_grad_()
    value = sau_module.divergence(same, same.detach()).sum()
    assert abs(value.item()) < 1e-6
    (gradient,) = torch.autograd.grad(value, same)
    assert gradient.abs().max() < 1e-6


def test_unlearning_loss_by_hand():
    logits = logits_of([[0.5, 0.3, 0.2], [0.05, 0.05, 0.9], [0.98, 0.01, 0.01], [0.2, 0.6, 0.2]])
    classes, shared = torch.tensor([0, 2, 0, 1]), torch.tensor([True, True, False, False])
    # -log(1 - 0.5) and -log(1 - 0.9), over four images and not over the two that count.
    expected = (0.693147 + 2.302585) / 4
    assert sau_module.unlearning_loss(logits, classes, shared).item() == pytest.approx(expected, abs=1e-5)


def test_unlearning_loss_equals_the_mean_of_the_two_forms_in_the_authors_code():
    q = torch.tensor([1e-6, 5e-4, 0.001, 0.3, 0.9, 0.9999, 1 - 1e-7], dtype=torch.float64)
    logits = torch.stack([q, (1 - q) / 4, 3 * (1 - q) / 4], 1).log()
    every = torch.ones(len(q), dtype=torch.bool)
    value = sau_module.unlearning_loss(logits, torch.zeros(len(q), dtype=torch.int64), every)
    first = (1e-6 + (1 - q).clamp(max=0.999)).log()
    second = (1 + 1e-6 - q.clamp(min=0.001)).log()
    torch.testing.assert_close(value, -(first + second).sum() / 2 / len(q))


def test_unlearning_lowers_q_where_it_counts_and_nowhere_else():
    logits = torch.randn(6, 4, generator=rng.stream("logits"), dtype=torch.float64).requires_grad_()
    classes, shared = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([True] * 4 + [False] * 2)

    def loss(values):
        return sau_module.unlearning_loss(values, classes, shared)

    assert torch.autograd.gradcheck(loss, (logits,))  # against finite differences
    (gradient,) = torch.autograd.grad(loss(logits), logits)
    before, after = (
        F.softmax(values, 1)[torch.arange(6), classes] for values in (logits, logits - 1e-3 * gradient)
    )
    assert (after[:4] < before[:4]).all()
    assert torch.equal(after[4:], before[4:])


def test_unlearning_nothing_is_zero():
    logits = torch.randn(3, 4, generator=rng.stream("logits")).requires_grad_()
    none = torch.zeros(3, dtype=torch.bool)
    value = sau_module.unlearning_loss(logits, torch.zeros(3, dtype=torch.int64), none)
    (gradient,) = torch.autograd.grad(value, logits)
    assert value == 0
    assert (gradient == 0).all()


# --- the search ------------------------------------------------------------------------------------

SHARED = [0.1, 0.8, 0.1]
RESISTED = [0.7, 0.2, 0.1]
OTHERWISE = [0.1, 0.2, 0.7]


def value_of(logits, original, **settings):
    """Return the value of perturbed images whose label, and clean prediction by both models, is 0."""
    zeros = torch.zeros(len(logits), dtype=torch.int64)
    return load(**settings).shared_value(logits_of(logits), logits_of(original), zeros, zeros, zeros)


def test_an_image_that_fools_both_alike_counts_for_nothing():
    assert value_of([SHARED], [SHARED]) is None
    assert value_of([SHARED, SHARED], [SHARED, [0.3, 0.4, 0.3]]) is None


def test_value_of_a_search_by_hand():
    logits = [SHARED, RESISTED, SHARED, SHARED]
    original = [SHARED, RESISTED, RESISTED, OTHERWISE]
    # Cross-entropy of label 0: twice for the second image, once for the third; over 2 × 4.
    adversarial = -3 * math.log(0.7) / 8
    m = [(a + b) / 2 for a, b in zip(SHARED, RESISTED, strict=True)]
    third = sum(
        (a * math.log(a / c) + b * math.log(b / c)) / 2 for a, b, c in zip(SHARED, RESISTED, m, strict=True)
    )
    m = [(a + b) / 2 for a, b in zip(SHARED, OTHERWISE, strict=True)]
    fourth = sum(
        (a * math.log(a / c) + b * math.log(b / c)) / 2 for a, b, c in zip(SHARED, OTHERWISE, m, strict=True)
    )
    expected = 0.01 * adversarial - (third + fourth) / 4
    assert value_of(logits, original).item() == pytest.approx(expected, abs=1e-6)
    only = {"adversarial_weight": 1, "shared_weight": 0}
    assert value_of(logits, original, **only).item() == pytest.approx(adversarial, abs=1e-6)


def test_fooled_means_another_class_than_for_the_clean_image_not_than_the_label():
    zeros, ones = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    wrong = logits_of([SHARED])
    assert load().shared_value(wrong, wrong, zeros, ones, ones) is not None  # class 1, as without it
    assert load().shared_value(wrong, wrong, ones, zeros, zeros) is None


def test_equal_models_share_all_that_flips(wavering, batch):
    # No divergence to climb down: what is left is the cross-entropy of what has not flipped.
    with torch.no_grad():
        classes, logits = wavering(batch.images).argmax(1), wavering(batch.images + 0.2)
    value = load().shared_value(logits, logits, batch.labels, classes, classes)
    kept = logits.argmax(1) == classes
    expected = 0.01 * (kept * F.cross_entropy(logits, batch.labels, reduction="none")).mean()
    assert 0 < kept.sum() < len(kept)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-8)


def other_model(model):
    """Return ``model`` with other weights in its head, so that the two see images differently."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.network.linear.weight.add_(
            0.3 * torch.randn(other.network.linear.weight.shape, generator=rng.stream("head"))
        )
    return other


def test_first_step_of_a_search_by_the_equations(wavering, batch):
    model, original = wavering, other_model(wavering)
    with torch.no_grad():
        clean, original_clean = model(batch.images).argmax(1), original(batch.images).argmax(1)
    found = load(steps=1).perturbation(model, original, batch, original_clean)
    moving = torch.full_like(batch.images, 0.2).requires_grad_()
    logits, others = model(batch.images + moving), original(batch.images + moving)
    adversarial, apart, count = 0.0, 0.0, len(batch.images)
    num_shared = 0
    for i in range(count):
        a, b = int(logits[i].argmax()), int(others[i].argmax())
        if a == clean[i]:
            adversarial = adversarial - F.cross_entropy(logits[i], batch.labels[i]) / (2 * count)
        if b == original_clean[i]:
            adversarial = adversarial - F.cross_entropy(others[i], batch.labels[i]) / (2 * count)
        if a != clean[i] and b != original_clean[i] and a == b:
            num_shared += 1
            continue
        p, q = logits[i].softmax(0), others[i].softmax(0)
        entropies = [(v * v.log()).sum() for v in (p, q, (p + q) / 2)]
        apart = apart + (entropies[0] / 2 + entropies[1] / 2 - entropies[2]) / count
    assert 0 < num_shared < count
    (gradient,) = torch.autograd.grad(0.01 * adversarial + apart, moving)
    expected = (0.2 - 0.2 * gradient.sign()).clamp(-0.2, 0.2)
    # Where a gradient all but cancels, rounding decides its sign.
    assert (found == expected).double().mean() > 0.999


def test_perturbation_stays_within_its_bound_on_a_grid(wavering, batch):
    original = other_model(wavering)
    with torch.no_grad():
        classes = original(batch.images).argmax(1)
    found = load().perturbation(wavering, original, batch, classes)
    torch.testing.assert_close(found.abs().max(), torch.tensor(0.2))
    assert {round(value, 4) for value in found.unique().tolist()} <= {-0.2, 0.0, 0.2}
    assert found.unique().numel() > 1
    assert all(p.grad is None for model in (wavering, original) for p in model.parameters())


class Threshold(nn.Module):
    """Two classes: 1 where the mean of an image is above one half."""

    def forward(self, images):
        score = 10 * (images.mean((1, 2, 3)) - 0.5)
        return torch.stack([-score, score], 1)


def test_search_starts_with_all_pixels_up_and_ends_when_all_images_are_shared():
    network = models.Classifier(Threshold(), models.Build("threshold", {}, 2, (0.0,) * 3, (1.0,) * 3))
    images = torch.full((4, 3, 8, 8), 0.4)
    zeros = torch.zeros(4, dtype=torch.int64)
    with meter(torch.device("cpu")) as cost:
        found = load().perturbation(network, network, Batch(images, zeros, torch.arange(4)), zeros)
    assert torch.equal(found, torch.full_like(images, 0.2))  # 0.6: both models say 1
    # One pass of the clean images and one of the first perturbed ones by either model; no step.
    assert (cost.forward_passes, cost.backward_passes) == (3 * 4, 0)


# --- the whole -------------------------------------------------------------------------------------


def test_statistics_and_the_original_stay_as_they_were(wavering, sample, monkeypatch):
    originals, modes = [], []
    search = sau_module.SAU.perturbation

    def spy(self, model, original, batch, original_classes):
        originals.append(original)
        with torch.no_grad():
            assert torch.equal(original(batch.images).argmax(1), original_classes)
        return search(self, model, original, batch, original_classes)

    def note(module, _inputs, _output):
        if isinstance(module, models.Classifier):
            modes.append(module.training)

    monkeypatch.setattr(sau_module.SAU, "perturbation", spy)
    handle = register_module_forward_hook(note)
    try:
        repaired = defend(load(epochs=3, batch_size=16, lr=1e-2), wavering, sample)
    finally:
        handle.remove()
    assert not any(modes)
    assert len(originals) == 3 * 3
    torch.testing.assert_close(originals[-1].state_dict(), wavering.state_dict(), rtol=0, atol=0)
    assert all(p.grad is None for p in originals[-1].parameters())
    buffers = dict(wavering.named_buffers())
    assert any(name.endswith("num_batches_tracked") for name in buffers)
    for name, value in repaired.named_buffers():
        assert torch.equal(value, buffers[name]), name
    for (name, before), after in zip(wavering.named_parameters(), repaired.parameters(), strict=True):
        assert not torch.equal(before, after), name


def test_a_step_follows_adam_on_both_losses(wavering, sample, batch):
    chosen = sample.chosen
    repaired = defend(load(epochs=1, lr=1e-3), wavering, sample)
    expected = copy.deepcopy(wavering)
    with torch.no_grad():
        classes = wavering(batch.images).argmax(1)
    attacked = batch.images + load().perturbation(wavering, copy.deepcopy(wavering), batch, classes)
    with torch.no_grad():
        wrong = wavering(attacked).argmax(1)
    shared = (wrong != batch.labels) & (wrong != classes)
    loss = F.cross_entropy(expected(batch.images), batch.labels)
    loss = loss + sau_module.unlearning_loss(expected(attacked), wrong, shared)
    loss.backward()
    assert 0 < shared.sum() < len(shared)
    assert chosen == {"num_unlearned": [int(shared.sum())] * 2, "num_images": len(shared)}
    for before, after, other in zip(
        wavering.parameters(), repaired.parameters(), expected.parameters(), strict=True
    ):
        # The first step of Adam is the learning rate along the sign of the gradient.
        clear = other.grad.abs() > 1e-4
        torch.testing.assert_close(
            (after - before)[clear], -1e-3 * other.grad.sign()[clear], rtol=1e-2, atol=0
        )


def test_optimizer_is_amsgrad_without_decay(toy_model, sample, monkeypatch):
    parts = []
    descend = training.descend

    def spy(named, *arguments, **options):
        parts.extend(named.values())
        return descend(named, *arguments, **options)

    monkeypatch.setattr(training, "descend", spy)
    defend(load(epochs=2, steps=1), toy_model, sample)
    (part,) = parts
    assert isinstance(part.optimizer, torch.optim.Adam)
    assert part.optimizer.defaults["amsgrad"]
    assert (part.optimizer.defaults["weight_decay"], part.optimizer.defaults["betas"]) == (0, (0.9, 0.999))
    assert [part.lr_at(epoch) for epoch in (0, 50, 99)] == [1e-4] * 3


def test_passes_of_an_epoch(toy_model, sample):
    stubborn = copy.deepcopy(toy_model)
    stubborn.network.linear.bias.data[0] = 1e4  # nothing flips it, so no search ends early
    with meter(torch.device("cpu")) as cost:
        repaired = defend(load(epochs=2, batch_size=16), stubborn, sample)
    # Each image once by the original; then 5 (2f + 2b), f, and 3f + 2b.
    assert cost.forward_passes == 40 + 2 * 40 * 14
    assert cost.backward_passes == 2 * 40 * 12
    assert sample.chosen == {"num_unlearned": [0, 0], "num_images": 40}
    assert all(p.isfinite().all() for p in repaired.parameters())


def test_gradients_survive_lower_precision(toy_model, batch):
    # Autocast keeps copies of weights; one made without gradients must not serve the step.
    original = copy.deepcopy(toy_model).requires_grad_(False)
    zeros = torch.zeros_like(batch.labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = load(steps=1).perturbation(toy_model, original, batch, zeros)
        loss = F.cross_entropy(toy_model(batch.images + found), batch.labels)
    loss.backward()
    assert found.dtype == torch.float32
    for name, parameter in toy_model.named_parameters():
        assert parameter.grad is not None, name


def test_tiny_imagenet_has_fewer_rounds():
    assert shipped("defenses", "sau").resolve({"num_classes": 200}) == {"epochs": 20}
    assert shipped("defenses", "sau").resolve({"num_classes": 10}) == {}
    assert load().epochs == 100


def test_repairs_a_patch_backdoor_by_unlearning(backdoored):
    settings = {"epochs": 8, "batch_size": 16, "lr": 3e-3, "steps": 4}
    repaired = defend(load(**settings), backdoored.model, backdoored.sample)
    before, after = backdoored.rates(backdoored.model), backdoored.rates(repaired)
    assert before[1] > 0.9
    assert after[0] > 0.9
    assert after[1] < 0.3
    assert after[2] > 0.6
    without = load(**(settings | {"steps": 1, "unlearning_weight": 1e-9}))
    tuned = backdoored.rates(defend(without, backdoored.model, backdoored.sample))
    assert after[1] < tuned[1] - 0.3  # it is the unlearning that removes it
