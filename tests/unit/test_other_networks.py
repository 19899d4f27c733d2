"""Methods that find their places, on networks of other kinds than ours: each runs there, or says why not."""

import copy
import dataclasses

import pytest
import torch

from detrojan import models, registry, rng
from detrojan.errors import NotApplicableError
from detrojan.images import DefenderSample
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
    if family in ("swin", "vit"):  # their only convolutions are early ones
        with pytest.raises(NotApplicableError, match=f"'{late}', but {family} has a LayerNorm there"):
            defend("npd", model, sample)
    else:
        repaired, chosen = defend("npd", model, sample)
        assert repaired.build.inserted == {late: "polarizer"}
        assert chosen["host"] == late


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


@pytest.mark.parametrize("name", ["anp", "awn", "rnp"])
def test_those_that_prune_norms_say_which(family, model, sample, name):
    quick = {"iterations": 1} if name == "anp" else {}
    _, chosen = defend(name, model, sample, **quick)
    assert chosen["norms"] == ("batch" if family == "resnet" else "layer")
