"""PBE: the attack against a model whose answer is known, and the passes that it takes turns with."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

from detrojan import models, registry, rng
from detrojan.images import Batch, to_float
from detrojan.learning import training
from detrojan.learning.meter import meter
from detrojan.settings import Augmentation, Optimization
from detrojan.stages import sampling

AUGMENTATION = Augmentation(crop_padding=1)


@pytest.fixture
def sample(toy_images):
    return sampling.draw_samples(toy_images(count=48, augmentation=AUGMENTATION), "toy", 10, [0])[0]


def load(name="pbe", **settings):
    return registry.load("defenses", name, settings)


def defend(defense, model, clean):
    return defense(model, clean, rng=rng.stream("test"))


def batch_of(images):
    return Batch(to_float(images.images), images.labels, torch.arange(len(images)))


class Linear(nn.Module):
    """Two classes: the logit of class 1 is a weighted sum of all pixels, that of class 0 is 0."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images):
        score = (images * self.weight).sum((1, 2, 3))
        return torch.stack([torch.zeros_like(score), score], 1)


def test_attack_of_a_linear_model_is_the_sign_of_its_weights():
    model = Linear(torch.randn(3, 4, 4, generator=rng.stream("weights")))
    images = torch.full((2, 3, 4, 4), 0.5)
    images[:, 0, 0, 0], images[:, 1, 1, 1] = 0.0, 1.0  # where one way leads out of [0, 1]
    batch = Batch(images, torch.tensor([0, 1]), torch.arange(2))
    # Ten steps of a fifth of eps lead from anywhere in the box to its corner.
    attacked = load(eps=0.02, steps=10).attack(model, batch, rng=rng.stream("starts"))
    towards_one = (images[0] + 0.02 * model.weight.sign()).clamp(0, 1)
    towards_zero = (images[1] - 0.02 * model.weight.sign()).clamp(0, 1)
    torch.testing.assert_close(attacked, torch.stack([towards_one, towards_zero]).detach())
    assert model.weight.grad is None


def test_attack_is_one_pgd_step_from_a_random_start(toy_model, sample):
    batch = batch_of(sample.train)
    defense = load(eps=0.1, step=0.3, steps=1)
    attacked = defense.attack(toy_model, batch, rng=rng.stream("starts"))
    start = (torch.rand(batch.images.shape, generator=rng.stream("starts")) * 2 - 1) * 0.1
    moving = ((batch.images + start).clamp(0, 1)).requires_grad_()
    F.cross_entropy(toy_model(moving), batch.labels).backward()
    stepped = moving.detach() + 0.03 * moving.grad.sign()
    expected = (batch.images + (stepped - batch.images).clamp(-0.1, 0.1)).clamp(0, 1)
    torch.testing.assert_close(attacked, expected, rtol=0, atol=1e-6)


def test_attack_stays_valid_fools_and_leaves_no_trace(toy_model, sample):
    fitted = defend(load("ft", epochs=20, lr=0.05), toy_model, sample)
    before = copy.deepcopy(fitted.state_dict())
    gradients = [p.grad.clone() for p in fitted.parameters()]
    batch = batch_of(sample.train)
    attacked = load().attack(fitted, batch, rng=rng.stream("starts"))
    moved = (attacked - batch.images).abs()
    assert moved.max() <= 0.02 + 1e-7
    assert moved.mean() > 0.01
    assert 0 <= attacked.min() <= attacked.max() <= 1
    at_random = 0.02 * torch.randn(batch.images.shape, generator=rng.stream("noise")).sign()
    with torch.no_grad():
        seen = (batch.images, attacked, (batch.images + at_random).clamp(0, 1))
        clean, worst, noisy = (float(F.cross_entropy(fitted(images), batch.labels)) for images in seen)
    assert worst - clean > 0.05
    assert worst - clean > 4 * abs(noisy - clean)
    torch.testing.assert_close(fitted.state_dict(), before, rtol=0, atol=0)
    for parameter, gradient in zip(fitted.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_with_no_perturbation_an_epoch_is_two_of_fine_tuning(toy_model, sample):
    # Bit by bit, so running statistics saw the training batches and nothing of the attack.
    repaired = defend(load(eps=0, epochs=2, batch_size=16), toy_model, sample)
    expected = copy.deepcopy(toy_model)
    one_epoch = Optimization(epochs=1, batch_size=16, lr=0.01, schedule="constant")
    for epoch in range(2):
        for name in ("adversarial", "clean"):
            stream = rng.child(rng.stream("test"), name, epoch)
            training.fit(expected, sample.everything, one_epoch, rng=stream, augmentation=AUGMENTATION)
    torch.testing.assert_close(repaired.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_momentum_does_not_outlast_a_pass(toy_model, toy_images):
    clean = sampling.draw_samples(toy_images(count=48), "toy", 10, [0])[0]
    repaired = defend(load(eps=0, epochs=2), toy_model, clean)
    # One batch a pass, and none of them remembers another: four steps of plain gradient descent.
    expected = copy.deepcopy(toy_model).train()
    batch = batch_of(clean.everything)
    for _ in range(4):
        expected.zero_grad()
        F.cross_entropy(expected(batch.images), batch.labels).backward()
        with torch.no_grad():
            for parameter in expected.parameters():
                parameter.sub_(0.01 * (parameter.grad + 5e-4 * parameter))
    torch.testing.assert_close(repaired.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)


def test_modes_and_passes_of_an_epoch(toy_model, sample):
    modes = []

    def note(module, _inputs, _output):
        if isinstance(module, models.Classifier):
            modes.append(module.training)

    handle = register_module_forward_hook(note)
    try:
        with meter(torch.device("cpu")) as cost:
            repaired = defend(load(epochs=3, batch_size=20), toy_model, sample)
    finally:
        handle.remove()
    # 40 images, two batches: attack in eval mode, step in training mode, then two clean steps.
    assert modes == (([False] * 7 + [True]) * 2 + [True] * 2) * 3
    assert (cost.forward_passes, cost.backward_passes) == (3 * 40 * 9, 3 * 40 * 9)
    tracked = [
        m.num_batches_tracked for m in (toy_model.network.layer1[0].bn1, repaired.network.layer1[0].bn1)
    ]
    assert tracked[1] - tracked[0] == 3 * 2 * 2


def test_repairs_a_patch_backdoor_and_resists_attacks(backdoored):
    settings = {"batch_size": 16, "lr": 0.05}
    repaired = defend(
        load(epochs=4, eps=0.1, steps=4, step=0.5, **settings), backdoored.model, backdoored.sample
    )
    tuned = defend(load("ft", epochs=8, **settings), backdoored.model, backdoored.sample)
    before, after = backdoored.rates(backdoored.model), backdoored.rates(repaired)
    assert before[1] > 0.9
    assert after[0] > 0.9
    assert after[1] < 0.3
    assert after[2] > 0.6

    def resists(model):
        batch = batch_of(backdoored.test)
        attacked = load(eps=0.1).attack(model, batch, rng=rng.stream("judge"))
        with torch.no_grad():
            return float((model(attacked).argmax(1) == batch.labels).double().mean())

    # What sets it apart from fine-tuning of the same length: adversarial examples get their labels.
    assert resists(repaired) > resists(tuned) + 0.2
