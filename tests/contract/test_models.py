"""Every architecture of the registry keeps the interface; a new file is tested without a change here."""

import copy

import pytest
import torch

from detrojan import models, registry, rng
from detrojan.models._parts import places
from detrojan.models.base import Architecture
from detrojan.storage import artifacts
from tests.contract.conftest import narrow_settings

NUM_CLASSES = 7


@pytest.fixture(params=registry.names("models"), scope="module")
def name(request):
    return request.param


def sides(name):
    """Return the sides of images to try: the smallest that it takes, and those of the survey's data sets."""
    smallest = registry.declared("models", name).constants["min_side"]
    return sorted({smallest, max(32, smallest), max(64, smallest)})


def build(name, **settings):
    with rng.global_stream(rng.stream("init")):
        return models.build(models.Build(name, settings, NUM_CLASSES, (0.5,) * 3, (0.25,) * 3))


def on_meta(name):
    """Return a network without memory or values, which even VGG is quickly."""
    with torch.device("meta"):
        return registry.load("models", name).network(NUM_CLASSES)


def test_architecture_is_declared_in_full(name):
    architecture = registry.load("models", name)
    assert isinstance(architecture, Architecture)
    assert isinstance(registry.declared("models", name).constants["min_side"], int)
    assert all(field.description for field in type(architecture).model_fields.values())


def test_images_become_logits_by_way_of_flat_features(name):
    model = build(name)
    assert not model.training
    features = []
    head = places.head(model.network, torch.empty(1, 3, sides(name)[-1], sides(name)[-1])).layers
    first, last = (model.network.get_submodule(layer) for layer in (head[0], head[-1]))
    assert last.out_features == NUM_CLASSES
    first.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].ndim))
    for side in sides(name):
        with torch.inference_mode():
            logits = model(torch.rand(2, 3, side, side))
        assert logits.shape == (2, NUM_CLASSES)
        assert logits.isfinite().all()
    assert set(features) == {2}  # the head reads flat features


def test_copies_are_separate(name):
    network = on_meta(name)
    copied = copy.deepcopy(network)
    assert copied.state_dict().keys() == network.state_dict().keys()
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in network.parameters()}


def test_weights_come_from_the_global_stream_alone_and_survive_a_file(name, tmp_path):
    settings = narrow_settings(name)
    model, again = build(name, **settings), build(name, **settings)
    torch.testing.assert_close(model.state_dict(), again.state_dict(), rtol=0, atol=0)
    path, images = tmp_path / "model.safetensors", torch.rand(2, 3, sides(name)[-1], sides(name)[-1])
    artifacts.write_model(model, path)
    with torch.inference_mode():
        assert torch.equal(artifacts.read_model(path)(images), model(images))


def test_every_weight_of_it_learns(name):
    # A weight that no gradient reaches would be none that a defense can move.
    model = build(name, **narrow_settings(name)).train()
    side = sides(name)[-1]
    model(torch.rand(2, 3, side, side)).square().sum().backward()
    assert [key for key, value in model.named_parameters() if value.grad is None] == []
