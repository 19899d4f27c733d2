"""The data flow of networks, their wiring, and the places where methods work."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detrojan import models, registry
from detrojan import rng as streams
from detrojan.errors import NotApplicableError
from detrojan.models._parts import flow, places, structure
from detrojan.models._parts.insertions import Ceiling
from detrojan.models._parts.structure import Unit
from detrojan.models._parts.torchvision import torchvision
from detrojan.study import schema

OURS = ("preactresnet18", "vgg19_bn", "efficientnet_b3", "mobilenet_v3_large")


def black(side):
    return torch.zeros(2, 3, side, side)


def picks(network, side):
    images = black(side)
    return {
        "stages": places.stages(network, images),
        "early": [site.host for site in places.early_activations(network, images)],
        "late": places.late_layer(network, images),
        "head": places.head(network, images).layers,
    }


@functools.cache
def ours(name):
    """Return a network of the project, with whatever values its memory had: none counts here."""
    with torch.device("meta"):
        network = registry.load("models", name, {}).network(10)
    return network if name == "vgg19_bn" else network.to_empty(device="cpu")


# What papers and benchmark have, or what was chosen by hand before there was a rule. Methods that find
# their places must not come to others.
PLACES = {
    "preactresnet18": {
        "stages": ["layer2", "layer3", "layer4"],
        "early": ["layer1.0.relu1", "layer2.0.relu1", "layer3.0.relu1"],
        "late": "layer4.1.conv1",
        "head": ["linear"],
    },
    "vgg19_bn": {
        "stages": ["features.26", "features.39", "features.51"],
        "early": ["features.5", "features.12", "features.25"],
        "late": "features.49",
        "head": ["classifier.0", "classifier.3", "classifier.6"],
    },
    "efficientnet_b3": {
        "stages": ["features.2", "features.3", "features.5"],
        "early": ["features.0.2", "features.2.2.block.1.2", "features.3.2.block.1.2"],
        "late": "features.8.0",
        "head": ["classifier.1"],
    },
    "mobilenet_v3_large": {
        "stages": ["features.3", "features.6", "features.12"],
        "early": ["features.0.2", "features.3.block.1.2", "features.6.block.1.2"],
        "late": "features.16.0",
        "head": ["classifier.0", "classifier.3"],
    },
}


@pytest.mark.parametrize("architecture", OURS)
def test_our_architectures_yield_what_was_named_for_them(architecture):
    network = ours(architecture)
    assert picks(network, 32) == PLACES[architecture]
    # Whatever the size of the images; stages are those with maps of 2×2 or more.
    larger = picks(network, 64)
    assert (larger["late"], larger["head"]) == (PLACES[architecture]["late"], PLACES[architecture]["head"])
    settings = schema.shipped("defenses", "nad").resolve({"architecture": architecture})
    assert larger["stages"] == PLACES[architecture]["stages"] or "layers" in settings


# --- others' networks, small ---------------------------------------------------------------------------


def convnext():
    sizes = [(8, 12, 1), (12, 16, 1), (16, 20, 2), (20, None, 1)]
    blocks = [torchvision.models.convnext.CNBlockConfig(*size) for size in sizes]
    return torchvision.models.ConvNeXt(blocks, num_classes=5)


def swin():
    return torchvision.models.SwinTransformer([4, 4], 8, [2, 2, 2], [2, 2, 2], [4, 4], num_classes=5)


def regnet():
    parameters = torchvision.models.regnet.BlockParams(
        [1, 1, 2, 1], [8, 16, 24, 32], [8] * 4, [1.0] * 4, [2] * 4, 0.25
    )
    return torchvision.models.RegNet(parameters, num_classes=5)


def resnet():
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [2, 1, 1, 1], num_classes=5)


def vit():
    return torchvision.models.VisionTransformer(32, 8, 5, 2, 16, 32, num_classes=5)


NETWORKS = {
    # The ReLUs of a block are one module, so the bound stands behind the norm before it.
    "resnet": (resnet, 32, {
        "stages": ["layer1", "layer2", "layer3"],
        "early": ["relu", "layer2.0.bn1", "layer3.0.bn1"],
        "late": "layer4.0.conv1",
        "head": ["fc"],
    }),
    "regnet": (regnet, 32, {
        "stages": ["trunk_output.block1", "trunk_output.block2", "trunk_output.block3"],
        "early": ["stem.2", "trunk_output.block2.block2-0.f.a.2", "trunk_output.block3.block3-0.f.a.2"],
        "late": "trunk_output.block4.block4-0.f.a.0",
        "head": ["fc"],
    }),
    "mobilenet": (functools.partial(torchvision.models.MobileNetV2, 5, 0.25), 32, {
        "stages": ["features.3", "features.6", "features.13"],
        "early": ["features.0.2", "features.3.conv.1.2", "features.6.conv.1.2"],
        "late": "features.18.0",
        "head": ["classifier.1"],
    }),
    # Without sums: a transition's pooling ends its stage, where it leaves 2×2.
    "densenet": (functools.partial(torchvision.models.DenseNet, 4, (1, 1, 1, 1), 8, num_classes=5), 32, {
        "stages": ["features.transition1", "features.transition2", "features.transition3.conv"],
        "early": ["features.relu0", "features.transition1.relu", "features.transition2.relu"],
        "late": "features.transition3.conv",
        "head": ["classifier"],
    }),
    "googlenet": (functools.partial(torchvision.models.GoogLeNet, 5, False, init_weights=False), 64, {
        "stages": ["maxpool3", "maxpool4", "inception5b"],
        "early": ["conv1", "conv3"],
        "late": "conv3.conv",
        "head": ["fc"],
    }),
    # Its blocks have two branches: only what both join in counts.
    "shufflenet": (functools.partial(torchvision.models.ShuffleNetV2, [1, 1, 1], [4, 8, 12, 16, 24], 5), 64, {
        "stages": ["maxpool", "stage2", "stage3"],
        "early": ["conv1.2"],
        "late": "conv5.0",
        "head": ["fc"],
    }),
    "convnext": (convnext, 32, {
        "stages": ["features.1", "features.3", "features.5"],
        "early": ["features.1.0.block.4", "features.3.0.block.4", "features.5.1.block.4"],
        "late": "features.7.0.block.0",
        "head": ["classifier.2"],
    }),
    "swin": (swin, 32, {
        "stages": ["features.1", "features.3", "features"],
        "early": ["features.1.0.mlp.1", "features.3.1.mlp.1", "features.5.1.mlp.1"],
        "late": "features.5.1.norm1",
        "head": ["head"],
    }),
    # Five blocks: the ends of 2, 4 and 5; the activations of 1, 3 and 4.
    "vit": (vit, 32, {
        "stages": [f"encoder.layers.encoder_layer_{i}" for i in (1, 3)] + ["encoder.layers"],
        "early": [f"encoder.layers.encoder_layer_{i}.mlp.1" for i in (0, 2, 3)],
        "late": "encoder.layers.encoder_layer_4.ln_1",
        "head": ["heads.head"],
    }),
}  # fmt: skip


@functools.cache
def network_of(name):
    with streams.global_stream(streams.stream("init", name)):
        return NETWORKS[name][0]().eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_places_in_networks_of_other_kinds(name):
    _, side, expected = NETWORKS[name]
    assert picks(network_of(name), side) == expected


@pytest.mark.parametrize(
    ("name", "pairs", "unpaired", "hidden", "sites"),
    [
        ("resnet", 14, 0, 0, 6),
        ("regnet", 20, 0, 0, 11),  # and ten convolutions of gates
        ("mobilenet", 52, 0, 0, 35),
        ("densenet", 5, 7, 0, 13),
        ("convnext", 6, 3, 5, 5),
        ("swin", 1, 0, 6, 6),
        ("vit", 0, 1, 5, 5),
    ],
)
def test_wiring_of_networks_of_other_kinds(name, pairs, unpaired, hidden, sites):
    network = network_of(name)
    norms = structure.convolution_norms(network)
    assert sum(norm is not None for norm in norms.values()) == pairs
    assert len(norms) == pairs + unpaired
    assert len(structure.units(network)) - len(norms) == hidden
    assert len(structure.activations(network)) == sites


@pytest.mark.parametrize("name", ["resnet", "densenet", "convnext", "swin", "vit"])
def test_the_head_maps_features_to_logits(name):
    network, head = network_of(name), places.head(network_of(name), black(32))
    seen = []
    first = network.get_submodule(head.layers[0])
    hook = first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        expected = network(torch.rand(3, 3, 32, 32, generator=streams.stream("images")))
        hook.remove()
        assert torch.equal(head.logits(seen[0]), expected)
        assert head.logits(torch.cat([seen[0]] * 5)).shape == (15, 5)
    assert head.channels == first.in_features


class Enlarged(nn.Module):
    """No layer of torch's, and without parameters."""

    def forward(self, images):
        return F.interpolate(images, size=32)


def test_a_head_need_not_be_the_last_child():
    # As others wrap a transformer: the names of all its layers begin with 1.
    network = nn.Sequential(Enlarged(), network_of("vit"))
    assert places.head(network, black(16)).layers == ["1.heads.head"]
    assert places.stages(network, black(16))[0] == "1.encoder.layers.encoder_layer_1"


class TwoHeads(nn.Module):
    """As a distilled DeiT: the mean of the logits of two tokens."""

    def __init__(self):
        super().__init__()
        self.head, self.head_dist = nn.Linear(4, 5), nn.Linear(4, 5)
        self.norm = nn.LayerNorm(4)
        self.embed = nn.Conv2d(3, 4, 16, 16)

    def forward(self, images):
        tokens = self.norm(self.embed(images).flatten(2).transpose(1, 2))
        return (self.head(tokens[:, 0]) + self.head_dist(tokens[:, 1])) / 2


def test_a_network_may_have_two_heads():
    assert places.head(TwoHeads(), black(32)).layers == ["head", "head_dist"]


def test_channels_that_feed_a_head_have_several_positions():
    assert places.head(ours("vgg19_bn"), black(32)).channels == 512  # 25,088 columns


@pytest.mark.parametrize(
    ("name", "layouts"),
    [
        ("resnet", [(1, (8, 8), 0), (1, (4, 4), 0), (1, (2, 2), 0)]),
        ("convnext", [(1, (8, 8), 0), (1, (4, 4), 0), (1, (2, 2), 0)]),
        ("swin", [(3, (8, 8), 0), (3, (4, 4), 0), (3, (2, 2), 0)]),
        ("vit", [(2, (4, 4), 1)] * 3),
    ],
)
def test_outputs_become_maps(name, layouts):
    network, names = network_of(name), NETWORKS[name][2]["stages"]
    found = places.layouts(network, black(32), names)
    assert [found[stage] for stage in names] == layouts
    seen = []
    hook = network.get_submodule(names[0]).register_forward_hook(lambda _, i, output: seen.append(output))
    with torch.inference_mode():
        network(torch.rand(3, 3, 32, 32))
    hook.remove()
    maps, output = found[names[0]].maps(seen[0]), seen[0]
    assert maps.shape == (3, {"resnet": 64}.get(name, 16 if name == "vit" else 8), *layouts[0][1])
    # The last position of the last channel.
    last = output[:, -1, -1, -1] if maps is output or name == "convnext" else output.flatten(1)[:, -1]
    assert torch.equal(maps[:, -1, -1, -1], last)


def test_small_images_have_no_three_stages():
    with pytest.raises(NotApplicableError, match=r"no three stages .* 8×8 pixels, but 2"):
        places.stages(network_of("resnet"), black(8))


# --- what no module shows --------------------------------------------------------------------------------


class Fused(nn.BatchNorm2d):
    """A normalization that activates too."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, maps):
        return self.act(self.drop(super().forward(maps)))


class Functional(nn.Module):
    """Layers in modules, all else in functions; a gate, a fused norm, a ReLU in two places."""

    def __init__(self):
        super().__init__()
        self.conv1, self.fused = nn.Conv2d(3, 4, 3, padding=1), Fused(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.squeeze, self.excite = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
        self.conv3, self.bn3, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.conv4, self.bn4 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.fc1, self.fc2, self.other = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(4, 5)

    def forward(self, images):
        maps = self.fused(self.conv1(images))
        inner = F.silu(self.bn2(self.conv2(maps)))
        inner = inner * torch.sigmoid(self.excite(F.relu(self.squeeze(inner.mean((2, 3), keepdim=True)))))
        maps += inner
        maps = self.relu(self.bn4(self.conv4(self.relu(self.bn3(self.conv3(maps))))))
        flat = maps.mean((2, 3))
        return (self.fc2(F.relu(self.fc1(flat))) + self.other(flat)) / 2


@pytest.fixture
def functional():
    with streams.global_stream(streams.stream("init")):
        return Functional().eval()


def test_wiring_of_functions(functional):
    assert structure.units(functional) == [
        Unit("conv1", "fused", "relu", None),
        Unit("conv2", "bn2", "silu", None),
        Unit("conv3", "bn3", "relu", None),
        Unit("conv4", "bn4", "relu", None),
    ]
    # SiLU as a function has no place where a bound does the same.
    assert structure.norm_activations(functional) == {"fused.act": "fused", "bn3": "bn3", "bn4": "bn4"}
    head = places.head(functional, black(8))
    assert head.layers == ["fc1", "fc2", "other"]
    features = torch.rand(3, 4, generator=streams.stream("features"))
    expected = (functional.fc2(functional.fc1(features).relu()) + functional.other(features)) / 2
    assert torch.equal(head.logits(features), expected)
    assert places.late_layer(functional, black(8)) == "conv4"


def test_a_removed_filter_of_a_fused_norm_puts_out_nothing(functional):
    nn.init.constant_(functional.fused.bias, 0.7)
    (_, norm), *_ = structure.convolution_norms(functional).items()
    for module in (functional.conv1, functional.get_submodule(norm)):
        nn.init.zeros_(module.weight[3])
        nn.init.zeros_(module.bias[3])
    maps = functional.fused(functional.conv1(torch.rand(2, 3, 8, 8)))
    assert (maps[:, 3] == 0).all()
    assert (maps[:, :3] > 0).any()


def test_a_hidden_unit_of_a_transformer_goes_with_its_row_and_its_column():
    with streams.global_stream(streams.stream("init")):
        network = vit().eval()
        nn.init.xavier_uniform_(network.heads.head.weight)
    block = "encoder.layers.encoder_layer_1.mlp"
    unit = structure.units(network)[2]
    assert unit == Unit(f"{block}.0", None, "gelu", f"{block}.3")
    images = torch.rand(2, 3, 32, 32, generator=streams.stream("images"))
    seventh = torch.tensor([7])
    with torch.inference_mode():
        whole = network(images)
        activation = network.get_submodule(f"{block}.1")
        hook = activation.register_forward_hook(lambda _, i, output: output.index_fill(-1, seventh, 0))
        without = network(images)
        hook.remove()
        layer, reader = network.get_submodule(unit.layer), network.get_submodule(unit.reader)
        for tensor in (layer.weight, layer.bias, reader.weight.T):
            tensor[seventh] = 0
        assert torch.equal(network(images), without)
        assert not torch.equal(without, whole)


@pytest.mark.parametrize("host", ["bn3", "bn4"])
def test_a_bound_before_a_shared_activation_bounds_what_it_puts_out(functional, host):
    images, seen = torch.rand(2, 3, 8, 8, generator=streams.stream("images")), []
    call = {"bn3": 0, "bn4": 1}[host]
    model = models.Classifier(functional, models.Build("odd", {}, 5, (0.5,) * 3, (0.25,) * 3))
    (site,) = (site for site in structure.activations(functional) if site.host == host)
    assert (site.feeder, site.channels, site.last) == (host, 4, False)
    functional.relu.register_forward_hook(lambda _, inputs, output: seen.append(output.clone()))
    ceiling = Ceiling(4)
    bound = torch.tensor([0.0, 0.1, 0.4, 9.0])
    with torch.inference_mode():
        model(images)
        model.insert(host, ceiling)
        ceiling.bound.copy_(bound)
        model(images)
    assert torch.equal(seen[2 + call], seen[call].minimum(bound.view(-1, 1, 1)))
    assert not torch.equal(seen[2 + call], seen[call])


class Layered(nn.Module):
    """A layer that two norms read, one in two places with a norm each, a norm with two readers."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.twice, self.bn3, self.bn4 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.relu = nn.ReLU()

    def forward(self, images):
        maps = self.conv(images)
        maps = self.bn1(maps) + self.bn2(maps)
        maps = self.bn4(self.twice(self.bn3(self.twice(maps))))
        return (maps + self.relu(maps)).mean((2, 3))


def test_a_layer_that_does_not_read_alone_is_no_pair():
    assert structure.convolution_norms(Layered()) == {"conv": None, "twice": None}
    assert structure.activations(Layered()) == []


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return 2 * values


class Hidden(nn.Module):
    """A module whose inside torch's functions don't show, and one whose output is no part of the flow."""

    def __init__(self):
        super().__init__()
        scripted = torch.jit.trace(nn.Sequential(nn.ReLU(), nn.ReLU()), torch.rand(1, 3, 4, 4))
        self.conv, self.scripted, self.bn = nn.Conv2d(3, 3, 1), scripted, nn.BatchNorm2d(3)
        self.table, self.fc = nn.Embedding(1, 3), nn.Linear(3, 2)

    def forward(self, images):
        maps = self.bn(Doubled.apply(self.scripted(self.conv(images))))
        flat = maps.mean((2, 3))
        return self.fc(flat + self.table(torch.zeros(1, dtype=torch.long)).expand_as(flat))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript
def test_a_scripted_part_is_one_call():
    read = flow.trace(Hidden(), black(4))
    called = [node.operation for node in read.nodes]
    assert called[:3] == ["image", "conv2d", "module"]
    assert read.nodes[2].outputs == ["scripted"]
    assert read.depends(read.output, read.nodes[1])
    assert not {"embedding", "expand_as"} & set(called)


class Choosy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, images):
        return self.conv(images if images.sum() > 0 else -images).mean((2, 3))


class Strange(nn.Conv2d):
    def forward(self, images):
        return {"logits": super().forward(images)}


def test_a_flow_that_nobody_can_tell_is_refused():
    for read in (structure.units, functools.partial(structure.units, images=black(4))):
        with pytest.raises(NotApplicableError, match="depend on the values of an image: it asks for some"):
            read(Choosy())
    with pytest.raises(NotApplicableError, match="to its output, a dict"):
        structure.units(Strange(3, 2, 1))
    with pytest.raises(NotApplicableError, match="Sequential takes images of none of the sizes 32, 64"):
        structure.units(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)))


# --- reading changes nothing ------------------------------------------------------------------------------


def test_reading_leaves_the_network_as_it_was(toy_model):
    network = toy_model.network.train()
    network.layer1.eval()
    network.layer2.register_forward_hook(lambda *_: None)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    global_state = torch.get_rng_state()
    first, again = picks(network, 32), picks(network, 32)
    with pytest.raises(RuntimeError):
        places.stages(network, torch.zeros(1, 4, 0, 0))
    assert first == again
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), global_state)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    hooks = {
        name: len(module._forward_hooks) + len(module._forward_pre_hooks)
        for name, module in network.named_modules()
    }
    assert {name: number for name, number in hooks.items() if number} == {"layer2": 1}
