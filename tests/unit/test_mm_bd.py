"""MM-BD: bounds start where they change nothing, and fall as far as the clean images let them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detrojan import models, registry, rng
from detrojan.defenses.clean_data import mm_bd
from detrojan.errors import NotApplicableError
from detrojan.images import to_float
from detrojan.learning import inference
from detrojan.learning.meter import meter
from detrojan.models._parts import structure
from detrojan.storage import artifacts
from detrojan.study.schema import shipped

ARCHITECTURES = ("preactresnet18", "vgg19_bn", "efficientnet_b3", "mobilenet_v3_large")
SITES = ["layer1.0.relu1", "layer2.0.relu1", "layer3.0.relu1"]


def load(**settings):
    return registry.load("defenses", "mm_bd", settings)


def defend(defense, model, clean):
    return defense(model, clean, rng=rng.stream("test"))


def bounds_of(model):
    return [model.network.get_submodule(site).ceiling.bound.detach() for site in model.build.inserted]


# --- where bounds stand, and where they start ------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_configured_sites_are_early_activations_of_the_trunk(architecture):
    sites = load(**shipped("defenses", "mm_bd").resolve({"architecture": architecture})).sites
    with torch.device("meta"):
        network = registry.load("models", architecture).network(10)
    trunk = list(structure.norm_activations(network))
    places = [trunk.index(site) for site in sites]
    assert len(sites) == 3
    assert places == sorted(places)
    assert places[0] < 2
    assert places[-1] <= len(trunk) / 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_first_bounds_change_nothing_on_the_clean_images(architecture, toy_images):
    settings = {"width": 4} if architecture == "preactresnet18" else {}
    model = models.build(models.Build(architecture, settings, 4, (0.5,) * 3, (0.25,) * 3))
    images = toy_images(side=32, count=6)
    before = inference.logits(model, images)
    sites = load(**shipped("defenses", "mm_bd").resolve({"architecture": architecture})).sites
    _, logits = mm_bd.insert_ceilings(model, sites, images)
    assert torch.equal(logits, before)
    assert model.build.inserted == dict.fromkeys(sites, "ceiling")
    assert torch.equal(inference.logits(model, images), before)


def test_first_bounds_are_the_largest_activation_of_each_site(toy_model, toy_images):
    images, seen = toy_images(count=700), {site: [] for site in SITES}  # more than a pass takes at once
    hooks = [
        toy_model.network.get_submodule(site).register_forward_hook(
            lambda _, inputs, output, site=site: seen[site].append(output)
        )
        for site in SITES
    ]
    inference.logits(toy_model, images)
    for hook in hooks:
        hook.remove()
    ceilings, _ = mm_bd.insert_ceilings(toy_model, SITES, images)
    for site, ceiling in zip(SITES, ceilings, strict=True):
        assert (ceiling.bound == torch.cat(seen[site]).max()).all()
    assert [len(ceiling.bound) for ceiling in ceilings] == [4, 4, 8]


def test_bounds_act_on_what_no_clean_image_does(toy_model, toy_images):
    images, seen = toy_images(), []
    mm_bd.insert_ceilings(toy_model, SITES, images)
    hook = toy_model.network.layer1[0].conv1.register_forward_pre_hook(lambda _, i: seen.append(i[0]))
    with torch.inference_mode():
        toy_model(1e4 * to_float(images.images))
    hook.remove()
    assert seen[0].max() == toy_model.network.layer1[0].relu1.ceiling.bound[0]


def test_a_model_without_the_sites_is_told_which_setting_to_give(toy_model, sample):
    with pytest.raises(NotApplicableError, match=r"no features\.5, layer1\.0\.bn1 among its 16: .*sites"):
        defend(load(sites=["layer1.0.relu1", "features.5", "layer1.0.bn1"]), toy_model, sample)


# --- how they fall ---------------------------------------------------------------------------------


def bounded(model, images, bounds):
    """Return logits of images with the sites bounded by hand."""
    hooks = [
        model.network.get_submodule(site).register_forward_hook(
            lambda _, inputs, output, bound=bound: torch.where(
                output > bound[:, None, None], bound[:, None, None], output
            )
        )
        for site, bound in zip(SITES, bounds, strict=True)
    ]
    logits = model(images)
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize(("weight", "max_drop"), [(0.01, 0.05), (0.5, 0.05), (0.5, 0.0)])
def test_bounds_equal_those_of_a_plain_loop(toy_model, sample, weight, max_drop):
    fitted = defend(registry.load("defenses", "ft", {"epochs": 30, "lr": 0.05}), toy_model, sample)
    everything = sample.everything
    images, labels = to_float(everything.images), everything.labels
    with torch.no_grad():
        wanted = fitted(images)
    first = (wanted.argmax(1) == labels).float().mean()
    start = [c.bound.detach() for c in mm_bd.insert_ceilings(copy.deepcopy(fitted), SITES, everything)[0]]
    bounds = [bound.clone().requires_grad_() for bound in start]
    optimizer = torch.optim.Adam(bounds, lr=0.1)
    penalty, kept, kept_epoch, verdicts = weight, start, 0, []
    for epoch in range(1, 41):
        loss = F.mse_loss(bounded(fitted, images, bounds), wanted)
        loss = loss + penalty * sum(bound.square().sum().sqrt() for bound in bounds)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for bound in bounds:
                bound.clamp_(min=0)
            accuracy = (bounded(fitted, images, bounds).argmax(1) == labels).float().mean()
        good = bool(accuracy >= first - max_drop - 1e-6)
        verdicts.append(good)
        if good:
            kept, kept_epoch = [bound.detach().clone() for bound in bounds], epoch
        if epoch % 10 == 0:
            penalty = penalty * 1.2 if good else penalty / 1.2

    repaired = defend(load(norm_weight=weight, max_drop=max_drop, epochs=40), fitted, sample)
    assert sample.chosen["epoch"] == kept_epoch
    for found, expected, initial in zip(bounds_of(repaired), kept, start, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        assert (found < initial).all()
    assert first > 0.9
    if weight == 0.5:
        assert not all(verdicts)  # the guard had something to do
        assert 0 < kept_epoch < 40


def test_the_last_good_bounds_are_kept_not_the_last(toy_model, sample):
    fitted = defend(registry.load("defenses", "ft", {"epochs": 30, "lr": 0.05}), toy_model, sample)
    repaired = defend(load(norm_weight=10.0), fitted, sample)
    before, after = sample.chosen["train_accuracy"]
    assert 0 < sample.chosen["epoch"] < 50
    assert after >= before - 0.05 - 1e-9
    assert inference.evaluate(repaired, sample.everything)[0] == after
    unguarded = defend(load(norm_weight=10.0, max_drop=0.99), fitted, sample)
    assert inference.evaluate(unguarded, sample.everything)[0] < before - 0.05
    assert all((bound >= 0).all() for bound in bounds_of(unguarded))


def test_weights_are_untouched_and_bounds_survive_a_file(toy_model, sample, tmp_path):
    before = copy.deepcopy(toy_model.state_dict())
    repaired = defend(load(epochs=12), toy_model, sample)
    after = repaired.state_dict()
    assert set(after) - set(before) == {f"network.{site}.ceiling.bound" for site in SITES}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not torch.equal(
        inference.logits(repaired, sample.train), inference.logits(toy_model, sample.train)
    )
    artifacts.write_model(repaired, tmp_path / "model.safetensors")
    read = artifacts.read_model(tmp_path / "model.safetensors")
    assert torch.equal(inference.logits(read, sample.train), inference.logits(repaired, sample.train))


def test_passes(toy_model, sample):
    with meter(torch.device("cpu")) as cost:
        defend(load(epochs=3, batch_size=16), toy_model, sample)
    count = len(sample.everything)
    # One that yields logits and largest activations; then an epoch's, and one to judge its bounds.
    assert (cost.forward_passes, cost.backward_passes) == ((1 + 2 * 3) * count, 3 * count)


# --- what they remove ------------------------------------------------------------------------------


class Bounded(nn.Module):
    """The planted network with a trigger that shows as an activation 20 times the others' largest."""

    def __init__(self, planted):
        super().__init__()
        self.conv, self.bn, self.relu, self.linear = planted.conv, planted.bn, nn.ReLU(), planted.linear
        with torch.no_grad():
            self.conv.weight[1] *= 20
            self.conv.bias[1] = 0.05  # a little on every image, as channels of trained networks have
            self.linear.weight[:, 1] /= 2

    def forward(self, images):
        return self.linear(self.relu(self.bn(self.conv(images))).mean((2, 3)))


def test_a_planted_channel_is_bounded_and_the_one_that_shows_the_class_is_not(planted, planted_sample):
    model = models.Classifier(Bounded(planted.network), planted.build).eval()
    stamped = planted_sample.triggered.validation
    assert inference.evaluate(model, planted_sample.validation)[0] == 1
    assert inference.evaluate(model, stamped)[0] == 0.5  # all dark: the trigger wins
    repaired = defend(
        load(sites=["relu"], norm_weight=0.1, norm_factor=1.0, epochs=150), model, planted_sample
    )
    (bound,) = bounds_of(repaired)
    assert bound[0] > 0.9  # red, up to 1 on clean images
    assert bound[1] < 0.1  # green, 0.05 on clean images and 20 under the trigger
    assert inference.evaluate(repaired, stamped)[0] == 1
    assert inference.evaluate(repaired, planted_sample.validation)[0] == 1


def test_mm_bd_weakens_a_learned_backdoor(backdoored):
    acc, asr, ra = backdoored.rates(backdoored.model)
    after = backdoored.rates(defend(load(), backdoored.model, backdoored.sample))
    assert asr > 0.9
    assert after[0] > acc - 0.1
    assert after[1] < asr - 0.15
    assert after[2] > ra + 0.1
