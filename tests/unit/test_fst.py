"""FST: the drawn layers, the shifted loss and the projection, each against its formula."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detrojan import models, registry, rng
from detrojan.defenses.clean_data import fst as fst_module
from detrojan.errors import NotApplicableError
from detrojan.images import to_float
from detrojan.learning import training
from detrojan.models._parts import places
from detrojan.settings import Optimization
from detrojan.study import protocols, schema


@pytest.fixture
def two_layers():
    """Return a classifier whose head has two linear layers, and their names."""
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Tanh(), nn.Linear(6, 4))
    for parameter in network.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    build = models.Build("toy", {}, 4, (0.5,) * 3, (0.25,) * 3)
    return models.Classifier(network, build).eval(), ["1", "3"]


def load(**settings):
    return registry.load("defenses", "fst", settings)


def defend(defense, model, clean):
    return defense(model, clean, rng=rng.stream("test"))


def stream(name):
    return rng.child(rng.stream("test"), name)


def cosine(model, original):
    return F.cosine_similarity(
        model.network.linear.weight.flatten(), original.network.linear.weight.flatten(), dim=0
    ).item()


# --- New layers ------------------------------------------------------------------------------------


def test_layers_are_drawn_uniform_within_the_root_of_their_inputs(toy_model):
    repaired = copy.deepcopy(toy_model)
    layer = repaired.network.linear = nn.Linear(32, 400)
    layers = fst_module.NewLayers(repaired, ["linear"])
    before, others = layer.weight.clone(), copy.deepcopy(repaired.network.layer4.state_dict())
    layers.draw(stream("layers"))
    bound = 32**-0.5
    for parameter in (layer.weight, layer.bias):
        assert parameter.abs().max() <= bound
        for limit in (-0.5 * bound, 0, 0.5 * bound):  # quartiles of a uniform distribution
            share = (parameter < limit).float().mean().item()
            assert share == pytest.approx((limit + bound) / (2 * bound), abs=0.1)
    assert torch.equal(layers.originals[0], before)
    torch.testing.assert_close(repaired.network.layer4.state_dict(), others, rtol=0, atol=0)


def test_the_draw_is_a_stream_of_its_own(two_layers):
    model, names = two_layers
    drawn = []
    for consumed in (0, 5):
        generator = rng.stream("test")
        torch.rand(consumed, generator=generator)
        repaired = copy.deepcopy(model)
        fst_module.NewLayers(repaired, names).draw(rng.child(generator, "layers"))
        drawn.append(repaired.state_dict())
    torch.testing.assert_close(*drawn, rtol=0, atol=0)
    first = torch.empty(6, 192).uniform_(-(192**-0.5), 192**-0.5, generator=stream("layers"))
    assert torch.equal(drawn[0]["network.1.weight"], first)


def test_alignment_is_the_sum_of_inner_products(two_layers):
    model, names = two_layers
    repaired = copy.deepcopy(model)
    layers = fst_module.NewLayers(repaired, names)
    layers.draw(stream("layers"))
    old, new = model.network, repaired.network
    products = [(old[i].weight.double() * new[i].weight.double()).sum() for i in (1, 3)]
    value = layers.alignment()
    assert value.item() == pytest.approx(sum(products).item(), rel=1e-5)
    gradients = torch.autograd.grad(value, [new[1].weight, new[3].weight])
    assert torch.equal(gradients[0], old[1].weight)
    assert torch.equal(gradients[1], old[3].weight)


def test_projection_keeps_direction_and_restores_the_norm():
    model = nn.Sequential(nn.Linear(2, 1))
    model[0].weight.data = torch.tensor([[3.0, 4.0]])
    layers = fst_module.NewLayers(model, ["0"])
    model[0].weight.data = torch.tensor([[0.0, 0.5]])
    model[0].bias.data.fill_(7.0)
    layers.project()
    torch.testing.assert_close(model[0].weight.detach(), torch.tensor([[0.0, 5.0]]))
    assert model[0].bias.item() == 7
    assert model[0].weight.grad_fn is None
    assert model[0].weight.requires_grad


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        (
            ["layer4.0.conv1"],
            "'layer4.0.conv1' anew, but it is Conv2d: set FST's 'layers' to some of linear$",
        ),
        (["linear", "classifier.3"], "'classifier.3' anew, but there is none: set FST's 'layers' to"),
    ],
)
def test_a_layer_that_is_not_linear_is_refused(toy_model, sample, layers, reason):
    with pytest.raises(NotApplicableError, match=reason):
        defend(load(layers=layers), toy_model, sample)


@pytest.mark.parametrize(
    ("architecture", "share"),
    [
        ("preactresnet18", 0.00046),
        ("efficientnet_b3", 0.0014),
        ("mobilenet_v3_large", 0.295),
        ("vgg19_bn", 0.856),
    ],
)
def test_layers_of_every_architecture_are_those_of_the_head(architecture, share):
    settings = schema.shipped("defenses", "fst").resolve({"architecture": architecture, "num_classes": 43})
    defense = registry.load("defenses", "fst", settings)
    assert (defense.epochs, defense.alpha, defense.lr) == (15, 0.1, 0.01)
    assert defense.layers == []
    with torch.device("meta"):
        network = registry.load("models", architecture).network(10)
        names = places.head(network, torch.empty(1, 3, 32, 32)).layers
        found = fst_module.NewLayers(network, names).layers
    assert found == [module for module in network.modules() if isinstance(module, nn.Linear)]
    weights = sum(p.numel() for layer in found for p in layer.parameters())
    assert weights / sum(p.numel() for p in network.parameters()) == pytest.approx(share, rel=0.05)


def test_the_head_alone_is_its_last_layer(two_layers, sample):
    model, names = two_layers
    repaired = defend(load(layers=names, head_only=True, epochs=1, lr=1e-9), model, sample)
    torch.testing.assert_close(repaired.network[1].weight, model.network[1].weight)
    new, old = (some.network[3].weight for some in (repaired, model))
    assert F.cosine_similarity(new.flatten(), old.flatten(), dim=0).abs() < 0.9
    torch.testing.assert_close(new.norm(), old.norm())
    whole = defend(load(layers=names, epochs=1, lr=1e-9), model, sample)
    assert not torch.allclose(whole.network[1].weight, model.network[1].weight)


@pytest.mark.parametrize(
    ("num_classes", "survey", "paper"),
    [
        (10, (10, 0.2, 0.01), (10, 0.2, 0.01)),
        (43, (15, 0.1, 0.01), (15, 0.1, 0.01)),
        (200, (15, 0.001, 0.001), (15, 0.001, 0.01)),
    ],
)
def test_values_by_number_of_classes(num_classes, survey, paper):
    for protocol, expected in (("survey", survey), ("paper", paper)):
        facts = {"num_classes": num_classes, "architecture": "vgg19_bn"}
        settings = protocols.settings("fst", protocol, facts)
        assert (settings["epochs"], settings["alpha"], settings["lr"]) == expected
        assert settings["head_only"] == (protocol == "paper")


# --- Tuning ----------------------------------------------------------------------------------------


def test_norms_are_the_old_ones_after_every_step(two_layers, sample, monkeypatch):
    model, names = two_layers
    moved, kept = [], []
    project = fst_module.NewLayers.project

    def spy(layers):
        moved.append([layer.weight.norm().item() for layer in layers.layers])
        project(layers)
        kept.append([layer.weight.norm().item() for layer in layers.layers])

    monkeypatch.setattr(fst_module.NewLayers, "project", spy)
    defend(load(layers=names, epochs=3, batch_size=16, lr=0.1), model, sample)
    norms = [model.network[i].weight.norm().item() for i in (1, 3)]
    assert len(kept) == 9  # 40 images: three steps an epoch
    for before, after in zip(moved, kept, strict=True):
        assert after == pytest.approx(norms, rel=1e-4)
        assert before != pytest.approx(norms, rel=1e-3)  # the projection had something to do


def test_a_step_is_that_of_the_formula(two_layers, sample):
    model, names = two_layers
    repaired = defend(load(layers=names, epochs=1, lr=0.5, alpha=0.3), model, sample)

    expected = copy.deepcopy(model)
    generator, old, new = stream("layers"), model.network, expected.network
    for i in (1, 3):
        bound = old[i].in_features ** -0.5
        new[i].weight.data.uniform_(-bound, bound, generator=generator)
        new[i].bias.data.uniform_(-bound, bound, generator=generator)
    images = sample.everything
    loss = F.cross_entropy(expected(to_float(images.images)), images.labels)
    gradients = torch.autograd.grad(loss, [p for i in (1, 3) for p in (new[i].weight, new[i].bias)])
    for i, (weight, bias) in ((1, gradients[:2]), (3, gradients[2:])):
        moved = new[i].weight - 0.5 * (weight + 0.3 * old[i].weight)
        moved = moved * old[i].weight.norm() / moved.norm()
        torch.testing.assert_close(repaired.network[i].weight, moved, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(repaired.network[i].bias, new[i].bias - 0.5 * bias, rtol=1e-4, atol=1e-6)


def test_without_its_parts_it_is_fine_tuning_without_weight_decay(toy_model, sample, monkeypatch):
    monkeypatch.setattr(fst_module.NewLayers, "draw", lambda _layers, _rng: None)
    monkeypatch.setattr(fst_module.NewLayers, "project", lambda _layers: None)
    repaired = defend(load(alpha=0, epochs=4, batch_size=16), toy_model, sample)
    tuned = copy.deepcopy(toy_model)
    optimization = Optimization(epochs=4, batch_size=16, lr=0.01, momentum=0.9, weight_decay=0)
    training.fit(tuned, sample.everything, optimization, rng=stream("tune"))
    torch.testing.assert_close(repaired.state_dict(), tuned.state_dict(), rtol=0, atol=0)


def test_alpha_turns_the_classifier_away_from_what_it_was(toy_model, sample):
    def tuned(alpha):
        return cosine(defend(load(alpha=alpha, epochs=20, batch_size=16), toy_model, sample), toy_model)

    free, shifted = tuned(0), tuned(0.2)
    assert shifted < free - 0.1
    assert shifted < 0


# --- Backdoor --------------------------------------------------------------------------------------


def test_it_removes_a_patch_backdoor(backdoored):
    acc, asr, _ = backdoored.rates(backdoored.model)
    assert (acc > 0.9, asr > 0.9) == (True, True)
    # 280 steps: a new classifier has to be learned, and the ten of the defaults are too few for it.
    defense = load(epochs=40, batch_size=16, lr=0.05)
    acc, asr, ra = backdoored.rates(defend(defense, backdoored.model, backdoored.sample))
    assert acc > 0.9
    assert asr < 0.15
    assert ra > 0.8
