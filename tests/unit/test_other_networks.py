"""Methods that find their places, on networks of other kinds than ours: each runs there, or says why not."""

import copy
import dataclasses

import pytest
import torch

from detrojan import models, registry, rng
from detrojan.defenses._parts.channels import Channels
from detrojan.defenses.clean_data import npd
from detrojan.errors import NotApplicableError
from detrojan.images import DefenderSample, TriggeredSample, to_float
from detrojan.learning import inference
from detrojan.study import protocols
from tests.unit.test_places import NETWORKS, network_of

FAMILIES = ("resnet", "convnext", "swin", "vit")


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    build = models.Build(family, {}, 5, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
    return models.Classifier(copy.deepcopy(network_of(family)), build).eval()


@pytest.fixture
def sample(toy_images):
    images = toy_images(num_classes=5, side=32, count=10)
    return DefenderSample(images[torch.arange(5)], images[torch.arange(5, 10)])


def defend(name, model, sample, protocol="survey", **settings):
    """Return what a method makes of ``model`` as a study would run it, but quick, and what it chose."""
    facts = {"architecture": model.build.architecture, "num_classes": 5, "image_size": 32}
    method = type(registry.load("defenses", name))
    settings = protocols.settings(name, protocol, facts) | method.smoke | settings
    given = dataclasses.replace(sample, chosen={})
    repaired = registry.load("defenses", name, settings)(model, given, rng=rng.stream("test"))
    assert inference.logits(repaired, sample.everything).isfinite().all()
    return repaired, given.chosen


def test_fp_prunes_what_feeds_the_head(family, model, sample):
    linear = model.network.get_submodule(NETWORKS[family][2]["head"][0])
    repaired, chosen = defend("fp", model, sample, tolerance=0.99, judge_on="all", epochs=1)
    assert chosen["num_channels"] == linear.in_features
    pruned = (repaired.network.get_submodule(NETWORKS[family][2]["head"][0]).weight == 0).all(0)
    assert int(pruned.sum()) == chosen["num_pruned"]


def test_nad_compares_the_ends_of_stages(family, model, sample):
    distilled, chosen = defend("nad", model, sample)
    assert chosen["layers"] == NETWORKS[family][2]["stages"]
    # With no weight on the attentions it is fine-tuning, and comes to another network.
    tuned, _ = defend("nad", model, sample, beta1=0, beta2=0, beta3=0)
    assert not torch.equal(*(inference.logits(some, sample.train) for some in (distilled, tuned)))


def test_fst_draws_the_head_anew(family, model, sample):
    _, chosen = defend("fst", model, sample)
    assert chosen["layers"] == NETWORKS[family][2]["head"]


def test_npd_stands_before_a_late_convolution(family, model, sample):
    late = NETWORKS[family][2]["late"]
    repaired, chosen = defend("npd", model, sample)
    tokens = family in ("swin", "vit")  # their only convolutions are early ones
    assert repaired.build.inserted == {late: "token_polarizer" if tokens else "polarizer"}
    assert chosen == {"host": late} | ({"adapted": True} if tokens else {})


def test_npd_starts_on_tokens_as_the_network_came(model, sample, family):
    if family not in ("swin", "vit"):
        pytest.skip("has maps there")
    host, before = NETWORKS[family][2]["late"], inference.logits(model, sample.train)
    repaired = copy.deepcopy(model)
    polarizer = npd.insert(repaired, host, sample.everything, "identity")
    torch.testing.assert_close(inference.logits(repaired, sample.train), before, rtol=1e-3, atol=1e-4)
    seen = []
    hook = model.network.get_submodule(host).register_forward_pre_hook(lambda _, i: seen.append(i[0]))
    inference.logits(model, sample.everything)
    hook.remove()
    tokens = seen[0].flatten(0, -2)
    torch.testing.assert_close(polarizer.bn.running_mean, tokens.mean(0), rtol=1e-4, atol=1e-5)
    spread = tokens.var(0, correction=0)
    torch.testing.assert_close(polarizer.bn.running_var, spread.clamp(min=spread.mean()), rtol=1e-3, atol=0)


def test_npd_does_not_stand_before_maps_that_are_channels_first(sample):
    build = models.Build("convnext", {}, 5, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
    model = models.Classifier(copy.deepcopy(network_of("convnext")), build).eval()
    with pytest.raises(NotApplicableError, match=r"channels come first at features\.0\.1"):
        defend("npd", model, sample, host="features.0.1")


def test_what_no_paper_has_is_noted(family, model, sample):
    quick = {"only_right": False, "min_steps": 0, "start": 0}
    tokens = family in ("swin", "vit")
    chosen = {
        "nad": defend("nad", model, sample)[1],
        "mm_bd": defend("mm_bd", model, sample, **quick)[1],
        "fst": defend("fst", model, sample)[1],
    }
    found = {name: notes.get("adapted", False) for name, notes in chosen.items()}
    # Of Swin the maps that NAD compares are maps, of other sizes at each stage.
    assert found == {"nad": family == "vit", "mm_bd": tokens or family == "convnext", "fst": False}
    unit = defend("fp", model, sample, tolerance=0.99, judge_on="all", epochs=1)[1].get("unit")
    assert unit == (None if family == "resnet" else "feature")


def test_gates_of_one_change_no_bit(model, sample):
    channels, images = Channels(model), to_float(sample.train.images)
    with torch.inference_mode():
        gated = channels.logits(model, images, torch.ones(len(channels)), torch.ones(len(channels)))
        assert torch.equal(gated, model(images))


def test_a_channel_of_layer_normalization_is_a_column_of_what_reads_it():
    build = models.Build("vit", {}, 5, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
    model = models.Classifier(copy.deepcopy(network_of("vit")), build).eval()
    torch.nn.init.normal_(model.network.heads.head.weight, generator=rng.stream("head"))
    pruned, unread = copy.deepcopy(model), copy.deepcopy(model)
    channels = Channels(pruned)
    chosen = torch.zeros(len(channels), dtype=torch.bool)
    chosen[-16 + 5] = True  # the last normalization is the one before the head
    channels.prune(chosen, shift=True)
    assert channels.named(chosen) == ["encoder.ln:5"]
    with torch.no_grad():
        unread.network.heads.head.weight[:, 5] = 0
    images = torch.rand(3, 3, 32, 32, generator=rng.stream("images"))
    with torch.inference_mode():
        assert torch.equal(pruned(images), unread(images))
        assert not torch.equal(pruned(images), model(images))


def test_nad_refuses_maps_of_tokens_that_are_all_alike(toy_images):
    build = models.Build("vit", {}, 5, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
    model = models.Classifier(copy.deepcopy(network_of("vit")), build).eval()
    with torch.no_grad():
        model.network.encoder.pos_embedding.zero_()
    images = toy_images(num_classes=5, side=32, count=10)
    images = dataclasses.replace(images, images=images.images * 0 + 90)
    alike = DefenderSample(images[torch.arange(5)], images[torch.arange(5, 10)])
    with pytest.raises(NotApplicableError):
        defend("nad", model, alike)


@pytest.mark.parametrize("protocol", ["survey", "paper"])
def test_mm_bd_bounds_activations(family, model, sample, protocol):
    # Of a network without training none may be right at first, and the first bounds are to act.
    repaired, chosen = defend("mm_bd", model, sample, protocol, only_right=False, min_steps=0, start=0)
    early = NETWORKS[family][2]["early"]
    assert chosen["sites"] == list(repaired.build.inserted)
    assert (chosen["sites"] == early) == (protocol == "paper")
    assert set(early) <= set(chosen["sites"])
    kinds = {"resnet": "ceiling"}
    assert set(repaired.build.inserted.values()) == {kinds.get(family, "token_ceiling")}
    sizes = [len(bound) for name, bound in repaired.named_parameters() if name.endswith(".bound")]
    assert len(sizes) == len(chosen["sites"])
    # At first they change nothing, and then they fall.
    assert all(m < i for m, i in zip(chosen["mean_bounds"], chosen["initial_bounds"], strict=True) if i > 0)


def test_ibau_differentiates_attention_twice(model, sample):
    repaired, _ = defend("ibau", model, sample, min_steps=0)
    assert not torch.equal(*(inference.logits(some, sample.train) for some in (model, repaired)))


# What is not asked above. Bounds and statistics are those of batch normalization, which layer
# normalization has not; the authors' code prunes convolutions, so of a transformer nothing.
LACKING = {("bnp", "survey"), ("clp", "survey"), ("grad_prune", "paper")}


@pytest.mark.parametrize(
    ("name", "protocol"),
    [(name, "survey") for name in ("ft", "ft_sam", "pbe", "sau", "nc", "bnp", "clp", "grad_prune")]
    + [("grad_prune", "paper"), ("grad_prune_inverted", "survey")],
)
def test_a_transformer_is_repaired_or_the_reason_is_said(name, protocol, sample):
    build = models.Build("vit", {}, 5, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
    model = models.Classifier(copy.deepcopy(network_of("vit")), build).eval()
    given = dataclasses.replace(sample, triggered=TriggeredSample(sample.train, sample.validation))
    before = copy.deepcopy(model.state_dict())
    if (name, protocol) in LACKING:
        with pytest.raises(NotApplicableError):
            defend(name, model, given, protocol)
    else:
        _, chosen = defend(name, model, given, protocol)
        assert chosen.get("adapted", False) == name.startswith("grad_prune")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["anp", "awn", "rnp"])
def test_those_that_prune_norms_say_which(family, model, sample, name):
    quick = {"iterations": 1} if name == "anp" else {}
    _, chosen = defend(name, model, sample, **quick)
    assert chosen["norms"] == ("batch" if family == "resnet" else "layer")
    # The benchmark's ANP has layer normalization; of the others nobody's code has.
    assert chosen.get("adapted", False) == (family != "resnet" and name != "anp")
