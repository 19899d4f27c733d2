"""NPD: the layer starts as the identity, it alone learns, and it turns a planted trigger back."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detrojan import models, registry, rng
from detrojan.defenses.clean_data import npd
from detrojan.errors import NotApplicableError
from detrojan.images import Batch, DatasetInfo, ImageSet, to_float, to_uint8
from detrojan.learning import inference, training
from detrojan.models._parts import places
from detrojan.models._parts.insertions import Polarizer
from detrojan.settings import NO_AUGMENTATION, Augmentation, Optimization
from detrojan.stages import sampling
from detrojan.storage import artifacts
from detrojan.study import protocols
from tests.unit.conftest import attack_on, digits, poisoned_rows

ARCHITECTURES = ("preactresnet18", "vgg19_bn", "efficientnet_b3", "mobilenet_v3_large")


def load(**settings):
    return registry.load("defenses", "npd", settings)


def defend(defense, model, clean):
    return defense(model, clean, rng=rng.stream("test"))


@pytest.fixture
def batch(toy_images):
    images = toy_images(count=12, seed=1)
    return Batch(to_float(images.images), images.labels, torch.arange(12))


def images_of(batch):
    info = DatasetInfo(8, 8, tuple("abcd"), (0.5, 0.4, 0.3), (0.25, 0.2, 0.3), NO_AUGMENTATION)
    return ImageSet.clean(to_uint8(batch.images), batch.labels, batch.rows, info)


# --- the layer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_layer_starts_as_the_identity(architecture, toy_images):
    settings = {"width": 4} if architecture == "preactresnet18" else {}
    model = models.build(models.Build(architecture, settings, 4, (0.5,) * 3, (0.25,) * 3))
    images, other = toy_images(side=32, count=6), toy_images(side=32, count=6, seed=1)
    before = [inference.logits(model, s) for s in (images, other)]
    host = places.late_layer(model.network, images.images)
    npd.insert(model, host, images, "identity")
    for logits, some in zip(before, (images, other), strict=True):
        torch.testing.assert_close(inference.logits(model, some), logits, rtol=1e-4, atol=1e-5)
    assert model.build.inserted == {host: "polarizer"}


def test_the_layers_statistics_are_those_of_what_its_host_reads(toy_model, toy_images):
    images, seen = toy_images(count=700), []  # more than a pass takes at once
    host = toy_model.network.layer4[1].conv1
    hook = host.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    inference.logits(toy_model, images)
    hook.remove()
    maps = torch.cat(seen)
    norm = npd.insert(toy_model, "layer4.1.conv1", images, "identity").bn
    variance = maps.var((0, 2, 3), correction=0)
    torch.testing.assert_close(norm.running_mean, maps.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norm.running_var, variance.clamp(min=variance.mean()), rtol=1e-4, atol=1e-6)
    assert variance.min() < variance.mean() / 2


def test_a_channel_that_clean_images_leave_dead_is_not_amplified(mixing, planted_sample):
    """Its variance is 0, by which a step on the scale would be multiplied 100,000-fold."""
    before = inference.logits(mixing, planted_sample.triggered.train)
    norm = npd.insert(mixing, "mix", planted_sample.train, "identity").bn
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(gain, torch.ones(4))
    assert 1 / norm.running_var.min() < 100
    torch.testing.assert_close(inference.logits(mixing, planted_sample.triggered.train), before)


def test_whitened_it_puts_out_normalized_channels(toy_model, toy_images):
    images, seen = toy_images(count=60), []
    fresh = npd.insert(toy_model, "layer4.1.conv1", images, "whitened")
    assert (fresh.bn.weight == 1).all()
    assert (fresh.bn.bias == 0).all()
    handle = fresh.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    inference.logits(toy_model, images)
    handle.remove()
    (maps,) = seen
    live = fresh.bn.running_var > npd.DEAD * 1.01 * fresh.bn.running_var.mean()
    assert live.double().mean() > 0.8
    torch.testing.assert_close(maps.mean((0, 2, 3)), torch.zeros(32), rtol=0, atol=1e-3)
    variance = fresh.bn.running_var[live]
    expected = variance / (variance + fresh.bn.eps)  # 1, were the maps of this network larger
    torch.testing.assert_close(maps.var((0, 2, 3), correction=0)[live], expected, rtol=1e-3, atol=0)


def test_whitened_a_dead_channel_is_not_amplified_without_bound(mixing, planted_sample):
    norm = npd.insert(mixing, "mix", planted_sample.train, "whitened").bn
    variance = norm.running_var
    assert variance.min() >= 0.9 * npd.DEAD * variance.mean()
    assert variance.max() / variance.min() > 10


def test_a_model_without_the_host_is_told_which_setting_to_give(toy_model, sample):
    with pytest.raises(NotApplicableError, match=r"'features\.49'.*setting host of npd"):
        defend(load(host="features.49"), toy_model, sample)
    with pytest.raises(NotApplicableError, match=r"'layer4\.1\.bn1'"):
        defend(load(host="layer4.1.bn1"), toy_model, sample)


# --- the attack ------------------------------------------------------------------------------------


def test_perturbations_stay_in_the_ball_and_images_valid(toy_model, batch):
    for eps in (0.05, 0.5, 3.0):
        perturbed, _, _ = load(eps=eps)._perturb(toy_model, batch.images, batch.labels)
        norms = (perturbed - batch.images).flatten(1).norm(dim=1)
        assert norms.max() <= eps * (1 + 1e-5)
        assert perturbed.min() >= 0
        assert perturbed.max() <= 1
    # An image alone meets its own ball, whatever the others do: noise is far from black and white.
    grey = torch.full_like(batch.images, 0.5)
    perturbed, _, _ = load(eps=0.5)._perturb(toy_model, grey, batch.labels)
    torch.testing.assert_close((perturbed - grey).flatten(1).norm(dim=1), torch.full((12,), 0.5))


def test_perturbations_aim_at_the_class_next_to_the_label(toy_model, batch):
    perturbed, predicted, aim = load()._perturb(toy_model, batch.images, batch.labels)
    with torch.no_grad():
        logits = toy_model(batch.images)
        turned = toy_model(perturbed)
    assert torch.equal(predicted, logits.argmax(1))
    for row, label, chosen in zip(logits.tolist(), batch.labels.tolist(), aim.tolist(), strict=True):
        assert row[chosen] == max(value for place, value in enumerate(row) if place != label)
    before, after = (F.cross_entropy(z, aim, reduction="none") for z in (logits, turned))
    assert (after < before).all()


def test_first_step_of_the_attack_by_hand(toy_model, batch):
    images = batch.images.clone().requires_grad_()
    logits = toy_model(images)
    aim = logits.detach().scatter(1, batch.labels[:, None], -math.inf).argmax(1)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, aim), images)
    step = -0.1 * gradient.sign()
    step *= (1.0 / step.flatten(1).norm(dim=1)).clamp(max=1).view(-1, 1, 1, 1)
    expected = (batch.images + step).clamp(0, 1)
    perturbed, _, _ = load(attack_steps=1, eps=1.0)._perturb(toy_model, batch.images, batch.labels)
    torch.testing.assert_close(perturbed, expected)


def test_a_step_along_the_gradient_by_hand(toy_model, batch):
    grey = torch.full_like(batch.images, 0.5).requires_grad_()
    logits = toy_model(grey)
    aim = logits.detach().scatter(1, batch.labels[:, None], -math.inf).argmax(1)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, aim), grey)
    settings = {"attack_steps": 1, "attack_step": 50.0, "attack_along": "gradient"}
    perturbed, _, _ = load(**settings)._perturb(toy_model, grey.detach(), batch.labels)
    expected = (-50 * gradient).renorm(2, 0, 3.0)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(perturbed, (grey.detach() + expected).clamp(0, 1))


def test_the_attack_ends_when_enough_images_are_at_their_aim(mixing, planted_sample):
    images, labels = to_float(planted_sample.train.images), planted_sample.train.labels

    def perturbed(**settings):
        return load(attack_step=0.05, **settings)._perturb(mixing, images, labels)

    one, _, aim = perturbed(attack_steps=1)
    share = float((mixing(one).argmax(1) == aim).float().mean())
    assert share == 0.5  # the bright half turns dark at a touch of green
    assert torch.equal(perturbed(attack_steps=3, fooled=0.4)[0], one)
    assert not torch.equal(perturbed(attack_steps=3, fooled=0.6)[0], one)


# --- the loss --------------------------------------------------------------------------------------


def test_losses_by_hand():
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]).log()
    assert npd._rival(logits, torch.tensor([0, 0])).tolist() == [1, 2]  # the second, the first
    presence = npd._presence(logits, torch.tensor([1, 2]))
    assert float(presence) == pytest.approx(-(math.log(0.8001) + math.log(0.4001)) / 2, rel=1e-5)
    sure = torch.tensor([[100.0, 0.0]])
    assert float(npd._presence(sure, torch.tensor([0]))) == pytest.approx(-math.log(1e-4), rel=1e-2)


def test_the_objective_is_the_weighted_sum_of_four_losses(toy_model, batch):
    defense = load(keep_weight=0.3, rival_weight=0.7, aim_weight=1.1)
    polarizer = Polarizer(32)
    toy_model.insert("layer4.1.conv1", polarizer)
    value, right = defense._objective(toy_model, polarizer.train())(batch)
    assert not polarizer.training
    perturbed, predicted, aim = defense._perturb(toy_model, batch.images, batch.labels)
    total = 0.0
    with torch.no_grad():
        clean, turned = toy_model(batch.images), toy_model(perturbed).softmax(1)
    for i, label in enumerate(batch.labels.tolist()):
        p = turned[i].tolist()
        top = max(range(4), key=p.__getitem__)
        second = max((k for k in range(4) if k != top), key=p.__getitem__)
        rival = top if top != label else second
        total += float(F.cross_entropy(clean[i], batch.labels[i]))
        total += -0.3 * math.log(p[predicted[i]])
        total += -0.7 * math.log(1.0001 - p[rival]) - 1.1 * math.log(1.0001 - p[aim[i]])
    assert float(value.detach()) == pytest.approx(total / 12, rel=1e-4)
    assert int(right) == int((clean.argmax(1) == batch.labels).sum())


def test_by_batch_the_layer_normalizes_so_and_follows_clean_images_alone(toy_model, batch):
    defense = load(by_batch=True)
    polarizer = npd.insert(toy_model, "layer4.1.conv1", images_of(batch), "whitened")
    before, inputs = polarizer.bn.running_mean.clone(), []
    perturbed, predicted, aim = defense._perturb(toy_model, batch.images, batch.labels)
    handle = polarizer.register_forward_pre_hook(lambda _module, given: inputs.append(given[0].detach()))
    value, _ = defense._objective(toy_model, polarizer.train())(batch)
    handle.remove()
    # The last two passes: clean, then perturbed.
    momentum, clean = polarizer.bn.momentum, inputs[-2]
    expected = (1 - momentum) * before + momentum * clean.mean((0, 2, 3))
    torch.testing.assert_close(polarizer.bn.running_mean, expected)
    assert polarizer.bn.num_batches_tracked == 1
    assert polarizer.bn.track_running_stats
    with torch.no_grad(), npd.frozen_statistics(polarizer):
        logits, turned = toy_model(batch.images), toy_model(perturbed)
        total = F.cross_entropy(logits, batch.labels) + 0.4 * (
            F.cross_entropy(turned, predicted)
            + npd._presence(turned, npd._rival(turned, batch.labels))
            + npd._presence(turned, aim)
        )
    torch.testing.assert_close(value.detach(), total)


def test_images_are_augmented_unless_told_otherwise(toy_model, toy_images, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "descend", lambda *_, augmentation, **__: seen.append(augmentation))
    augmentation = Augmentation(crop_padding=1, flip=True)
    sample = sampling.draw_samples(toy_images(count=48, augmentation=augmentation), "toy", 10, [0])[0]
    for augmented in (True, False):
        defend(load(augmented=augmented), toy_model, sample)
    assert seen == [augmentation, NO_AUGMENTATION]


# --- the whole -------------------------------------------------------------------------------------


def test_the_optimizer_is_sgd_of_the_layer_alone(toy_model, sample, monkeypatch):
    parts, descend = [], training.descend

    def spy(named, *arguments, **options):
        parts.extend(named.values())
        return descend(named, *arguments, **options)

    monkeypatch.setattr(training, "descend", spy)
    repaired = defend(load(epochs=1), toy_model, sample)
    (part,) = parts
    settings = [part.optimizer.defaults[key] for key in ("lr", "momentum", "weight_decay", "nesterov")]
    assert settings == [0.01, 0.9, 5e-4, False]
    assert [part.lr_at(epoch) for epoch in (0, 25, 49)] == [0.01] * 3
    layer = repaired.network.layer4[1].conv1.polarizer
    (group,) = part.optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in layer.parameters()]


def test_only_the_layer_learns(toy_model, sample, tmp_path):
    before = copy.deepcopy(toy_model.state_dict())
    start = copy.deepcopy(toy_model)
    fresh = npd.insert(start, "layer4.1.conv1", sample.everything, "whitened")
    repaired = defend(load(epochs=3), toy_model, sample)
    after = repaired.state_dict()
    added = {name for name in after if ".polarizer." in name}
    assert set(after) - added == set(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    layer = repaired.network.layer4[1].conv1.polarizer
    for name, value in fresh.named_parameters():
        assert not torch.equal(layer.get_parameter(name), value), name
    assert torch.equal(layer.bn.running_mean, fresh.bn.running_mean)
    assert torch.equal(layer.bn.running_var, fresh.bn.running_var)
    artifacts.write_model(repaired, tmp_path / "model.safetensors")
    read = artifacts.read_model(tmp_path / "model.safetensors")
    assert torch.equal(inference.logits(read, sample.train), inference.logits(repaired, sample.train))


class Mixing(nn.Module):
    """The planted network with a convolution, the identity, between its channels and its head."""

    def __init__(self, planted):
        super().__init__()
        self.conv, self.bn = planted.conv, planted.bn
        # The trigger's filter lets a little through, or an attack would find no gradient there.
        nn.init.constant_(self.conv.bias[1:2], 0.001)
        self.mix = nn.Conv2d(4, 4, 1, bias=False)
        nn.init.dirac_(self.mix.weight)
        self.linear = planted.linear

    def forward(self, images):
        return self.linear(self.mix(F.relu(self.bn(self.conv(images)))).mean((2, 3)))


@pytest.fixture
def mixing(planted):
    return models.Classifier(Mixing(planted.network), planted.build).eval()


def test_a_planted_trigger_is_turned_back(mixing, planted_sample):
    stamped = planted_sample.triggered.validation
    assert inference.evaluate(mixing, stamped)[0] == 0.5  # all dark: the trigger wins
    # The head multiplies the trigger by 100, and so the gradients: a smaller rate.
    repaired = defend(load(host="mix", lr=0.001), mixing, planted_sample)
    assert inference.evaluate(repaired, stamped)[0] == 1
    assert inference.evaluate(repaired, planted_sample.validation)[0] == 1


class Plain(nn.Sequential):
    """Four convolutions in a row, each with normalization and ReLU: nothing goes round a layer."""

    def __init__(self, width=8, num_classes=10):
        sizes, layers = (3, width, 2 * width, 4 * width, 4 * width), []
        for before, after, stride in zip(sizes, sizes[1:], (1, 2, 2, 1), strict=False):
            convolution = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, num_classes))


def test_a_learned_backdoor_is_removed_where_all_goes_through_the_layer(backdoored):
    train, _, _ = digits()
    rows = poisoned_rows(train, *attack_on(train, "badnets"))
    with rng.global_stream(rng.stream("init")):
        model = models.Classifier(Plain(), models.Build("plain", {}, 10, train.info.mean, train.info.std))
    optimization = Optimization(epochs=8, batch_size=32, lr=0.05)
    training.fit(model, train.replaced(rows), optimization, rng=rng.stream("train"))
    acc, asr, _ = backdoored.rates(model)
    assert acc > 0.95
    assert asr > 0.9
    after = backdoored.rates(defend(load(host="9"), model, backdoored.sample))
    assert after[0] > acc - 0.05
    assert after[1] < 0.3
    assert after[2] > 0.7


def test_what_the_last_shortcut_carries_goes_round_the_layer(backdoored):
    """On this small PreAct-ResNet-18 the backdoor does: without the last block it is as strong."""
    acc, asr, _ = backdoored.rates(backdoored.model)
    assert asr > 0.9
    silenced = copy.deepcopy(backdoored.model)
    nn.init.zeros_(silenced.network.layer4[1].conv2.weight)
    assert backdoored.rates(silenced)[1] > 0.9
    repaired = defend(load(), backdoored.model, backdoored.sample)
    after = backdoored.rates(repaired)
    assert after[0] > acc - 0.05
    # It worked on what does reach it: the loss that it descends is lower.
    start = copy.deepcopy(backdoored.model)
    fresh = npd.insert(start, "layer4.1.conv1", backdoored.sample.everything, "identity")
    images = backdoored.sample.everything
    whole = Batch(to_float(images.images), images.labels, torch.arange(len(images)))
    before = load()._objective(start, fresh)(whole)[0]
    trained = repaired.network.layer4[1].conv1.polarizer
    assert load()._objective(repaired, trained)(whole)[0] < before - 0.3


@pytest.mark.parametrize(
    ("protocol", "num_classes", "eps", "weights"),
    [
        ("survey", 10, 3, (0.4, 0.4, 0.4)),
        ("survey", 43, 5, (0.5, 0.5, 0.5)),
        ("survey", 200, 3, (0.4, 0.4, 0.4)),
        ("paper", 10, 3, (0.4, 0.4, 0.4)),
        ("paper", 43, 5, (0.5, 0.5, 0.5)),
        ("paper", 200, 6, (1.0, 0.1, 0.1)),
    ],
)
def test_values_by_number_of_classes(protocol, num_classes, eps, weights):
    facts = {"num_classes": num_classes, "architecture": "vgg19_bn"}
    defense = load(**protocols.settings("npd", protocol, facts))
    assert (defense.host, defense.eps) == ("", eps)
    assert (defense.keep_weight, defense.rival_weight, defense.aim_weight) == weights
    assert defense.augmented == (protocol == "survey")
    as_on_tiny_imagenet = (protocol, num_classes) == ("paper", 200)
    assert (defense.attack_along == "gradient") == defense.by_batch == as_on_tiny_imagenet
