"""FT-SAM: the adaptive step by hand and against a slow copy of its definition."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detrojan import registry, rng
from detrojan.defenses.clean_data import ft_sam as sam_module
from detrojan.images import to_float
from detrojan.learning import training
from detrojan.study import protocols


def load(name="ft_sam", **settings):
    return registry.load("defenses", name, settings)


def defend(defense, model, clean):
    return defense(model, clean, rng=rng.stream("test"))


def two_weights(**settings):
    """Return weights 2 and -1, their optimizer, and the loss a²/2 + 3b, whose gradient is (a, 3)."""
    a, b = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([[-1.0]]))
    optimizer = sam_module.AdaptiveSAM([a, b], **settings)
    return a, b, optimizer, lambda: (a**2 / 2).sum() + 3 * b.sum()


# --- The step --------------------------------------------------------------------------------------


def test_a_step_on_two_weights_is_that_worked_out_by_hand():
    a, b, optimizer, loss = two_weights(rho=0.5, lr=0.1, momentum=0.9, weight_decay=0.01)
    optimizer.perturb(loss())
    # g = (2, 3), |w| g = (4, 3), n = 5, and so e = 0.5 (4·2, 1·3) / 5 = (0.8, 0.3).
    assert (a.item(), b.item()) == (pytest.approx(2.8), pytest.approx(-0.7))
    assert a.grad is None
    loss().backward()
    optimizer.step()
    # g' = (2.8, 3), with weight decay of the weights themselves (2.82, 2.99).
    assert (a.item(), b.item()) == (pytest.approx(1.718), pytest.approx(-1.299))
    optimizer.zero_grad()
    optimizer.perturb(loss())
    norm = math.hypot(1.718 * 1.718, 1.299 * 3)
    worst = 1.718 + 0.5 * 1.718**2 * 1.718 / norm
    assert a.item() == pytest.approx(worst)
    loss().backward()
    optimizer.step()
    velocity = 0.9 * 2.82 + worst + 0.01 * 1.718
    assert a.item() == pytest.approx(1.718 - 0.1 * velocity)


def test_the_perturbation_has_size_rho_relative_to_the_weights(toy_model, sample):
    model = copy.deepcopy(toy_model).train()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = sam_module.AdaptiveSAM(list(model.parameters()), rho=2, lr=0.1)
    images = sample.everything
    optimizer.perturb(F.cross_entropy(model(to_float(images.images)), images.labels))
    relative = [
        ((after.detach() - old) / old)[old != 0].double().flatten()
        for old, after in zip(before, model.parameters(), strict=True)
    ]
    assert torch.cat(relative).norm().item() == pytest.approx(2, rel=1e-4)
    for old, after in zip(before, model.parameters(), strict=True):
        assert (after[old == 0] == 0).all()  # a weight of zero has no size to be moved by


def test_weights_are_put_back_bit_for_bit(toy_model, sample):
    model = copy.deepcopy(toy_model).train()
    optimizer = sam_module.AdaptiveSAM(list(model.parameters()), rho=2, lr=0.0)
    images = sample.everything
    optimizer.perturb(F.cross_entropy(model(to_float(images.images)), images.labels))
    assert not torch.equal(model.network.linear.weight, toy_model.network.linear.weight)
    F.cross_entropy(model(to_float(images.images)), images.labels).backward()
    optimizer.step()
    for (name, before), after in zip(toy_model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(before, after), name


def test_no_gradient_is_no_perturbation():
    a, b, optimizer, loss = two_weights(rho=0.5, lr=0.1)
    optimizer.perturb(0 * loss())
    assert (a.item(), b.item()) == (2, -1)


def test_a_step_of_the_defense_is_that_of_its_definition(toy_model, sample):
    repaired = defend(load(epochs=1, lr=0.2, weight_decay=0.1), toy_model, sample)
    images, rho, smoothing = sample.everything, 2.0, 0.1
    model = copy.deepcopy(toy_model).train()

    def gradients():
        target = torch.full((40, 4), smoothing / 3).scatter(1, images.labels[:, None], 1 - smoothing)
        log_softmax = torch.log_softmax(model(to_float(images.images)), 1)
        loss = (target * (target.log() - log_softmax)).sum(1).mean()
        return torch.autograd.grad(loss, list(model.parameters()))

    first = gradients()
    norm = sum(
        (p.detach() * g).double().square().sum() for p, g in zip(model.parameters(), first, strict=True)
    )
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), first, strict=True):
            parameter.add_((rho * parameter.abs() ** 2 * gradient / norm.sqrt()).float())
    second = gradients()
    gap = sum((g - h).norm() for g, h in zip(first, second, strict=True))
    assert gap > 0.1 * sum(g.norm() for g in first)  # the two passes differ, so the step shows which was used
    for (name, before), after, gradient in zip(
        toy_model.named_parameters(), repaired.parameters(), second, strict=True
    ):
        expected = before - 0.2 * (gradient + 0.1 * before)
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_without_perturbation_it_is_sgd_with_label_smoothing(toy_model, sample):
    repaired = defend(load(rho=0, epochs=3, batch_size=16, label_smoothing=0.3), toy_model, sample)
    tuned, defense = copy.deepcopy(toy_model), load(epochs=3, batch_size=16)

    def smoothed(model, batch):
        logits = model(batch.images)
        # Torch spreads the share over all classes, the right one among them.
        return F.cross_entropy(logits, batch.labels, label_smoothing=0.3 * 4 / 3), logits

    training.fit(tuned, sample.everything, defense.optimization, rng=rng.stream("test"), loss=smoothed)
    torch.testing.assert_close(repaired.state_dict(), tuned.state_dict(), rtol=1e-5, atol=1e-6)


def test_smoothed_loss_by_hand():
    logits, labels = torch.tensor([[0.0, math.log(2.0), 0.0]]), torch.tensor([1])  # softmax 1/4, 1/2, 1/4
    expected = 0.9 * math.log(0.9 / 0.5) + 2 * 0.05 * math.log(0.05 / 0.25)
    assert sam_module.smoothed_loss(logits, labels, 0.1).item() == pytest.approx(expected)
    plain = sam_module.smoothed_loss(logits, labels, 0.0)
    assert plain.item() == pytest.approx(math.log(2))
    both = sam_module.smoothed_loss(logits.repeat(2, 1), torch.tensor([1, 1]), 0.1)
    assert both.item() == pytest.approx(expected)  # a mean over images


@pytest.mark.parametrize(
    ("protocol", "num_classes", "rho", "smoothing", "epochs"),
    [
        ("survey", 10, 2, 0.1, 100),
        ("survey", 200, 2, 0.1, 100),
        ("paper", 10, 2, 0.1, 100),
        ("paper", 43, 8, 0, 50),
        ("paper", 200, 8, 0, 100),
    ],
)
def test_values_by_number_of_classes(protocol, num_classes, rho, smoothing, epochs):
    settings = protocols.settings("ft_sam", protocol, {"num_classes": num_classes})
    assert [settings[key] for key in ("rho", "label_smoothing", "epochs")] == [rho, smoothing, epochs]


# --- Running statistics, schedule -------------------------------------------------------------------


def test_running_statistics_follow_each_batch_once(toy_model, sample):
    original = copy.deepcopy(toy_model)
    norms = [module for module in original.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 0.01  # MobileNet's
    repaired = defend(load(epochs=1), original, sample)  # one batch
    once = copy.deepcopy(original).train()
    with torch.no_grad():
        once(to_float(sample.everything.images))
    for (name, expected), found in zip(once.named_buffers(), repaired.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=name)
    for norm in repaired.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.momentum == 0.01
            assert norm.track_running_stats
            assert norm.num_batches_tracked == norms[0].num_batches_tracked + 1


def test_frozen_statistics_use_the_batch_and_thaw_after_an_error(toy_model):
    model = copy.deepcopy(toy_model).train()
    before, images = copy.deepcopy(model.state_dict()), torch.rand(8, 3, 8, 8)
    with torch.no_grad(), sam_module.frozen_statistics(model):
        frozen = model(images)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(frozen, model(images))  # by the batch's statistics
        assert not torch.allclose(frozen, model.eval()(images), atol=1e-3)
    with pytest.raises(RuntimeError), sam_module.frozen_statistics(model.train()):
        raise RuntimeError
    with torch.no_grad():
        model(images)
    assert (
        model.network.layer1[0].bn1.num_batches_tracked
        == before["network.layer1.0.bn1.num_batches_tracked"] + 2
    )


def test_one_cosine_falls_over_all_epochs(toy_model, sample, monkeypatch):
    rates = []
    step = sam_module.AdaptiveSAM.step

    def spy(optimizer, closure=None):
        rates.append(optimizer.param_groups[0]["lr"])
        step(optimizer, closure)

    monkeypatch.setattr(sam_module.AdaptiveSAM, "step", spy)
    defend(load(epochs=4, batch_size=20), toy_model, sample)  # two steps an epoch
    expected = [0.005 * (1 + math.cos(math.pi * epoch / 4)) for epoch in (0, 0, 1, 1, 2, 2, 3, 3)]
    assert rates == pytest.approx(expected)


# --- Backdoor --------------------------------------------------------------------------------------


def test_it_removes_more_of_a_patch_backdoor_than_fine_tuning(backdoored):
    acc, asr, _ = backdoored.rates(backdoored.model)
    assert (acc > 0.9, asr > 0.9) == (True, True)
    settings = {"epochs": 20, "batch_size": 16, "lr": 0.03}
    _, tuned_asr, _ = backdoored.rates(defend(load("ft", **settings), backdoored.model, backdoored.sample))
    acc, asr, ra = backdoored.rates(defend(load(**settings), backdoored.model, backdoored.sample))
    assert acc > 0.95
    assert asr < 0.2
    assert ra > 0.75
    assert asr < 0.75 * tuned_asr
