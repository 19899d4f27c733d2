"""BNP: the divergence against hand-computed values, the rule on planted channels, a trained backdoor."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from detrojan import registry, rng
from detrojan.defenses._parts import choices
from detrojan.defenses.clean_data import bnp as bnp_module
from detrojan.errors import NotApplicableError
from detrojan.images import DefenderSample, Loader, to_float
from detrojan.settings import Augmentation
from detrojan.study import protocols


def defend(model, clean, **settings):
    return registry.load("defenses", "bnp", settings)(model, clean, rng=rng.stream("test"))


def norm_of(mean, variance, eps=0.0):
    """Return a norm that remembers ``mean`` and ``variance``, lists of numbers."""
    norm = nn.BatchNorm2d(len(mean), eps=eps)
    norm.running_mean = torch.tensor(mean)
    norm.running_var = torch.tensor(variance)
    return norm.eval()


def divergence(norm, *batches):
    """Return the divergence of each channel whose inputs are ``batches``, each (N, C)."""
    moments = bnp_module._Moments(norm)
    for batch in batches:
        moments.add(torch.as_tensor(batch)[:, :, None, None])
    return moments.divergence()


def norms_of(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def plain_divergences(model, images):
    """Return the divergences of a model's channels from all inputs of each norm, kept whole: (C,) each."""
    inputs = {norm: [] for norm in norms_of(model)}
    hooks = [
        norm.register_forward_pre_hook(lambda norm, args: inputs[norm].append(args[0])) for norm in inputs
    ]
    with torch.no_grad():
        for batch in images:
            model(batch)
    for hook in hooks:
        hook.remove()
    result = []
    for norm, seen in inputs.items():
        values = torch.cat(seen).double().transpose(0, 1).flatten(1)
        clean, old = values.var(1) + norm.eps, norm.running_var.double() + norm.eps
        shift = values.mean(1) - norm.running_mean.double()
        result.append((old / clean).log() / 2 + (clean + shift**2) / (2 * old) - 0.5)
    return result


# --- The divergence --------------------------------------------------------------------------------


def test_divergence_is_the_one_worked_out_by_hand():
    # 0 and 2 have mean 1 and unbiased variance 2; against N(0, 4): ln(4/2)/2 + (2 + 1)/8 - 1/2.
    (found,) = divergence(norm_of([0.0], [4.0]), [[0.0], [2.0]])
    assert found.item() == pytest.approx(math.log(2) / 2 + 3 / 8 - 1 / 2)


def test_epsilon_is_added_to_both_variances():
    (found,) = divergence(norm_of([1.0], [0.5], eps=0.25), [[0.0], [2.0]])
    assert found.item() == pytest.approx(math.log(0.75 / 2.25) / 2 + 2.25 / 1.5 - 1 / 2)


def test_divergence_is_zero_where_statistics_agree_and_nowhere_else():
    values = torch.randn(50, 4, generator=rng.stream("values")) + 3
    mean, variance = values.double().mean(0), values.double().var(0)
    # The second remembers twice the variance, half of it the third, another mean the last. Without
    # the 1/2 before the logarithm, the second's would be the smallest, and negative.
    norm = norm_of([0.0] * 4, [1.0] * 4)
    norm.running_mean = mean + torch.tensor([0, 0, 0, 0.01])
    norm.running_var = variance * torch.tensor([1, 2, 0.5, 1])
    found = divergence(norm, values)
    assert abs(found[0]) < 1e-12
    assert (found[1:] > 1e-5).all()


def test_variance_survives_a_mean_ten_thousand_times_the_deviation():
    values = 1000 + 0.1 * torch.randn(4096, 1, generator=rng.stream("values"))
    # Sums of squares about zero, in float32, would lose this variance of 0.01 in 1,000,000.
    expected = values.double().var().item()
    moments = bnp_module._Moments(norm := norm_of([1000.0], [expected]))
    moments.add(values[:, :, None, None])
    shift = values.double().mean().item() - 1000
    assert moments.divergence().item() == pytest.approx(shift**2 / (2 * expected), rel=1e-3, abs=1e-7)
    assert divergence(norm, *values.split(100)).item() == pytest.approx(moments.divergence().item(), rel=1e-6)


def test_statistics_pool_all_batches(toy_model, toy_images, monkeypatch):
    images = toy_images(count=25)
    monkeypatch.setattr(bnp_module, "BATCH_SIZE", 4)  # seven batches, the last of one image
    pooled = bnp_module.channel_divergences(toy_model, norms_of(toy_model), images, rng.stream("any"))
    whole = plain_divergences(toy_model, [to_float(images.images)])
    torch.testing.assert_close(pooled, whole, rtol=1e-5, atol=1e-9)
    assert min(part.min() for part in whole) > 1e-4  # none is zero, so the comparison means something


def test_images_are_augmented_as_in_training_and_each_seen_once(toy_model, toy_images):
    images = toy_images(count=24, augmentation=Augmentation(crop_padding=3, flip=True))
    found = bnp_module.channel_divergences(toy_model, norms_of(toy_model), images, rng.stream("crops"))
    batches = list(Loader(images, 512, images.info.augmentation).epoch(rng.stream("crops")))
    assert sum(len(batch.rows) for batch in batches) == 24
    seen = plain_divergences(toy_model, [batch.images for batch in batches])
    torch.testing.assert_close(found, seen, rtol=1e-5, atol=1e-9)
    bare = plain_divergences(toy_model, [to_float(images.images)])
    assert not torch.allclose(torch.cat(found), torch.cat(bare), rtol=0.01)


# --- The rule --------------------------------------------------------------------------------------


@pytest.fixture
def layer(toy_images):
    """Return one layer of 64 like channels, whose norm remembers what ``sample`` shows it."""
    images = toy_images(count=40)
    network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64, momentum=None))
    network[0].weight.data.normal_(generator=rng.stream("weights"))
    network.train()(to_float(toy_images(count=40, seed=1).images).contiguous())
    return network.eval(), DefenderSample(images, images[torch.arange(0)])


def test_a_shifted_channel_is_pruned_alone(layer):
    model, sample = layer
    norm = model[1]
    norm.running_mean[17] += 10 * norm.running_var[17].sqrt()
    before = copy.deepcopy(model.state_dict())
    norm.bias.data.fill_(0.5)
    repaired = defend(model, sample, u=3)
    assert sample.chosen == {"num_pruned": 1, "pruned": ["1:17"]}
    after = repaired.state_dict()
    scale, shift = torch.ones(64), torch.full((64,), 0.5)
    scale[17] = shift[17] = 0
    assert torch.equal(after["1.weight"], scale)
    assert torch.equal(after["1.bias"], shift)
    for name in ("0.weight", "0.bias", "1.running_mean", "1.running_var"):
        assert torch.equal(after[name], before[name]), name
    assert not repaired.training


def test_a_dead_channel_and_a_broken_one_do_not_disable_their_layer(layer):
    model, sample = layer
    convolution, norm = model
    norm.running_mean[17] += 10 * norm.running_var[17].sqrt()
    for tensor in (convolution.weight, convolution.bias, norm.running_mean, norm.running_var):
        tensor.data[3] = 0  # dead: no variance at all, 0/0 without the epsilon
    norm.running_var[5] = math.nan
    norm.running_var[6] = math.inf
    found = bnp_module.channel_divergences(model, [norm], sample.train, rng.stream("any"))[0]
    assert found[3] == 0
    assert not found[5].isfinite()
    defend(model, sample, u=3)
    assert sample.chosen["pruned"] == ["1:17"]


@pytest.mark.parametrize(("channels", "u", "pruned"), [(10, 3, 0), (11, 3, 1), (17, 4, 0), (18, 4, 1)])
def test_few_channels_cannot_reach_the_threshold(channels, u, pruned):
    divergences = torch.zeros(channels, dtype=torch.float64)
    divergences[4] = 1e6  # (n - 1) / sqrt(n) deviations above the mean, however large it is
    assert choices.outliers(divergences, u).sum() == pruned


def test_layers_are_judged_by_the_unpruned_model(toy_model, toy_images):
    images = toy_images(count=40)
    sample = DefenderSample(images, images[torch.arange(0)])
    expected = []
    names = [name for name, module in toy_model.network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    for name, part in zip(names, plain_divergences(toy_model, [to_float(images.images)]), strict=True):
        above = part > part.mean() + 1.2 * part.std()
        expected += [f"{name}:{channel}" for channel in above.nonzero()[:, 0].tolist()]
    repaired = defend(toy_model, sample, u=1.2)
    assert sample.chosen["pruned"] == expected
    assert len({name.split(":")[0] for name in expected}) > 3  # in many layers, each behind pruned ones
    gone = sum(int((norm.weight == 0).sum()) for norm in norms_of(repaired))
    assert gone == sample.chosen["num_pruned"] == len(expected)


def test_a_network_without_running_statistics_is_refused(layer):
    with pytest.raises(NotApplicableError, match="batch normalization"):
        defend(layer[0][:1], layer[1])


def test_the_shift_of_a_pruned_channel_goes_or_stays(layer):
    model, sample = layer
    norm = model[1]
    norm.running_mean[17] += 10 * norm.running_var[17].sqrt()
    norm.bias.data[17] = 0.5
    images = to_float(sample.train.images)
    for zero_shift, constant in ((True, 0.0), (False, 0.5)):
        with torch.no_grad():
            maps = defend(model, dataclasses.replace(sample, chosen={}), zero_shift=zero_shift)(images)
        assert (maps[:, 17] == constant).all()
        assert maps[:, 16].std() > 0


def test_two_hundred_classes_have_a_wider_margin():
    margins = {
        protocol: [
            protocols.settings("bnp", protocol, {"num_classes": count})["u"] for count in (10, 43, 200)
        ]
        for protocol in ("survey", "paper")
    }
    assert margins == {"survey": [3, 3, 4], "paper": [3, 3, 3]}


# --- A trained backdoor ----------------------------------------------------------------------------


def test_bnp_removes_a_trained_backdoor_where_the_margin_fits_the_width(backdoored):
    """With 8 channels no score exceeds 2.47 deviations, so u = 3 can't touch the first two stages."""
    before = backdoored.rates(backdoored.model)
    assert before[1] > 0.9
    after = backdoored.rates(defend(backdoored.model, backdoored.sample, u=2))
    assert after[0] > before[0] - 0.03
    assert after[1] < 0.2
    assert after[2] > 0.7
    wide = dataclasses.replace(backdoored.sample, chosen={})
    narrow_kept = backdoored.rates(defend(backdoored.model, wide, u=3))
    assert narrow_kept[1] > 0.5
    assert set(wide.chosen["pruned"]) < set(backdoored.sample.chosen["pruned"])
