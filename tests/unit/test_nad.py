"""NAD: attention maps by hand, the distillation step against its formula, and maps that can't teach."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detrojan import models, registry, rng
from detrojan.defenses.clean_data import nad as nad_module
from detrojan.errors import NotApplicableError
from detrojan.images import to_float
from detrojan.learning import training
from detrojan.settings import Optimization
from detrojan.study import protocols, schema

TOY_LAYERS = ["layer1", "layer2", "layer3"]  # 8, 4 and 2 pixels wide on images of 8 pixels


def load(**settings):
    return registry.load("defenses", "nad", {"layers": TOY_LAYERS} | settings)


def defend(defense, model, clean):
    return defense(model, clean, rng=rng.stream("test"))


def stream(name):
    """Return the generator that NAD gives to its teacher or student in ``defend``."""
    return rng.child(rng.stream("test"), name)


def constant(epochs, **settings):
    values = {"batch_size": 256, "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4} | settings
    return Optimization(epochs=epochs, schedule="constant", **values)


def maps(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


# --- Attention -------------------------------------------------------------------------------------


def test_attention_is_the_normalized_sum_of_squares_over_channels():
    image = torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]])  # two channels of 1×2 positions
    length = math.sqrt(10**2 + 4**2)
    expected = torch.tensor([[10 / length, 4 / length]])
    torch.testing.assert_close(nad_module.attention(image, 2), expected)
    cubes = torch.tensor([[28 / math.sqrt(28**2 + 8**2), 8 / math.sqrt(28**2 + 8**2)]])
    torch.testing.assert_close(nad_module.attention(-image, 3), cubes)  # of absolute values


def test_attention_loss_is_the_mean_over_images_and_positions():
    teacher = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]], [[[2.0, 0.0], [0.0, 0.0]]]])
    student = torch.tensor([[[[0.0, 5.0], [0.0, 0.0]]], [[[3.0, 0.0], [0.0, 0.0]]]])
    # First image: two of four positions differ by 1. Second image: the same attention.
    assert nad_module.attention_loss(student, teacher, 2, "mean").item() == pytest.approx(2 / 8, rel=1e-5)
    assert nad_module.attention_loss(student, teacher, 2, "sum").item() == pytest.approx(2 / 2, rel=1e-5)


def test_a_sum_over_positions_does_not_depend_on_the_size_of_a_map():
    pair = maps(3, 5, 4, 4), maps(3, 5, 4, 4, seed=1)
    larger = [F.interpolate(some, scale_factor=2, mode="nearest") for some in pair]
    for positions, factor in (("sum", 1), ("mean", 1 / 4)):
        value = nad_module.attention_loss(*pair, 2, positions)
        torch.testing.assert_close(
            nad_module.attention_loss(*larger, 2, positions), factor * value, rtol=0, atol=1e-6
        )
        assert value > 1e-3


def test_weights_of_the_paper_are_those_of_a_mean_over_its_own_maps():
    paper = protocols.settings("nad", "paper", {"num_classes": 10})
    for beta, mean_beta, side in (("beta1", 500, 32), ("beta2", 1000, 16), ("beta3", 1000, 8)):
        pair = maps(2, 3, side, side), maps(2, 3, side, side, seed=1)
        ours = paper[beta] * nad_module.attention_loss(*pair, 2, paper["positions"])
        torch.testing.assert_close(ours, mean_beta * nad_module.attention_loss(*pair, 2, "mean"))


def test_attention_loss_ignores_the_scale_of_maps():
    student, teacher = maps(3, 5, 4, 4), maps(3, 5, 4, 4, seed=1)
    value = nad_module.attention_loss(student, teacher, 2, "mean")
    assert value > 1e-4
    for scale in (-7.0, 0.1, 100.0):
        torch.testing.assert_close(nad_module.attention_loss(scale * student, teacher, 2, "mean"), value)
        torch.testing.assert_close(nad_module.attention_loss(student, scale * teacher, 2, "mean"), value)


@pytest.mark.parametrize(("side", "moves"), [(1, False), (2, True)])
def test_attention_of_one_position_teaches_nothing(side, moves):
    student = maps(3, 5, side, side).requires_grad_()
    value = nad_module.attention_loss(student, maps(3, 5, side, side, seed=1), 2, "mean")
    (gradient,) = torch.autograd.grad(value, student)
    assert (value > 1e-4) == moves
    assert (gradient.abs().max() > 1e-4) == moves
    if not moves:
        assert value < 1e-12
        assert gradient.abs().max() < 1e-12


def test_attention_of_an_idle_layer_has_a_gradient():
    student = torch.zeros(2, 3, 2, 2, requires_grad=True)
    value = nad_module.attention_loss(student, maps(2, 3, 2, 2), 2, "mean")
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.isfinite().all()


def distances(student, teacher, sample):
    """Return the attention loss of each layer, both models in the mode that they are in."""
    with (
        torch.no_grad(),
        nad_module._recorded(student, TOY_LAYERS) as seen,
        nad_module._recorded(teacher, TOY_LAYERS) as taught,
    ):
        images = to_float(sample.train.images)
        student(images), teacher(images)
    return [nad_module.attention_loss(seen[layer], taught[layer], 2, "mean").item() for layer in TOY_LAYERS]


def test_attention_differs_once_the_teacher_has_learned(toy_model, sample):
    teacher = copy.deepcopy(toy_model)
    assert distances(toy_model, teacher, sample) == [0, 0, 0]
    training.fit(teacher, sample.everything, constant(10), rng=stream("teacher"))
    assert min(distances(toy_model, teacher, sample)) > 1e-4


# --- Distillation ----------------------------------------------------------------------------------


def test_a_step_is_that_of_the_formula(toy_model, sample):
    settings = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}
    repaired = defend(load(teacher_epochs=5, epochs=1, **settings), toy_model, sample)

    images = sample.everything
    teacher, student = copy.deepcopy(toy_model), copy.deepcopy(toy_model).train()
    training.fit(teacher, images, constant(5, **settings), rng=stream("teacher"))

    def stages(model):
        value, found = model.network.conv1((to_float(images.images) - model.mean) / model.std), []
        for layer in (model.network.layer1, model.network.layer2, model.network.layer3):
            value = layer(value)
            found.append(value)
        value = model.network.layer4(value)
        return found, model.network.linear(value.mean((2, 3)))

    def attention(maps):
        squares = (maps**2).sum(1)
        return squares / (squares**2).sum((1, 2), keepdim=True).sqrt()

    seen, logits = stages(student)
    with torch.no_grad():
        taught, _ = stages(teacher)
    loss = F.cross_entropy(logits, images.labels)
    plain = torch.autograd.grad(loss, student.network.layer3[1].conv2.weight, retain_graph=True)[0]
    for beta, ours, theirs in zip((500, 1000, 1000), seen, taught, strict=True):
        loss = loss + beta * ((attention(ours) - attention(theirs)) ** 2).mean()
    gradients = torch.autograd.grad(loss, list(student.parameters()))
    for (name, before), after, gradient in zip(
        toy_model.named_parameters(), repaired.parameters(), gradients, strict=True
    ):
        torch.testing.assert_close(after, before - 0.1 * gradient, rtol=1e-4, atol=1e-5, msg=name)
    # The attention loss is a real part of that step, and one pass updated the running statistics once.
    named = dict(zip(dict(student.named_parameters()), gradients, strict=True))
    assert (named["network.layer3.1.conv2.weight"] - plain).norm() > 0.1 * plain.norm()
    norm = toy_model.network.layer1[0].bn1
    assert repaired.network.layer1[0].bn1.num_batches_tracked == norm.num_batches_tracked + 1
    torch.testing.assert_close(
        repaired.network.layer4[1].bn2.running_mean, student.network.layer4[1].bn2.running_mean
    )


def test_without_attention_it_is_fine_tuning_at_a_constant_rate(toy_model, sample):
    none = {"beta1": 0, "beta2": 0, "beta3": 0}
    repaired = defend(load(epochs=3, batch_size=16, **none), toy_model, sample)
    tuned = copy.deepcopy(toy_model)
    training.fit(tuned, sample.everything, constant(3, batch_size=16), rng=stream("student"))
    torch.testing.assert_close(repaired.state_dict(), tuned.state_dict(), rtol=0, atol=0)


def test_the_student_comes_to_look_where_the_teacher_does(toy_model, sample):
    teacher, lr = copy.deepcopy(toy_model), 0.001
    training.fit(teacher, sample.everything, constant(10, lr=lr), rng=stream("teacher"))
    student = defend(load(lr=lr, epochs=30), toy_model, sample)
    before, after = sum(distances(toy_model, teacher, sample)), sum(distances(student, teacher, sample))
    assert after < 0.2 * before


def test_each_pass_yields_all_maps_and_the_teacher_is_frozen(toy_model, sample, monkeypatch):
    calls = []

    def spy(student, teacher, power, positions):
        calls.append((student.requires_grad, teacher.requires_grad, tuple(student.shape)))
        return student.sum() * 0

    monkeypatch.setattr(nad_module, "attention_loss", spy)
    repaired = defend(load(epochs=2, batch_size=20), toy_model, sample)
    sizes = [(20, 4, 8, 8), (20, 8, 4, 4), (20, 16, 2, 2)]
    assert calls == [(True, False, size) for size in sizes * 4]  # two epochs of two steps
    assert not any(module._forward_hooks for module in repaired.modules())
    assert all(parameter.requires_grad for parameter in repaired.parameters())
    assert sample.chosen == {"layers": TOY_LAYERS}


def test_the_rate_falls_after_a_share_of_the_passes():
    paper = registry.load("defenses", "nad", protocols.settings("nad", "paper", {"num_classes": 10}))
    for epochs in (20, 100, 400):
        first = epochs // 10
        assert [paper.lr_at(epoch, epochs) for epoch in range(epochs)] == [0.1] * first + [0.01] * (
            epochs - first
        )
    survey = registry.load("defenses", "nad")
    assert {survey.lr_at(epoch, 10) for epoch in range(10)} == {0.01}


def test_teacher_and_student_are_trained_as_the_settings_say(toy_model, sample, monkeypatch):
    seen, descend = [], training.descend

    def spy(parts, *arguments, epochs, **options):
        (part,) = parts.values()
        optimizer = part.optimizer.defaults
        seen.append((optimizer["nesterov"], optimizer["weight_decay"], epochs, part.lr_at(0), part.lr_at(1)))
        return descend(parts, *arguments, epochs=epochs, **options)

    monkeypatch.setattr(training, "descend", spy)
    settings = {"nesterov": True, "weight_decay": 1e-4, "first_lr": 0.02, "first_share": 0.3, "hole": 2}
    floors = {"teacher_epochs": 1, "teacher_min_steps": 5, "epochs": 1, "min_steps": 7, "batch_size": 20}
    defend(load(**settings, **floors), toy_model, sample)  # 40 images: two steps a pass
    assert seen == [(True, 1e-4, 3, 0.02, 0.01), (True, 1e-4, 4, 0.02, 0.01)]


def test_a_hole_is_a_black_square_anywhere_cut_off_at_the_border():
    images = torch.ones(4000, 3, 6, 8)
    black = nad_module.punched(images, 2, rng.stream("holes")) == 0
    assert torch.equal(black[:, 0], black[:, 2])  # all channels
    rows, columns = black[:, 0].any(2).sum(1), black[:, 0].any(1).sum(1)
    assert torch.equal(rows * columns, black[:, 0].sum((1, 2)))  # a rectangle
    # Its centre may be any row: cut off in the first of six, and two pixels high in the others.
    assert (rows == 1).double().mean().item() == pytest.approx(1 / 6, abs=0.03)
    assert (columns == 1).double().mean().item() == pytest.approx(1 / 8, abs=0.03)
    assert {int(rows.max()), int(columns.max())} == {2}
    assert black[rows == 1, 0, 0].any(1).all()
    assert black[columns == 1, 0, :, 0].any(1).all()
    assert (images == 1).all()


# --- What it can't compare --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ("layer4", r"'layer4' \(1×1\) are the same at every position.* setting 'layers'"),
        ("avgpool", r"'avgpool' \(1×1\)"),
        ("linear", r"'linear' puts out shape \(16, 4\).* setting 'layers'"),
        ("features.3", r"no layer features\.3: .* setting 'layers'; it has conv1, layer1"),
    ],
)
def test_a_layer_without_positions_is_refused(toy_model, sample, layer, reason):
    with pytest.raises(NotApplicableError, match=reason):
        defend(load(layers=["layer1", "layer2", layer]), toy_model, sample)
    assert not any(module._forward_hooks for module in toy_model.modules())


def test_copies_of_one_position_are_refused(sample):
    # What VGG's pool makes of a 32×32 image: one position, copied to 7×7.
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 6), nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(196, 4)
    )
    model = models.Classifier(network, models.Build("toy", {}, 4, (0.5,) * 3, (0.25,) * 3)).eval()
    with pytest.raises(NotApplicableError, match=r"layer '2' \(7×7\) are the same at every position"):
        defend(load(layers=["0", "0", "2"]), model, sample)


def test_a_module_that_is_never_called_is_refused(toy_model, sample):
    spare = copy.deepcopy(toy_model)
    spare.network.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(NotApplicableError, match="'spare' is never called"):
        defend(load(layers=["layer1", "layer2", "spare"]), spare, sample)


@pytest.mark.parametrize(
    ("architecture", "sides"),
    [
        ("preactresnet18", [16, 8, 4]),
        ("vgg19_bn", [4, 2, 2]),
        ("efficientnet_b3", [8, 4, 2]),
        ("mobilenet_v3_large", [8, 4, 2]),
    ],
)
def test_layers_of_every_architecture_have_positions(architecture, sides):
    settings = schema.shipped("defenses", "nad").resolve({"architecture": architecture})
    # Found where none are named.
    layers = registry.load("defenses", "nad", settings).layers or ["layer2", "layer3", "layer4"]
    with torch.device("meta"):  # shapes alone
        network = registry.load("models", architecture).network(10).eval()
        for side, scale in ((32, 1), (64, 2)):
            with nad_module._recorded(network, layers) as seen:
                network(torch.empty(1, 3, side, side))
            assert [seen[layer].shape[2] for layer in layers] == [scale * s for s in sides]


# --- Backdoor --------------------------------------------------------------------------------------


def test_it_removes_a_patch_backdoor(backdoored):
    acc, asr, _ = backdoored.rates(backdoored.model)
    assert (acc > 0.9, asr > 0.9) == (True, True)
    # Of images of 16 pixels, layer4 has 2×2 positions, and the loss of so few outweighs the labels.
    defense = load(epochs=10, teacher_epochs=10, batch_size=16, lr=0.03)
    acc, asr, ra = backdoored.rates(defend(defense, backdoored.model, backdoored.sample))
    assert acc > 0.85
    assert asr < 0.2
    assert ra > 0.75


def test_layers_are_three_or_none(backdoored):
    assert registry.load("defenses", "nad", {}).layers == []
    with pytest.raises(
        NotApplicableError, match="name three layers, or none to have them found: there are 2"
    ):
        defend(load(layers=["layer1", "layer2"]), backdoored.model, backdoored.sample)
