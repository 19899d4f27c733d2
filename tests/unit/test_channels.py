"""The channels of normalizations, gated and pruned."""

import pytest
import torch
from torch import nn

from detrojan import models, registry
from detrojan import rng as streams
from detrojan.defenses._parts.channels import Channels
from detrojan.errors import NotApplicableError
from detrojan.images import DefenderSample
from detrojan.models._parts.torchvision import torchvision

ARCHITECTURES = ("preactresnet18", "vgg19_bn", "efficientnet_b3", "mobilenet_v3_large")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_channels_of_our_architectures_are_those_of_batch_normalizations(architecture):
    with torch.device("meta"):
        network = registry.load("models", architecture, {}).network(10)
    channels = Channels(network)
    expected = {n: m for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert channels.kind == "batch"
    assert channels.names == list(expected)
    assert channels.norms == list(expected.values())
    assert channels.sizes == [norm.num_features for norm in expected.values()]


def test_channels_of_a_transformer_are_those_of_layer_normalizations():
    with streams.global_stream(streams.stream("init")):
        network = torchvision.models.VisionTransformer(32, 8, 5, 2, 16, 32, num_classes=5).eval()
        nn.init.xavier_uniform_(network.heads.head.weight)
    images = torch.rand(2, 3, 32, 32, generator=streams.stream("images"))
    channels = Channels(network)
    assert channels.kind == "layer"
    assert len(channels) == 11 * 16  # two norms of each of five blocks, and one behind them
    ones = torch.ones(len(channels))
    for norm in channels.norms:
        nn.init.normal_(norm.bias, generator=streams.stream("shifts"))
    with torch.inference_mode():
        logits = network(images)
        assert torch.equal(channels.logits(network, images, ones, ones), logits)
        gone = torch.zeros(len(channels), dtype=torch.bool)
        gone[3] = True
        gated = channels.logits(network, images, (~gone).float(), (~gone).float())
        assert not torch.equal(gated, logits)
        channels.prune(gone, shift=True)
        torch.testing.assert_close(network(images), gated, rtol=0, atol=0)
        # As with the column of what reads this channel at zero.
        network.encoder.layers[0].ln_1.weight[3] = network.encoder.layers[0].ln_1.bias[3] = 1
        network.encoder.layers[0].self_attention.in_proj_weight[:, 3] = 0
        torch.testing.assert_close(network(images), gated)
    assert channels.named(gone) == ["encoder.layers.encoder_layer_0.ln_1:3"]
    with pytest.raises(NotApplicableError, match="works on batch normalization; this model has none"):
        Channels(network, statistics=True)


@pytest.mark.parametrize(("method", "works"), [("anp", True), ("awn", True), ("rnp", True), ("bnp", False)])
def test_methods_on_a_transformer_work_on_its_layer_normalizations(toy_images, method, works):
    with streams.global_stream(streams.stream("init")):
        network = torchvision.models.VisionTransformer(8, 4, 2, 2, 8, 16, num_classes=4)
        nn.init.xavier_uniform_(network.heads.head.weight)
    model = models.Classifier(network, models.Build("odd", {}, 4, (0.5,) * 3, (0.25,) * 3)).eval()
    defense, sample = (
        registry.load("defenses", method, smoke=True),
        DefenderSample(toy_images(), toy_images()),
    )
    if not works:  # there are no running statistics
        with pytest.raises(NotApplicableError, match="this model has none"):
            defense(model, sample, rng=streams.stream("test"))
        return
    before = {name: value.clone() for name, value in network.state_dict().items()}
    repaired = defense(model, sample, rng=streams.stream("test")).network
    changed = {name for name, value in repaired.state_dict().items() if not torch.equal(value, before[name])}
    assert changed or method != "awn"  # the others found nothing to prune here
    assert all("ln" in name for name in changed)
