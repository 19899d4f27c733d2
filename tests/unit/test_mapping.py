"""Tensors come under our names exactly, or not at all."""

import functools
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from detrojan import models
from detrojan.foreign import mapping
from tests.command import exit_code

WIDTH, NUM_CLASSES = 4, 5
BUILD = models.Build("preactresnet18", {"width": WIDTH}, NUM_CLASSES, (0.0,) * 3, (1.0,) * 3)


@functools.cache
def ours():
    torch.manual_seed(0)
    return models.build(BUILD)


def state():
    return dict(ours().network.state_dict())


def backdoorbench(prefix="module."):
    """Return the weights under BackdoorBench's names: a shortcut's convolution lies in a Sequential."""
    return {f"{prefix}{name.replace('shortcut.', 'shortcut.0.')}": value for name, value in state().items()}


def test_backdoorbench_names_give_the_same_logits():
    theirs = backdoorbench()
    assert "module.layer2.0.shortcut.0.weight" in theirs
    fit = mapping.fit(theirs, "preactresnet18")
    assert (fit.settings, fit.num_classes) == ({"width": WIDTH}, NUM_CLASSES)
    restored = models.restore(BUILD, {name: part.tensor for name, part in fit.parts.items()})
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(restored(images), ours()(images))
    # And back again: every tensor under the name that it came with.
    back = {part.sources[0]: part.tensor for part in fit.parts.values()}
    assert list(back) == list(theirs)
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    assert fit.renamed["module.conv1.weight"] == "conv1.weight"


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "model.", "network.", "1."])
def test_a_prefix_that_all_names_share_is_taken_off(prefix):
    fit = mapping.fit({f"{prefix}{name}": value for name, value in state().items()}, "preactresnet18")
    assert list(fit.parts) == list(state())
    assert bool(fit.renamed) == bool(prefix)


@pytest.mark.parametrize("name", ["vgg19_bn", "efficientnet_b3", "mobilenet_v3_large"])
def test_torchvisions_names_are_ours(name):
    with torch.device("meta"):
        network = models.base.registry.load("models", name).network(7)
    fit = mapping.fit({f"module.{key}": value for key, value in network.state_dict().items()}, name)
    assert (fit.settings, fit.num_classes) == ({}, 7)
    assert list(fit.parts) == list(network.state_dict())


def test_what_differs_is_said():
    theirs = backdoorbench("")
    theirs["linear.weight"] = torch.zeros(NUM_CLASSES, 7)
    theirs["more.weight"] = theirs.pop("bn1.weight", torch.zeros(2))
    del theirs["conv1.weight"]
    with pytest.raises(ValueError, match="preactresnet18: ") as refused:
        mapping.fit(theirs, "preactresnet18")
    said = str(refused.value)
    assert re.search(r"\d+ tensors differ: missing conv1\.weight \[64, 3, 3, 3\]; ", said)
    assert re.search(r"; and \d+ more$", said)
    assert said.count(";") == 10


def test_only_what_differs_is_said():
    theirs = state() | {"more": torch.zeros(2), "linear.bias": torch.zeros(NUM_CLASSES + 1)}
    del theirs["layer1.0.conv1.weight"]
    with pytest.raises(ValueError, match="differ") as refused:
        mapping.fit(theirs, "preactresnet18")
    assert str(refused.value) == (
        "preactresnet18: 3 tensors differ: missing layer1.0.conv1.weight [4, 4, 3, 3]; "
        "linear.bias is [6] and not [5]; unexpected more [2]"
    )


def test_tensors_are_not_paired_by_their_order():
    swapped = state()
    swapped["layer1.0.conv1.weights"] = swapped.pop("layer1.0.conv1.weight")
    with pytest.raises(ValueError, match="2 tensors differ"):
        mapping.fit(swapped, "preactresnet18")


def test_two_names_never_become_one():
    both = backdoorbench("") | {"layer2.0.shortcut.weight": torch.zeros(8, 4, 1, 1)}
    with pytest.raises(ValueError, match="differ"):
        mapping.fit(both, "preactresnet18")


def test_the_shortcuts_normalization_keeps_its_place():
    """ResNet-18 for small images has a convolution and a norm there, in ours as in theirs."""
    theirs = {"shortcut.0.weight": torch.ones(1), "shortcut.1.weight": torch.ones(1)}
    theirs = {f"layer2.0.{name}": value for name, value in theirs.items()}
    assert list(mapping.match(theirs, dict.fromkeys(theirs, (1,)))) == list(theirs)


def test_counters_that_a_file_lacks_are_filled():
    theirs = {name: value for name, value in state().items() if not name.endswith("num_batches_tracked")}
    fit = mapping.fit(theirs, "preactresnet18")
    filled = [part for part in fit.parts.values() if part.operation == mapping.FILLED]
    assert len(filled) == len(state()) - len(theirs) > 0
    assert all(part.tensor.dtype == torch.int64 and part.tensor == 0 for part in filled)


def test_a_pruned_layer_is_its_weight_times_its_mask():
    """As fine-pruning leaves it in BackdoorBench's files."""
    layer = nn.Module()
    layer.linear = nn.Linear(2, 2)
    prune.l1_unstructured(layer.linear, "weight", amount=2)
    pruned = layer.state_dict()
    assert "linear.weight_orig" in pruned
    parts = mapping.match(pruned, {"linear.weight": (2, 2), "linear.bias": (2,)})
    assert torch.equal(parts["linear.weight"].tensor, layer.linear.weight)
    assert parts["linear.weight"].operation == mapping.MASKED
    assert parts["linear.weight"].sources == ("linear.weight_orig", "linear.weight_mask")


def test_weight_normalization_is_to_be_taken_off():
    layer = weight_norm(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="remove_parametrizations"):
        mapping.match(layer.state_dict(), {"weight": (2, 2), "bias": (2,)})
    with pytest.raises(ValueError, match="remove_parametrizations"):
        mapping.match({"weight_g": torch.ones(2, 1), "weight_v": torch.ones(2, 2)}, {"weight": (2, 2)})


def hugging_face_vit(side=4, num_blocks=2):
    """Return the weights of a ViT by Hugging Face's names, all different."""
    block = "vit.encoder.layer.{}"
    matrices = ["attention.attention.query", "attention.attention.key", "attention.attention.value"]
    shapes = {"vit.embeddings.cls_token": (1, 1, side), "vit.embeddings.position_embeddings": (1, 5, side)}
    layers = {"vit.embeddings.patch_embeddings.projection": (side, 3, 2, 2), "classifier": (3, side)}
    layers |= {"vit.layernorm": (side,)}
    for number in range(num_blocks):
        here = block.format(number)
        layers |= {f"{here}.{name}": (side, side) for name in [*matrices, "attention.output.dense"]}
        layers |= {f"{here}.intermediate.dense": (2 * side, side), f"{here}.output.dense": (side, 2 * side)}
        layers |= {f"{here}.layernorm_{when}": (side,) for when in ("before", "after")}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {name: torch.rand(shape) for name, shape in shapes.items()}


def test_a_vit_of_hugging_face_comes_under_timms_names():
    theirs = hugging_face_vit()
    shapes = {"cls_token": (1, 1, 4), "pos_embed": (1, 5, 4)}
    layers = {"patch_embed.proj": (4, 3, 2, 2)}
    for number in range(2):
        here = f"blocks.{number}"
        layers |= {f"{here}.norm1": (4,), f"{here}.attn.qkv": (12, 4), f"{here}.attn.proj": (4, 4)}
        layers |= {f"{here}.norm2": (4,), f"{here}.mlp.fc1": (8, 4), f"{here}.mlp.fc2": (4, 8)}
    layers |= {"norm": (4,), "head": (3, 4)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    parts = mapping.match(theirs, shapes)
    assert list(parts) == list(shapes)
    joined = parts["blocks.1.attn.qkv.weight"]
    assert joined.operation == mapping.JOINED
    three = [f"vit.encoder.layer.1.attention.attention.{name}.weight" for name in ("query", "key", "value")]
    assert joined.sources == tuple(three)
    for rows, name in zip(joined.tensor.split(4), three, strict=True):
        assert torch.equal(rows, theirs[name])
    assert torch.equal(parts["blocks.1.mlp.fc2.bias"].tensor, theirs["vit.encoder.layer.1.output.dense.bias"])
    assert torch.equal(
        parts["blocks.0.attn.proj.weight"].tensor, theirs["vit.encoder.layer.0.attention.output.dense.weight"]
    )
    del theirs[three[1]]
    with pytest.raises(ValueError, match=r"missing blocks\.1\.attn\.qkv\.weight"):
        mapping.match(theirs, shapes)


# --- the command -----------------------------------------------------------------------------------


def test_inspect_says_what_a_file_holds(tmp_path, capsys):
    path = tmp_path / "attack_result.pt"
    torch.save(
        {
            "model_name": "preactresnet18",
            "num_classes": NUM_CLASSES,
            "model": backdoorbench(),
            "img_size": [32, 32, 3],
            "bd_test": {},
        },
        path,
    )
    assert exit_code("inspect", path) == 0
    said = capsys.readouterr().out
    lines = {line[:16].strip(): line[16:] for line in said.splitlines()}
    numbers = sum(value.numel() for value in state().values())
    assert lines["kind"] == "pickled archive of torch"
    assert lines["found under"] == "model"
    assert lines["tensors"].startswith(f"102 of {numbers:,} numbers: 86 float32, 16 int64")
    assert (lines["says network"], lines["says classes"], lines["says size"]) == ("preactresnet18", "5", "32")
    assert "bd_test (dict of 0)" in lines["beside them"]
    assert "torch.FloatStorage" in lines["names"]
    assert lines["fits"] == (
        "preactresnet18 (5 classes, width 4); 102 names change, as module.conv1.weight to conv1.weight"
    )


def test_inspect_says_why_a_file_fits_nothing(tmp_path, capsys):
    torch.save({"net": {"a.weight": torch.ones(2)}, "model": {"a.weight": torch.ones(2)}}, tmp_path / "x.pt")
    assert exit_code("inspect", tmp_path / "x.pt") == 1
    assert capsys.readouterr().err == (
        f"detrojan: {tmp_path / 'x.pt'}: it has state dicts under net, model: choose one with --key\n"
    )
    assert exit_code("inspect", tmp_path / "x.pt", "--key", "net") == 0
    said = capsys.readouterr().out
    assert "no architecture of ours" in said
    assert "preactresnet18 87 tensors differ: missing" in " ".join(said.split())
