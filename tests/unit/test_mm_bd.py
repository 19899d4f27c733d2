"""MM-BD: bounds start where they change nothing, and fall as far as the clean images let them."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detrojan import models, registry, rng
from detrojan.defenses._parts import choices
from detrojan.defenses.clean_data import mm_bd
from detrojan.errors import NotApplicableError
from detrojan.images import DefenderSample, to_float
from detrojan.learning import inference, training
from detrojan.learning.meter import meter
from detrojan.models._parts import structure
from detrojan.models._parts.insertions import Ceiling
from detrojan.settings import Augmentation
from detrojan.storage import artifacts
from detrojan.study import protocols

ARCHITECTURES = ("preactresnet18", "vgg19_bn", "efficientnet_b3", "mobilenet_v3_large")
SITES = ["layer1.0.relu1", "layer2.0.relu1", "layer3.0.relu1"]
# The authors' steps at three activations, and the guard.
GUARDED = {"sites": SITES, "lr": 0.1, "augment": False, "keep_last_good": True}


def load(**settings):
    return registry.load("defenses", "mm_bd", settings)


def defend(defense, model, clean):
    return defense(model, clean, rng=rng.stream("test"))


def bounds_of(model):
    return [model.network.get_submodule(site).ceiling.bound.detach() for site in model.build.inserted]


# --- where bounds stand, and where they start ------------------------------------------------------


def settings(protocol, architecture):
    return protocols.settings("mm_bd", protocol, {"architecture": architecture})


@pytest.fixture(scope="module", params=ARCHITECTURES)
def fresh(request):
    """Return a function that makes an untrained model."""
    narrow = {"width": 4} if request.param == "preactresnet18" else {}
    return lambda: models.build(models.Build(request.param, narrow, 4, (0.5,) * 3, (0.25,) * 3))


# Activations of the trunk, and the maps at the places of the authors, of images of 32 pixels.
NUM_ACTIVATIONS = {"preactresnet18": 16, "vgg19_bn": 16, "efficientnet_b3": 52, "mobilenet_v3_large": 31}
MAPS = {
    "preactresnet18": [(4, 32), (4, 32), (8, 16)],
    "vgg19_bn": [(64, 32), (128, 16), (256, 8)],
    "efficientnet_b3": [(40, 16), (24, 16), (32, 8)],
    "mobilenet_v3_large": [(16, 16), (16, 16), (24, 8)],
}


def test_sites_and_first_bounds_of_both_protocols(fresh, toy_images):
    images = toy_images(side=32, count=6)
    model, maps = fresh(), {}
    architecture, network = model.build.architecture, model.network
    trunk = list(structure.norm_activations(network))
    for site in (paper := settings("paper", architecture)["sites"]):
        network.get_submodule(site).register_forward_hook(
            lambda _module, _inputs, output, site=site: maps.update({site: tuple(output.shape[1:3])})
        )
    before = inference.logits(model, images)
    assert list(maps.items()) == list(zip(paper, MAPS[architecture], strict=True))
    # From each site's largest value nothing changes on the clean images.
    for sites, bounded in ((trunk, copy.deepcopy(model)), (paper, model)):
        _, logits = mm_bd.insert_ceilings(bounded, sites, images)
        assert bounded.build.inserted == dict.fromkeys(sites, "ceiling")
        assert torch.equal(logits, before)
        assert torch.equal(inference.logits(bounded, images), before)
    assert settings("survey", architecture)["sites"] == []
    assert len(trunk) == NUM_ACTIVATIONS[architecture]


def test_without_sites_every_activation_of_the_trunk_is_bounded(toy_model, sample):
    repaired = defend(load(epochs=1), toy_model, sample)
    trunk = list(structure.norm_activations(toy_model.network))
    assert list(repaired.build.inserted) == sample.chosen["sites"] == trunk


class Tokens(nn.Module):
    """Four tokens an image, of which a perceptron makes others; an activation between two linear layers."""

    def __init__(self):
        super().__init__()
        self.patches, self.up, self.act, self.down = (
            *(nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 10)),
            *(nn.GELU(), nn.Linear(10, 6)),
        )
        self.linear = nn.Linear(6, 4)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return self.linear((tokens + self.down(self.act(self.up(tokens)))).mean(1))


def test_channels_of_tokens_are_bounded_too(sample):
    with rng.global_stream(rng.stream("tokens")):
        model = models.Classifier(Tokens(), models.Build("odd", {}, 4, (0.5,) * 3, (0.25,) * 3)).eval()
    images = to_float(sample.train.images)
    ceilings, before = mm_bd.insert_ceilings(copy.deepcopy(model), ["act"], sample.train)
    assert [len(bound) for bound in ceilings.parameters()] == [10]
    with torch.no_grad():
        torch.testing.assert_close(before, model(images))
    repaired = defend(load(lr=0.1, epochs=5), model, sample)
    assert repaired.build.inserted == {"act": "token_ceiling"}
    outputs = []
    repaired.network.down.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0]))
    with torch.no_grad():
        repaired(images)
    bound = repaired.network.act.token_ceiling.bound
    assert (outputs[0].amax((0, 1)) <= bound).all()
    assert (outputs[0] == bound).any()  # it acts


def test_the_authors_bounds_start_at_8_and_clip_the_sum_of_a_block(toy_model, sample):
    paper = settings("paper", "preactresnet18")
    ceilings, _ = mm_bd.insert_ceilings(toy_model, paper["sites"], sample.train, paper["start"])
    assert [bound.unique().tolist() for bound in ceilings.parameters()] == [[8.0]] * 3
    block, seen = toy_model.network.layer1[1], []
    block.ceiling.bound.data.fill_(0.5)
    toy_model.network.layer2[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    # A shortcut that is large goes round no bound.
    toy_model.network.conv1.register_forward_hook(lambda _, _inputs, maps: maps + 7)
    with torch.inference_mode():
        toy_model(to_float(sample.train.images))
    assert seen[0].max() == 0.5


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


@pytest.mark.parametrize(
    ("sites", "reason"),
    [
        (["layer1.0.relu1", "features.5", "nowhere"], r"no features\.5, nowhere: .*sites"),
        (["layer1"], "no layer1: "),  # a container runs its ceiling as one of its layers
        (["linear"], "linear puts out none"),
    ],
)
def test_a_model_without_the_sites_is_told_which_setting_to_give(toy_model, sample, sites, reason):
    with pytest.raises(NotApplicableError, match=reason):
        defend(load(sites=sites), toy_model, sample)


def test_a_layer_that_runs_twice_is_refused(toy_model, sample):
    toy_model.network.layer1[0].relu2 = toy_model.network.layer1[0].relu1
    with pytest.raises(NotApplicableError, match="run once"):
        defend(load(sites=["layer1.0.relu1"]), toy_model, sample)


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

    repaired = defend(
        load(**GUARDED, norm_weight=weight, max_drop=max_drop, epochs=40, adjust_at=[0.25, 0.5, 0.75]),
        fitted,
        sample,
    )
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
    repaired = defend(load(**GUARDED, norm_weight=10.0), fitted, sample)
    before, after = sample.chosen["train_accuracy"]
    assert 0 < sample.chosen["epoch"] < 50
    assert after >= before - 0.05 - 1e-9
    assert inference.evaluate(repaired, sample.everything)[0] == after
    unguarded = defend(load(**GUARDED | {"keep_last_good": False}, norm_weight=10.0), fitted, sample)
    assert inference.evaluate(unguarded, sample.everything)[0] == sample.chosen["train_accuracy"][1]
    assert sample.chosen["train_accuracy"][1] < before - 0.05
    assert sample.chosen["epoch"] == 50
    assert all((bound >= 0).all() for bound in bounds_of(unguarded))


def test_the_weight_of_the_norms_changes_at_its_shares_of_the_run(planted, planted_sample, monkeypatch):
    descents = []
    descend = training.descend

    def watched(*arguments, after_epoch, **options):
        (run,) = [
            cell.cell_contents for cell in after_epoch.__closure__ if hasattr(cell.cell_contents, "weight")
        ]
        weights = [run.weight]

        def noted(epoch):
            stop = after_epoch(epoch)
            weights.append(run.weight)
            return stop

        descents.append(weights)
        return descend(*arguments, after_epoch=noted, **options)

    monkeypatch.setattr(training, "descend", watched)
    paper = {"adjust_at": [0.4, 0.6, 0.8], "min_steps": 150, "batch_size": 200}
    model = models.Classifier(Bounded(planted.network), planted.build).eval()
    # Bounds that don't move keep the accuracy; then a rule that accepts nothing.
    still = {"sites": ["relu"], "lr": 1e-9}
    defend(load(**still), model, planted_sample)
    defend(load(**still, **paper), model, planted_sample)
    monkeypatch.setattr(choices, "accepted", lambda *_: False)
    defend(load(**still, **paper), model, planted_sample)
    changes = [
        [
            (at, later / before)
            for at, (before, later) in enumerate(itertools.pairwise(weights), 1)
            if later != before
        ]
        for weights in descents
    ]
    assert [[at for at, _ in some] for some in changes] == [[10, 20, 30, 40], [60, 90, 120], [60, 90, 120]]
    factors = [[factor for _, factor in some] for some in changes]
    assert factors[0] == pytest.approx([1.2] * 4)
    assert factors[1] == pytest.approx([1.2] * 3)
    assert factors[2] == pytest.approx([1 / 1.2] * 3)


def test_a_loss_of_exactly_the_tolerance_keeps_bounds(toy_model, sample, monkeypatch):
    count = len(sample.everything)
    assert count == 40  # of which 0.05 are two
    right = iter([40, 38, 37, 39])
    monkeypatch.setattr(inference, "num_right", lambda *_: next(right))
    fitted = dataclasses.replace(sample, chosen={})
    monkeypatch.setattr(
        inference, "logits", lambda _model, images: F.one_hot(images.labels, 4).float(), raising=True
    )
    monkeypatch.setattr(mm_bd, "insert_ceilings", unmeasured)
    defend(load(**GUARDED, epochs=4), toy_model, fitted)
    assert fitted.chosen["epoch"] == 4
    assert fitted.chosen["train_accuracy"] == [1.0, 39 / 40]
    assert (fitted.chosen["num_judged"], fitted.chosen["allowed_errors"]) == (40, 2)
    right = iter([40, 38, 37])
    defend(load(**GUARDED, epochs=3), toy_model, fitted)
    assert fitted.chosen["epoch"] == 2


def unmeasured(model, sites, images, _start):
    """Insert bounds of 1, and take all images for right."""
    ceilings = [Ceiling(channels) for channels in (4, 4, 8)]
    for site, ceiling in zip(sites, ceilings, strict=True):
        ceiling.bound.data.fill_(1)
        model.insert(site, ceiling)
    return nn.ModuleList(ceilings), F.one_hot(images.labels, 4).float()


def test_only_images_that_the_model_has_right_may_teach(toy_model, sample):
    right = inference.num_right(toy_model, sample.everything)
    assert 0 < right < len(sample.everything)
    defend(load(sites=SITES, only_right=True, epochs=2), toy_model, sample)
    assert sample.chosen["num_judged"] == right
    assert sample.chosen["train_accuracy"][0] == 1
    everything = sample.everything
    wrong = dataclasses.replace(
        everything, labels=(inference.logits(toy_model, everything).argmax(1) + 1) % 4
    )
    none = DefenderSample(wrong, wrong[torch.arange(0)])
    with pytest.raises(NotApplicableError, match="there are none"):
        defend(load(sites=SITES, only_right=True, epochs=2), toy_model, none)


def test_varied_images_are_held_against_their_own_logits(toy_model, sample, monkeypatch):
    varied = dataclasses.replace(
        sample.everything,
        info=dataclasses.replace(
            sample.everything.info, augmentation=Augmentation(crop_padding=2, flip=True)
        ),
    )
    losses = []
    descend = training.descend

    def watched(*arguments, **options):
        history = descend(*arguments, **options)
        losses.append(history[0].loss)
        return history

    monkeypatch.setattr(training, "descend", watched)
    given = DefenderSample(varied, varied[torch.arange(0)])
    for augment in (True, False):
        # From bounds that nothing reaches, only norms are left in the first loss: of 4, 4 and 8 channels.
        defend(load(sites=SITES, start=1e3, norm_weight=1e-9, epochs=1, augment=augment), toy_model, given)
    assert losses == pytest.approx([1e-9 * 1e3 * (2 + 2 + 8**0.5)] * 2, rel=1e-3)


def test_weights_are_untouched_and_bounds_survive_a_file(toy_model, sample, tmp_path):
    before = copy.deepcopy(toy_model.state_dict())
    repaired = defend(load(**GUARDED, epochs=12), toy_model, sample)
    after = repaired.state_dict()
    assert set(after) - set(before) == {f"network.{site}.ceiling.bound" for site in SITES}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not torch.equal(
        inference.logits(repaired, sample.train), inference.logits(toy_model, sample.train)
    )
    artifacts.write_model(repaired, tmp_path / "model.safetensors")
    read = artifacts.read_model(tmp_path / "model.safetensors")
    assert torch.equal(inference.logits(read, sample.train), inference.logits(repaired, sample.train))


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        # One that yields logits and largest activations; an epoch's; one to judge each epoch's bounds.
        (GUARDED, 1 + 3 + 3),
        # The original's logits of varied images; bounds are judged after an epoch that changes the weight
        # (here the first and the second), and at the end.
        ({"sites": SITES}, 1 + 2 * 3 + 2 + 1),
    ],
)
def test_passes(toy_model, sample, settings, passes):
    with meter(torch.device("cpu")) as cost:
        defend(load(**settings, epochs=3, batch_size=16), toy_model, sample)
    count = len(sample.everything)
    assert (cost.forward_passes, cost.backward_passes) == (passes * count, 3 * count)
    assert (cost.steps, cost.step_images) == (3 * 3, 3 * count)


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
        load(**GUARDED | {"sites": ["relu"]}, norm_weight=0.1, norm_factor=1.0, epochs=150),
        model,
        planted_sample,
    )
    (bound,) = bounds_of(repaired)
    assert bound[0] > 0.9  # red, up to 1 on clean images
    assert bound[1] < 0.1  # green, 0.05 on clean images and 20 under the trigger
    assert inference.evaluate(repaired, stamped)[0] == 1
    assert inference.evaluate(repaired, planted_sample.validation)[0] == 1


def test_mm_bd_weakens_a_learned_backdoor(backdoored):
    acc, asr, ra = backdoored.rates(backdoored.model)
    after = backdoored.rates(defend(load(**GUARDED), backdoored.model, backdoored.sample))
    assert asr > 0.9
    assert after[0] > acc - 0.1
    assert after[1] < asr - 0.15
    assert after[2] > ra + 0.1


def test_the_survey_s_steps_are_small(backdoored):
    """A bound falls by a thousandth a step."""
    before = backdoored.rates(backdoored.model)
    after = backdoored.rates(defend(load(epochs=10), backdoored.model, backdoored.sample))
    assert after[1] > before[1] - 0.05
    chosen = backdoored.sample.chosen
    falls = [
        first - last for first, last in zip(chosen["initial_bounds"], chosen["mean_bounds"], strict=True)
    ]
    assert 0 < max(falls) < 0.012
