"""Architectures, the classifier around them, their wiring, and their files."""

import ast
import copy
import dataclasses

import pydantic
import pytest
import torch
from torch import nn

from detrojan import artifacts, models, registry, structure
from detrojan.data import to_float
from detrojan.errors import DivergedError
from detrojan.models.preactresnet18 import PreActBlock
from detrojan.registry import PACKAGE

ARCHITECTURES = ("preactresnet18", "vgg19_bn", "efficientnet_b3", "mobilenet_v3_large")
# Of 10, 43 and 200 classes (CIFAR-10, GTSRB, Tiny-ImageNet).
PARAMETERS = {
    "preactresnet18": (11_171_146, 11_188_075, 11_268_616),
    "vgg19_bn": (139_622_218, 139_757_419, 140_400_648),
    "efficientnet_b3": (10_711_602, 10_762_323, 11_003_632),
    "mobilenet_v3_large": (4_214_842, 4_257_115, 4_458_232),
}


def on_meta(architecture, num_classes=10, **settings):
    """Return a network without memory or values, which even VGG is quickly."""
    with torch.device("meta"):
        return registry.load("models", architecture, settings).network(num_classes)


def test_registry_finds_the_architectures():
    assert set(registry.names("models")) == set(ARCHITECTURES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameter_counts(architecture):
    counts = [sum(p.numel() for p in on_meta(architecture, k).parameters()) for k in (10, 43, 200)]
    assert tuple(counts) == PARAMETERS[architecture]


def test_preactresnet18_has_102_state_dict_entries():
    assert len(on_meta("preactresnet18").state_dict()) == 102


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward(architecture):
    classifier = models.build(models.Build(architecture, {}, 7, (0.5,) * 3, (0.25,) * 3))
    assert not classifier.training
    features = []
    classifier.head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    for side in (32, 64):
        with torch.inference_mode():
            logits = classifier(torch.rand(2, 3, side, side))
        assert logits.shape == (2, 7)
        assert logits.isfinite().all()
    assert [f.ndim for f in features] == [2, 2]  # the head reads flat features


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_last_child_is_the_head_and_copies_are_separate(architecture):
    network = on_meta(architecture, 43)
    head = list(network.children())[-1]
    linear = [m for m in head.modules() if isinstance(m, nn.Linear)][-1]
    assert linear.out_features == 43
    assert linear is [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
    copied = copy.deepcopy(network)
    assert copied.state_dict().keys() == network.state_dict().keys()
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in network.parameters()}


def test_torchvision_is_imported_in_one_place():
    importers = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "torchvision" for name in names):
                importers.add(file.name)
    assert importers == {"vision.py"}


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
    assert toy_model.head is network.linear
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
