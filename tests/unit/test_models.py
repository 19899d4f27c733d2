"""Architectures, the classifier around them, their wiring, and their files."""

import ast
import collections
import copy
import dataclasses

import pydantic
import pytest
import torch
from torch import nn

from detrojan import models, registry
from detrojan import rng as streams
from detrojan.errors import DivergedError
from detrojan.images import to_float
from detrojan.models._parts import insertions, structure
from detrojan.models._parts.insertions import Ceiling, Polarizer, TokenCeiling
from detrojan.models.preactresnet18 import PreActBlock
from detrojan.registry import PACKAGE
from detrojan.storage import artifacts

# Of 10, 43 and 200 classes (CIFAR-10, GTSRB, Tiny-ImageNet).
PARAMETERS = {
    "preactresnet18": (11_171_146, 11_188_075, 11_268_616),
    "vgg19_bn": (139_622_218, 139_757_419, 140_400_648),
    "efficientnet_b3": (10_711_602, 10_762_323, 11_003_632),
    "mobilenet_v3_large": (4_214_842, 4_257_115, 4_458_232),
    "resnet18_small": (11_173_962, 11_190_891, 11_271_432),
}


def on_meta(architecture, num_classes=10, **settings):
    """Return a network without memory or values, which even VGG is quickly."""
    with torch.device("meta"):
        return registry.load("models", architecture, settings).network(num_classes)


@pytest.mark.parametrize("architecture", PARAMETERS)
def test_parameter_counts(architecture):
    counts = [sum(p.numel() for p in on_meta(architecture, k).parameters()) for k in (10, 43, 200)]
    assert tuple(counts) == PARAMETERS[architecture]


def test_preactresnet18_has_102_state_dict_entries():
    assert len(on_meta("preactresnet18").state_dict()) == 102


@pytest.mark.parametrize("architecture", PARAMETERS)
def test_forward(architecture):
    # The real VGG too, which is narrower among the contract tests.
    classifier = models.build(models.Build(architecture, {}, 7, (0.5,) * 3, (0.25,) * 3))
    assert not classifier.training
    features = []
    list(classifier.network.children())[-1].register_forward_pre_hook(
        lambda _, inputs: features.append(inputs[0])
    )
    for side in (32, 64):
        with torch.inference_mode():
            logits = classifier(torch.rand(2, 3, side, side))
        assert logits.shape == (2, 7)
        assert logits.isfinite().all()
    assert [f.ndim for f in features] == [2, 2]  # the head reads flat features


def test_torchvision_is_imported_in_one_place():
    importers = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "torchvision" for name in names):
                importers.add(file)
    assert importers == {PACKAGE / "models/_parts/torchvision.py"}


# --- the classifier --------------------------------------------------------------------------------


def test_normalization_is_inside(toy_model, toy_images):
    raw = toy_images().images.float() / 255
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.25, 0.2, 0.3])
    normalized = (raw - mean[:, None, None]) / std[:, None, None]
    without = models.Classifier(
        toy_model.network, dataclasses.replace(toy_model.build, mean=(0.0,) * 3, std=(1.0,) * 3)
    )
    with torch.inference_mode():
        torch.testing.assert_close(toy_model(raw), without(normalized), rtol=0, atol=0)
        assert (toy_model(raw) - without(raw)).abs().max() > 1e-3


def test_mean_and_std_are_not_among_the_weights(toy_model):
    assert not {"mean", "std"} & set(toy_model.state_dict())


def test_width_is_the_first_stages_channels(toy_model):
    network = toy_model.network
    stages = [network.layer1, network.layer2, network.layer3, network.layer4]
    assert network.conv1.out_channels == 4
    assert [stage[1].conv2.out_channels for stage in stages] == [4, 8, 16, 32]
    assert (network.linear.in_features, network.linear.out_features) == (32, 4)
    with pytest.raises(pydantic.ValidationError, match="width"):
        registry.load("models", "preactresnet18", {"width": 0})


# --- PreAct-ResNet-18 ------------------------------------------------------------------------------


def ones_block(stride):
    """Return a block of one channel, all weights 1, whose normalizations change nothing."""
    block = PreActBlock(1, 1, stride).eval()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
        if isinstance(module, nn.Conv2d):
            nn.init.ones_(module.weight)
    return block


def test_shortcut_convolution_reads_the_activated_input():
    block = ones_block(stride=2)
    nn.init.constant_(block.shortcut.weight, 10)
    # ReLU leaves [[0, 2], [3, 0]]. The first convolution's window covers all of it: 5; then 5 again.
    # The shortcut takes the corner: 10 * 0 of the activated input, where the input has -1.
    images = torch.tensor([[[[-1.0, 2.0], [3.0, -4.0]]]])
    assert block(images).tolist() == [[[[5.0]]]]
    # ReLU leaves [[1, 0], [0, 0]]: 1 along the convolutions and 10 along the shortcut.
    assert block(torch.tensor([[[[1.0, -2.0], [-3.0, -4.0]]]])).tolist() == [[[[11.0]]]]


def test_identity_shortcut_keeps_the_raw_input():
    block = ones_block(stride=1)
    assert block.shortcut is None
    assert block(torch.tensor([[[[-2.0]]]])).tolist() == [[[[-2.0]]]]
    assert block(torch.tensor([[[[3.0]]]])).tolist() == [[[[6.0]]]]


def test_nothing_follows_the_last_stage(toy_model, toy_images):
    seen = {}
    network = toy_model.network
    network.layer4.register_forward_hook(lambda _, inputs, output: seen.update(maps=output))
    network.linear.register_forward_pre_hook(lambda _, inputs: seen.update(features=inputs[0]))
    with torch.inference_mode():
        toy_model(toy_images(side=16).images.float() / 255)
    assert seen["maps"].shape[2:] == (2, 2)
    torch.testing.assert_close(seen["features"], seen["maps"].mean((2, 3)))
    assert seen["features"].min() < 0 < seen["features"].max()
    norms = [name for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 16
    assert norms[-1] == "layer4.1.bn2"


# --- wiring ----------------------------------------------------------------------------------------


def test_wiring_of_preactresnet18():
    expected = {"conv1": None}
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            name = f"layer{stage}.{block}"
            expected |= {f"{name}.conv1": f"{name}.bn2", f"{name}.conv2": None}
        if stage > 1:
            expected[f"layer{stage}.0.shortcut"] = None
    assert structure.convolution_norms(on_meta("preactresnet18")) == expected


def test_wiring_of_vgg19_bn():
    firsts = (0, 3, 7, 10, 14, 17, 20, 23, 27, 30, 33, 36, 40, 43, 46, 49)
    expected = {f"features.{i}": f"features.{i + 1}" for i in firsts}
    assert structure.convolution_norms(on_meta("vgg19_bn")) == expected


@pytest.mark.parametrize(
    ("architecture", "num_pairs", "num_gates"), [("efficientnet_b3", 78, 26), ("mobilenet_v3_large", 46, 8)]
)
def test_wiring_of_gated_networks(architecture, num_pairs, num_gates):
    network = on_meta(architecture)
    pairs = structure.convolution_norms(network)
    # torchvision's blocks number a convolution 0 and its normalization 1.
    assert all(name.endswith(".0") and norm == f"{name[:-1]}1" for name, norm in pairs.items())
    modules = dict(network.named_modules())
    assert len(pairs) == num_pairs
    assert set(pairs.values()) == {name for name, m in modules.items() if isinstance(m, nn.BatchNorm2d)}
    left_out = {name for name, m in modules.items() if isinstance(m, nn.Conv2d)} - set(pairs)
    assert len(left_out) == 2 * num_gates
    assert {name.rpartition(".")[2] for name in left_out} == {"fc1", "fc2"}


@pytest.mark.parametrize(
    ("architecture", "kinds"),
    [
        ("preactresnet18", {nn.ReLU: 16}),
        ("vgg19_bn", {nn.ReLU: 16}),  # the two of the head follow linear layers
        ("efficientnet_b3", {nn.SiLU: 52}),
        ("mobilenet_v3_large", {nn.Hardswish: 20, nn.ReLU: 11}),
    ],
)
def test_activations_of_the_trunk(architecture, kinds):
    network = on_meta(architecture)
    pairs, modules = structure.norm_activations(network), dict(network.named_modules())
    assert collections.Counter(type(modules[name]) for name in pairs) == kinds
    # Each in the registration order stands behind its norm, and no norm is named twice.
    assert len(set(pairs.values())) == len(pairs)
    assert all(isinstance(modules[norm], nn.BatchNorm2d) for norm in pairs.values())
    assert not any(part in name for name in pairs for part in ("fc", "classifier"))


def test_activations_of_preactresnet18_are_two_a_block():
    pairs = structure.norm_activations(on_meta("preactresnet18"))
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert pairs == {f"{b}.relu{i}": f"{b}.bn{i}" for b in blocks for i in (1, 2)}


def test_an_activation_in_two_places_is_bounded_before_them():
    """Where a bound does the same there: not with SiLU."""

    def sites(kind):
        norms = [nn.BatchNorm2d(3) for _ in range(3)]
        shared = kind()
        network = nn.Sequential(norms[0], shared, norms[1], shared, norms[2], kind(), nn.Flatten())
        return structure.norm_activations(network)

    assert sites(nn.ReLU) == {"0": "0", "2": "2", "5": "4"}
    assert sites(nn.SiLU) == {"5": "4"}


# --- inserted layers -------------------------------------------------------------------------------

# Of each architecture: a convolution in a trunk, an activation behind a normalization.
HOSTS = {
    "preactresnet18": ("layer4.1.conv1", "layer2.0.relu1"),
    "vgg19_bn": ("features.49", "features.12"),
    "efficientnet_b3": ("features.8.0", "features.3.2.block.1.2"),
    "mobilenet_v3_large": ("features.16.0", "features.6.block.1.2"),
}


def insert_both(model):
    """Insert a polarizer and a ceiling that both change what ``model`` makes of images."""
    convolution, activation = HOSTS[model.build.architecture]
    norm = structure.norm_activations(model.network)[activation]
    rng = streams.stream("inserted")
    polarizer = Polarizer(model.network.get_submodule(convolution).in_channels)
    ceiling = Ceiling(model.network.get_submodule(norm).num_features)
    with torch.no_grad():
        polarizer.conv.weight.add_(0.2 * torch.rand(polarizer.conv.weight.shape, generator=rng))
        for value in (polarizer.bn.running_mean, polarizer.bn.running_var, polarizer.bn.bias):
            value.copy_(torch.rand(value.shape, generator=rng))
        ceiling.bound.copy_(0.2 * torch.rand(ceiling.bound.shape, generator=rng))
    model.insert(convolution, polarizer)
    model.insert(activation, ceiling)
    return model.eval()


def logits_of(model, images):
    with torch.inference_mode():
        return model(images)


@pytest.fixture
def raw(toy_images):
    return toy_images(side=16).images.float() / 255


@pytest.mark.parametrize("architecture", HOSTS)
def test_inserted_layers_survive_a_file(architecture, tmp_path):
    settings = {"width": 4} if architecture == "preactresnet18" else {}
    model = models.build(models.Build(architecture, settings, 3, (0.5,) * 3, (0.25,) * 3))
    images, path = torch.rand(4, 3, 32, 32), tmp_path / "model.safetensors"
    plain = logits_of(model, images)
    names = set(model.network.state_dict())
    expected = logits_of(insert_both(model), images)
    assert not torch.equal(expected, plain)
    artifacts.write_model(model, path)
    state = torch.get_rng_state()
    read = artifacts.read_model(path)
    path.unlink()  # half a gigabyte of VGG
    assert torch.equal(torch.get_rng_state(), state)
    assert read.build == model.build
    assert torch.equal(logits_of(read, images), expected)
    convolution, activation = HOSTS[architecture]
    assert read.build.inserted == {convolution: "polarizer", activation: "ceiling"}
    added = set(read.network.state_dict()) - names
    assert f"{convolution}.polarizer.conv.weight" in added
    assert f"{activation}.ceiling.bound" in added
    assert all(name.startswith((f"{convolution}.polarizer.", f"{activation}.ceiling.")) for name in added)


def test_inserted_layers_are_copied_and_work_apart(toy_model, raw):
    model = insert_both(toy_model)
    copied = copy.deepcopy(model)
    expected = logits_of(model, raw)
    assert torch.equal(logits_of(copied, raw), expected)
    with torch.no_grad():
        model.network.layer2[0].relu1.ceiling.bound.zero_()
        model.network.layer4[1].conv1.polarizer.conv.weight.zero_()
    assert not torch.equal(logits_of(model, raw), expected)
    assert torch.equal(logits_of(copied, raw), expected)
    assert copied.build == model.build


def test_fresh_layers_change_nothing(toy_model, raw):
    expected = logits_of(toy_model, raw)
    state = torch.get_rng_state()
    toy_model.insert("layer1.1.relu2", Ceiling(4))
    assert torch.equal(logits_of(toy_model, raw), expected)
    toy_model.insert("layer4.1.conv1", Polarizer(32).eval())
    torch.testing.assert_close(logits_of(toy_model, raw), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_polarizer_changes_what_its_host_reads(toy_model, raw):
    seen = {}
    convolution = toy_model.network.layer4[1].conv1
    toy_model.network.layer4[1].relu1.register_forward_hook(lambda _, i, o: seen.update(before=o))
    convolution.register_forward_hook(lambda _, i, o: seen.update(inputs=i[0], output=o))
    polarizer = Polarizer(32).eval()
    nn.init.zeros_(polarizer.conv.weight)
    nn.init.constant_(polarizer.bn.bias, 2.0)
    toy_model.insert("layer4.1.conv1", polarizer)
    logits_of(toy_model, raw)
    assert (seen["inputs"] == 2).all()
    assert not (seen["before"] == 2).all()
    twos = torch.full_like(seen["before"], 2.0)
    torch.testing.assert_close(
        seen["output"], nn.functional.conv2d(twos, convolution.weight, padding=1).detach()
    )


def test_a_ceiling_bounds_each_channel_and_learns_where_it_acts():
    ceiling = Ceiling(2)
    with torch.no_grad():
        ceiling.bound.copy_(torch.tensor([1.0, 3.0]))
    maps = torch.tensor([[[[0.5, 1.0, 2.0]], [[-4.0, 5.0, 9.0]]]], requires_grad=True)
    bounded = ceiling(maps)
    assert bounded.tolist() == [[[[0.5, 1.0, 1.0]], [[-4.0, 3.0, 3.0]]]]
    bounded.sum().backward()
    assert ceiling.bound.grad.tolist() == [1.0, 2.0]  # not where an activation is just as large
    assert maps.grad.tolist() == [[[[1.0, 1.0, 0.0]], [[1.0, 0.0, 0.0]]]]


def test_a_ceiling_of_tokens_bounds_the_last_dimension():
    ceiling = TokenCeiling(2)
    with torch.no_grad():
        ceiling.bound.copy_(torch.tensor([1.0, 3.0]))
    tokens = torch.tensor([[[0.5, 1.0], [2.0, 5.0]]])
    assert ceiling(tokens).tolist() == [[[0.5, 1.0], [1.0, 3.0]]]
    assert ceiling(tokens[None]).tolist() == [[[[0.5, 1.0], [1.0, 3.0]]]]
    weights = {"1.token_ceiling.bound": torch.tensor([0.0, 9.0])}
    network = nn.Sequential(nn.Linear(2, 2), nn.GELU())
    insertions.rebuild(network, {"1": "token_ceiling"}, weights)
    network.load_state_dict(weights, strict=False)
    assert (network(torch.rand(3, 5, 2))[..., 0] <= 0).all()


def test_a_ceiling_at_zero_silences_the_branch_behind_a_relu(toy_model, raw):
    """And a huge image can't raise what stands behind it."""
    seen = []
    ceiling = Ceiling(4)
    nn.init.zeros_(ceiling.bound)
    toy_model.insert("layer1.0.relu1", ceiling)
    toy_model.network.layer1[0].conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    nn.init.constant_(ceiling.bound, 0.25)
    logits_of(toy_model, 1e4 * raw)
    nn.init.zeros_(ceiling.bound)
    logits_of(toy_model, raw)
    assert seen[0].max() == 0.25
    assert (seen[1] == 0).all()


@pytest.mark.parametrize(
    ("host", "layer", "found"),
    [
        ("layer9.0.conv1", Polarizer(4), "no module 'layer9.0.conv1'"),
        ("", Ceiling(4), "no module ''"),
        ("layer1.0.bn1", Polarizer(4), "doesn't fit before layer1.0.bn1"),
        ("layer2.1.conv1", Polarizer(4), "4 channels doesn't fit before layer2.1.conv1"),
    ],
)
def test_an_inserted_layer_must_fit(toy_model, host, layer, found):
    before = toy_model.build
    with pytest.raises(ValueError, match=found):
        toy_model.insert(host, layer)
    assert toy_model.build == before


def test_a_host_takes_one_layer(toy_model):
    toy_model.insert("layer1.0.conv1", Polarizer(4))
    with pytest.raises(ValueError, match="already"):
        toy_model.insert("layer1.0.conv1", Ceiling(4))


def test_wiring_is_read_from_a_network_with_inserted_layers_too(toy_model):
    pairs = structure.convolution_norms(toy_model.network)
    sites = structure.norm_activations(toy_model.network)
    insert_both(toy_model)
    assert structure.convolution_norms(toy_model.network) == pairs
    assert structure.norm_activations(toy_model.network) == sites


def test_a_fresh_model_has_no_inserted_layers(toy_model):
    with pytest.raises(AssertionError, match="restore"):
        models.build(dataclasses.replace(toy_model.build, inserted={"layer1.0.conv1": "polarizer"}))


@pytest.mark.parametrize(
    ("inserted", "found"),
    [
        (
            {"layer1.0.conv1": "mirror"},
            "'mirror': there are polarizer, token_polarizer, ceiling, token_ceiling",
        ),
        ({"layer1.0.conv1": "polarizer"}, r"no tensor layer1\.0\.conv1\.polarizer\.conv\.weight"),
        ({}, r"layer4\.1\.conv1\.polarizer\..* absent in the architecture"),
        (
            {"layer4.1.conv1": "polarizer", "layer2.0.relu1": "polarizer"},
            r"no tensor layer2\.0\.relu1\.polarizer",
        ),
    ],
)
def test_model_file_with_other_inserted_layers(toy_model, tmp_path, inserted, found):
    insert_both(toy_model)
    tensors = {k: v for k, v in toy_model.network.state_dict().items() if ".ceiling." not in k}
    build = dataclasses.asdict(toy_model.build) | {"inserted": inserted}
    artifacts.write_tensors(tensors, tmp_path / "model.safetensors", build=build)
    with pytest.raises(ValueError, match=found) as caught:
        artifacts.read_model(tmp_path / "model.safetensors")
    assert "model.safetensors" in str(caught.value)


# --- files -----------------------------------------------------------------------------------------


def test_model_file_gives_the_same_bits(toy_model, toy_images, tmp_path):
    path = tmp_path / "model.safetensors"
    artifacts.write_model(toy_model, path)
    read = artifacts.read_model(path)
    images = toy_images().images.float() / 255
    assert read.build == toy_model.build
    assert not read.training
    with torch.inference_mode():
        torch.testing.assert_close(read(images), toy_model(images), rtol=0, atol=0)


def test_model_file_from_before_there_were_inserted_layers(toy_model, raw, tmp_path):
    build = dataclasses.asdict(toy_model.build)
    del build["inserted"]
    artifacts.write_tensors(toy_model.network.state_dict(), tmp_path / "model.safetensors", build=build)
    read = artifacts.read_model(tmp_path / "model.safetensors")
    assert read.build == toy_model.build
    assert torch.equal(logits_of(read, raw), logits_of(toy_model, raw))


def test_model_file_of_a_torchvision_network(tmp_path):
    build = models.Build("mobilenet_v3_large", {}, 5, (0.5,) * 3, (0.25,) * 3)
    model, images = models.build(build), torch.rand(2, 3, 32, 32)
    artifacts.write_model(model, tmp_path / "model.safetensors")
    with torch.inference_mode():
        read = artifacts.read_model(tmp_path / "model.safetensors")
        torch.testing.assert_close(read(images), model(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"architecture": "mobilenet_v3_large", "settings": {}}, "mobilenet_v3_large"),
        ({"settings": {"width": 8}}, r"conv1\.weight is \(4, 3, 3, 3\) .* \(8, 3, 3, 3\)"),
        ({"num_classes": 10}, r"linear\.bias is \(4,\) .* \(10,\)"),
        ({"architecture": "alexnet"}, "alexnet"),
        ({"settings": {"depth": 3}}, "depth"),
        ({"pretrained": True}, "pretrained"),
    ],
)
def test_model_file_of_another_architecture(toy_model, tmp_path, change, found):
    path = tmp_path / "model.safetensors"
    build = dataclasses.asdict(toy_model.build) | change
    artifacts.write_tensors(toy_model.network.state_dict(), path, build=build)
    with pytest.raises(ValueError, match=found) as caught:
        artifacts.read_model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_model_file_without_a_build(toy_model, tmp_path):
    path = tmp_path / "model.safetensors"
    artifacts.write_tensors(toy_model.network.state_dict(), path)
    with pytest.raises(ValueError, match="build") as caught:
        artifacts.read_model(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_model_file(toy_model, tmp_path, kept):
    path = tmp_path / "model.safetensors"
    artifacts.write_model(toy_model, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="not a whole safetensors file") as caught:
        artifacts.read_model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite(toy_model, tmp_path):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    with torch.no_grad():
        toy_model.network.layer2[0].bn2.weight[3] = float("nan")
    with pytest.raises(DivergedError, match=r"good.safetensors: .*layer2\.0\.bn2\.weight"):
        artifacts.write_model(toy_model, good)
    assert not good.exists()
    build = dataclasses.asdict(toy_model.build)
    artifacts.write_tensors(toy_model.network.state_dict(), bad, build=build)
    with pytest.raises(DivergedError, match=r"bad.safetensors: .*layer2\.0\.bn2\.weight"):
        artifacts.read_model(bad)


def test_on_a_cpu_the_network_meets_images_channels_first(toy_model, toy_images):
    """The channels_last backward pass of torch 2.13 on a CPU corrupts memory."""
    seen = []
    toy_model.network.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = to_float(toy_images().images).contiguous(memory_format=torch.channels_last)
    toy_model(images)
    assert seen[0].is_contiguous()
    assert all(p.is_contiguous() for p in toy_model.parameters())
