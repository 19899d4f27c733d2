"""The two protocols of the methods that prune or bound channels: their sources, and where they agree."""

import dataclasses

import pytest
import torch

from detrojan import registry, rng
from detrojan.study import protocols
from detrojan.study.schema import shipped_file

METHODS = ("anp", "awn", "bnp", "clp", "fp", "mm_bd", "rnp")
DECLARED = ("survey", "paper")
ARCHITECTURES = ("preactresnet18", "vgg19_bn", "efficientnet_b3", "mobilenet_v3_large")


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_has_a_source_in_both_protocols(name):
    fields = registry.declared("defenses", name).settings.model_fields
    declared = shipped_file("defenses", name).protocols
    assert tuple(declared) == DECLARED
    for protocol in DECLARED:
        sources = declared[protocol].sources
        assert set(sources) == set(fields)
        for setting, source in sources.items():
            whose, _, where = source.partition(": ")
            assert whose in ("survey", "paper", "ours"), (protocol, setting)
            assert where, (protocol, setting)
    # The class is the survey's.
    assert not declared["survey"].set
    assert "paper" not in {source.partition(":")[0] for source in declared["survey"].sources.values()}


@pytest.mark.parametrize("name", METHODS)
def test_settings_go_by_what_data_are_never_by_their_name(name):
    file = shipped_file("defenses", name)
    overrides = [*file.overrides, *(o for p in file.protocols.values() for o in p.overrides)]
    assert not [o for o in overrides if "dataset" in o.when.conditions]


@pytest.mark.parametrize("protocol", DECLARED)
@pytest.mark.parametrize("num_classes", [10, 43, 200])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", METHODS)
def test_settings_are_allowed_everywhere(name, architecture, num_classes, protocol):
    facts = {"architecture": architecture, "num_classes": num_classes, "image_size": 32}
    registry.load("defenses", name, protocols.settings(name, protocol, facts))


@pytest.mark.parametrize(("num_classes", "u"), [(10, (3, 3)), (43, (3, 3)), (200, (3, 5))])
def test_clp_s_margins(num_classes, u):
    found = tuple(protocols.settings("clp", p, {"num_classes": num_classes})["u"] for p in DECLARED)
    assert found == u


@pytest.mark.parametrize("name", ["clp", "bnp"])
def test_where_both_protocols_say_the_same_so_do_the_weights(name, backdoored):
    def repaired(protocol):
        settings = protocols.settings(name, protocol, {"num_classes": 10})
        sample = dataclasses.replace(backdoored.sample, chosen={})
        defense = registry.load("defenses", name, settings)
        return defense(backdoored.model, sample, rng=rng.stream("test")).state_dict(), sample.chosen

    (survey, chosen), (paper, chosen_again) = map(repaired, DECLARED)
    assert chosen == chosen_again
    assert chosen["num_pruned"] > 0
    # BNP's zero other tensors of the same channels.
    for key, value in survey.items():
        equal = name == "clp" or not key.endswith(".bias")
        assert not equal or torch.equal(value, paper[key]), key
