"""NFT: masks within their bounds on hand-made networks, and what it changes of a trained one."""

import copy
import math

import pytest
import torch

from detrojan import registry, rng
from detrojan.learning import inference


def load(**settings):
    return registry.load("defenses", "nft", settings)


def defend(model, clean, **settings):
    return load(**settings)(model, clean, rng=rng.stream("test"))


def test_bounds_fall_from_layer_to_layer():
    bounds = load().bounds([1] * 16)
    assert bounds[[0, 1, 2, 15]].tolist() == pytest.approx([0.4852, 0.2943, 0.1785, 2.684e-4], rel=1e-3)
    assert load().bounds([2, 3]).shape == (5,)


def test_the_rate_falls_along_a_cosine_to_the_least():
    rates = [load().lr_at(epoch, 100) for epoch in (0, 50, 100)]
    assert rates == pytest.approx([0.1, 0.06, 0.02])


def test_only_scales_and_running_statistics_change_within_the_bounds(toy_model, sample):
    before = copy.deepcopy(toy_model)
    repaired = defend(toy_model, sample, epochs=3, batch_size=16)
    kept, found = before.state_dict(), repaired.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in toy_model.state_dict().items()), "untouched"
    norms = [name for name, module in before.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    scales = {f"{name}.weight" for name in norms}
    statistics = {f"{name}.{kind}" for name in norms for kind in ("running_mean", "running_var")}
    changed = {name for name, value in found.items() if not torch.equal(value, kept[name])}
    assert scales & changed
    assert changed <= scales | statistics | {f"{name}.num_batches_tracked" for name in norms}
    for layer, name in enumerate(norms, 1):
        masks = found[f"{name}.weight"] / kept[f"{name}.weight"]
        assert masks.max() <= 1 + 1e-6
        assert masks.min() >= 0.8 * math.exp(-0.5 * layer) - 1e-6
    assert sample.chosen["norms"] == "batch"
    assert sample.chosen["num_channels"] == sum(len(found[name]) for name in scales)


def test_a_heavy_penalty_keeps_all_masks_at_one(toy_model, sample):
    weights = {name: w.clone() for name, w in toy_model.state_dict().items() if name.endswith("weight")}
    repaired = defend(toy_model, sample, epochs=1, batch_size=64, penalty=1e6, lr=1e-9, min_lr=0.0)
    assert sample.chosen["mean_mask"] == pytest.approx(1, abs=1e-2)
    free = defend(toy_model, sample, epochs=5, batch_size=8, penalty=0.0)
    assert sample.chosen["mean_mask"] < 0.99
    assert free.training is False
    assert set(weights) <= set(repaired.state_dict())


def test_the_trigger_s_channel_is_closed_as_far_as_its_bound_where_it_costs_nothing(red_or_green, red_sample):
    """Green idles on clean images but for its penalty; red is needed, and keeps the images right."""
    model = red_or_green(red=8.0, green=8.0, bias=1.0)
    before = inference.num_right(model, red_sample.everything)
    repaired = defend(model, red_sample, epochs=20, batch_size=16)
    assert inference.num_right(repaired, red_sample.everything) >= before - 1


def test_masks_folded_into_scales_are_the_gated_network(backdoored):
    """A backdoored model keeps its accuracy, and stays a network of the same parts."""
    repaired = defend(backdoored.model, backdoored.sample, epochs=20)
    acc, _, _ = backdoored.rates(repaired)
    assert acc > backdoored.rates(backdoored.model)[0] - 0.1
    assert repaired.state_dict().keys() == backdoored.model.state_dict().keys()


@pytest.mark.parametrize(("count", "steps"), [(1, 100), (300, 200)])
def test_mixtures_are_uniform_and_of_all_images(count, steps):
    from detrojan.defenses.clean_data.nft import _drawn

    generator = rng.stream("mixing")
    drawn = [_drawn(count, generator) for _ in range(steps)]
    assert 0.4 < sum(share for share, _ in drawn) / steps < 0.6
    assert all(sorted(order.tolist()) == list(range(count)) for _, order in drawn)
