"""Networks of others: how studies name them, what is known before the first job, what is made."""

import copy
import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import save_file

from detrojan import models, registry
from detrojan import rng as streams
from detrojan.models._parts import facts, places, pretrained
from detrojan.models._parts.named import NamedNetwork
from detrojan.storage import artifacts
from detrojan.study import files, networks
from detrojan.study.json_schema import json_schema
from detrojan.workflow import graph
from tests.unit.test_schema import minimal, mistakes

MINE = '''
"""A network of my own."""

from pydantic import Field
from torch import nn

from detrojan.models.base import Architecture


class Mine(Architecture):
    """Settings of it."""

    width: int = Field(4, ge=1, description="channels")

    def network(self, num_classes: int) -> nn.Module:
        """Return a fresh one."""
        maps = [nn.Conv2d(3, self.width, 3, 2), nn.BatchNorm2d(self.width), nn.ReLU()]
        return nn.Sequential(*maps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(self.width, num_classes))
'''
RESNET = "torchvision:resnet18"
VIT = str(Path(__file__).parents[1] / "networks" / "tiny_vit.py")


def naming(*architectures, **entries):
    return minimal(architectures=[*architectures, *entries]) | {"architectures": entries}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The working folder of a study with a network of one's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "networks").mkdir()
    path = tmp_path / "networks" / "mine.py"
    path.write_text(MINE)
    return "networks/mine.py"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """What is read of files is kept by path, and each test has its own files."""
    for kept in (registry._tree, registry._declared, registry.declared, registry._imported_file):
        kept.cache_clear()


# --- naming ----------------------------------------------------------------------------------------


def test_an_entry_is_an_architecture_with_all_settings():
    study = files.load_study(naming(rn={"network": "torchvision:resnet18", "resize": 64}))
    assert study.method("models", "rn", {"architecture": "rn"}) == {
        "network": "torchvision:resnet18",
        "options": {},
        "resize": 64,
        "pretrained": None,
        "mean": None,
        "std": None,
    }
    assert study.networks == ["torchvision:resnet18"]
    assert [study.network(name) for name in ("rn", "preactresnet18")] == ["torchvision:resnet18", ""]


def test_the_short_form_is_an_entry_of_the_last_part_of_the_name(mine):
    raw = minimal(architectures=["torchvision:resnet18", mine, "preactresnet18"])
    before = copy.deepcopy(raw)
    study = files.load_study(raw)
    assert study.grid.architectures == ["resnet18", "mine", "preactresnet18"]
    assert study.networks == ["torchvision:resnet18", mine]
    assert raw == before
    assert networks.expanded(networks.expanded(raw)) == networks.expanded(raw)
    assert networks.short_name("timm:vit_tiny_patch16_224.augreg") == "vit_tiny_patch16_224_augreg"


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        (
            {"rn": {"network": "hf-hub:someone/resnet"}},
            "rn.network: 'hf-hub:someone/resnet' is no",
        ),
        ({"rn": {"network": "timm:hf-hub:someone/it"}}, "nothing is read from a hub or a folder"),
        ({"rn": {"network": "timm:local-dir:weights"}}, "nothing is read from a hub or a folder"),
        ({"rn": {"network": "resnet18"}}, "'resnet18' is no network: write torchvision:NAME"),
        ({"rn": {"network": "elsewhere.py"}}, "elsewhere.py can't be read"),
        ({"RN": {"network": "torchvision:resnet18"}}, "architectures.RN: the name becomes part of paths"),
        ({"vgg19_bn": {"network": "torchvision:vgg19"}}, "vgg19_bn is an architecture of vgg19_bn.py"),
        (
            {"rn": {"network": "torchvision:resnet18", "options": {"weights": "DEFAULT"}}},
            "rn.options.weights: no",
        ),
        ({"rn": {"network": "torchvision:resnet18", "sise": 3}}, "architectures.rn.sise: unknown key"),
        ({"rn": {"network": "torchvision:resnet18", "resize": 8}}, "architectures.rn.resize: should be"),
        ({"rn": {"network": "torchvision:resnet18", "mean": [0, 0, 0]}}, "rn: give both mean and std"),
        (
            {"rn": {"network": "torchvision:resnet18", "mean": [0, 0, 0], "std": [1, 1, 0]}},
            "rn.std: should be greater than 0",
        ),
        (
            {"rn": {"network": "torchvision:resnet18", "pretrained": "no.safetensors"}},
            "weights are never downloaded",
        ),
    ],
)
def test_what_is_wrong_with_a_network_is_said_before_the_first_job(entries, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert any(found in line for line in mistakes(naming(**entries))), mistakes(naming(**entries))


def test_a_short_form_whose_name_is_taken_is_unknown():
    found = mistakes(minimal(architectures=["torchvision:vgg19_bn"]))
    assert found == ["grid.architectures[0]: unknown name 'torchvision:vgg19_bn'; did you mean 'vgg19_bn'?"]


def test_timm_is_asked_for_in_one_line_where_it_lacks(monkeypatch):
    monkeypatch.setattr(networks.importlib.util, "find_spec", lambda name: None)
    found = mistakes(minimal(architectures=["timm:resnet18"]))
    assert found == ["architectures.resnet18.network: timm is not installed: pip install 'detrojan[timm]'"]


def test_a_file_must_have_one_architecture(mine, tmp_path):
    for text, found in (
        ("import torch", "one subclass of Architecture, not none"),
        (MINE + MINE.replace("class Mine", "class Other"), "not Mine, Other"),
        ("class (", "can't be read"),
    ):
        for kept in (registry._tree, registry._declared, registry.declared):
            kept.cache_clear()
        (tmp_path / mine).write_text(text)
        assert any(found in line for line in mistakes(naming(mine={"network": mine})))


def test_options_of_a_file_are_its_fields(mine):
    assert files.load_study(naming(mine={"network": mine, "options": {"width": 8}}))
    found = mistakes(naming(mine={"network": mine, "options": {"wide": 8}}))
    assert found == [
        "architectures.mine.options.wide: no option that can be set: the file's class has width",
    ]


def test_overrides_and_filters_know_an_entry():
    raw = naming("preactresnet18", rn={"network": "torchvision:resnet18"})
    raw["grid"]["exclude"] = [{"architecture": "rn", "seed": 3}]
    raw["training"] = {"overrides": [{"when": {"architecture": "rn"}, "set": {"lr": 0.1}}]}
    assert files.load_study(raw).optimization({"architecture": "rn"})["lr"] == 0.1
    raw["grid"]["exclude"] = [{"architecture": "rm"}]
    assert mistakes(raw) == ["grid.exclude[0].architecture: unknown name 'rm'; did you mean 'rn'?"]


@pytest.mark.parametrize(
    ("settings", "side", "found"),
    [
        ({"network": "torchvision:vit_b_16"}, 32, "takes 224 pixels and no other size: set resize: 224"),
        ({"network": "torchvision:vit_b_16", "resize": 224}, 32, None),
        ({"network": "torchvision:vit_b_16", "options": {"image_size": 64}}, 64, None),
        ({"network": "torchvision:vit_b_16", "options": {"image_size": 64}}, 32, "takes 64 pixels"),
        ({"network": "torchvision:convnext_tiny"}, 16, "takes 32 or more: raise it or resize"),
        ({"network": "torchvision:convnext_tiny"}, 32, None),
        ({"network": "torchvision:unheard_of"}, 16, None),
    ],
)
def test_a_side_that_a_network_does_not_take_is_known(settings, side, found):
    said = networks.wrong_side(settings["network"], settings, side)
    assert (said is None) if found is None else found in said


def test_unheard_of_names_are_accepted():
    assert files.load_study(minimal(architectures=["torchvision:unheard_of"]))
    assert [networks.unknown(name) for name in ("torchvision:unheard_of", "torchvision:resnet18")] == [
        True,
        False,
    ]


def test_editors_take_entries_and_short_forms_but_no_typos(mine):
    validator = jsonschema.Draft202012Validator(json_schema())
    right = [
        naming(
            "preactresnet18", rn={"network": "torchvision:resnet18", "options": {"zero_init_residual": True}}
        ),
        minimal(architectures=["torchvision:resnet18", mine]),
    ]
    assert [list(validator.iter_errors(study)) for study in right] == [[], []]
    wrong = [
        (minimal(architectures=["resnet"]), "$.grid.architectures[0]"),
        (naming(rn={"network": "torchvision:resnet18", "sise": 3}), "$.architectures.rn"),
        (naming(rn={"resize": 32}), "$.architectures.rn"),
    ]
    assert [[error.json_path for error in validator.iter_errors(study)] for study, _ in wrong] == [
        [place] for _, place in wrong
    ]


# --- the code of a job -----------------------------------------------------------------------------


def test_the_code_of_training_covers_a_file_of_ones_own(mine, tmp_path):
    study = files.load_study(naming("preactresnet18", mine={"network": mine}))
    axes = {"dataset": "digits", "architecture": "mine", "attack": "none", "ratio": 0.0, "seed": 0}
    named = graph.methods_of(study, axes)
    before = graph.code_digest("train", named)
    assert graph.code_key("train", named) == "train/networks/mine.py"
    ours = graph.code_digest("train", {"architecture": "preactresnet18"})
    for change, same in (("# a note\n", True), ("EXTRA = 1\n", False)):
        (tmp_path / mine).write_text(MINE + change)
        for kept in (graph.provenance.code_digest, graph.provenance._module):
            kept.cache_clear()
        assert (graph.code_digest("train", named) == before) == same
    assert graph.code_digest("train", {"architecture": "preactresnet18"}) == ours


def test_networks_of_a_library_share_one_code():
    keys = [{"architecture": "a", "network": f"torchvision:{name}"} for name in ("resnet18", "vgg11")]
    assert len({graph.code_digest("train", named) for named in keys}) == 1


# --- what is made ----------------------------------------------------------------------------------


def classifier(settings, num_classes=5, mean=(0.5,) * 3, std=(0.25,) * 3):
    with streams.global_stream(streams.stream("init")):
        return models.build(models.Build("mine", settings, num_classes, mean, std))


def test_a_network_survives_a_file_with_its_librarys_names(tmp_path):
    model = classifier({"network": VIT, "options": {"dropout": 0.1}})
    assert model.build.settings["options"]["dropout"] == 0.1
    assert "encoder.pos_embedding" in model.network.state_dict()
    path, images = tmp_path / "model.safetensors", torch.rand(2, 3, 32, 32)
    artifacts.write_model(model, path)
    state = torch.get_rng_state()
    restored = artifacts.read_model(path)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.inference_mode():
        assert torch.equal(restored(images), model(images))


def test_a_network_of_ones_own_is_built_with_its_options(mine):
    model = classifier({"network": mine, "options": {"width": 6}})
    assert model.network[0].out_channels == 6
    with pytest.raises(ValueError, match="width"):
        classifier({"network": mine, "options": {"width": 0}})


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"network": "torchvision:unheard_of"}, "unheard_of"),
        ({"network": "torchvision:resnet18", "options": {"depth": 3}}, "depth"),
    ],
)
def test_what_a_library_refuses_is_bad_input(settings, found):
    with pytest.raises(ValueError, match=rf"{settings['network']} can't be made .*{found}"):
        classifier(settings)


def test_images_are_enlarged_inside_and_gradients_pass(tmp_path):
    plain = classifier({"network": VIT})
    enlarging = classifier({"network": VIT, "resize": 32})
    enlarging.network.load_state_dict(plain.network.state_dict())
    small = torch.rand(2, 3, 16, 16, generator=streams.stream("images"), requires_grad=True)
    large = torch.nn.functional.interpolate(small, size=(32, 32), mode="bilinear")
    logits = enlarging(small)
    torch.testing.assert_close(logits, plain(large), rtol=1e-5, atol=1e-6)  # normalized before, not after
    logits.sum().backward()
    assert small.grad.abs().sum() > 0
    # Methods read the data flow at the data set's side; the hook is copied and kept in a file's settings.
    assert places.head(enlarging.network, small).layers == ["heads.head"]
    assert places.layouts(enlarging.network, small, ["encoder"])["encoder"].size == (4, 4)
    artifacts.write_model(enlarging, tmp_path / "model.safetensors")
    for other in (copy.deepcopy(enlarging), artifacts.read_model(tmp_path / "model.safetensors")):
        with torch.inference_mode():
            assert torch.equal(other(small), enlarging(small))


class Tuples(torch.nn.Module):
    """As torchvision's Inception: logits twice while it is trained."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 5)

    def forward(self, images):
        logits = self.linear(images.mean((2, 3)))
        return (logits, logits) if self.training else logits


@pytest.mark.parametrize(
    ("network", "side", "found"),
    [
        (Tuples(), 32, "in training mode it puts out tuple: set its options, such as aux_logits: false"),
        (torch.nn.Sequential(torch.nn.Conv2d(3, 5, 32)), 32, "in eval mode it puts out"),
        (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 5)), 32, "does not take images of 32×32"),
        (
            torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16**2, 4)),
            16,
            "puts out 4 logits, not 5",
        ),
    ],
)
def test_what_puts_out_no_logits_is_found_before_training(network, side, found):
    with pytest.raises(ValueError, match=found):
        facts.check(network, side, 5)


# --- weights to start from -------------------------------------------------------------------------


def weights(model, path, **changes):
    save_file({k: v for k, v in (model.network.state_dict() | changes).items() if v is not None}, path)
    return {"pretrained": str(path)}


def test_weights_of_other_classes_and_another_grid_are_taken_over(tmp_path):
    there = classifier({"network": VIT, "options": {"side": 64}}, num_classes=3)
    given = weights(there, tmp_path / "w.safetensors")
    fresh = classifier({"network": VIT}).network.state_dict()
    found = classifier({"network": VIT} | given).network.state_dict()
    source = there.network.state_dict()
    for name, value in found.items():
        expected = fresh if "heads.head" in name else source
        if name != "encoder.pos_embedding":
            assert torch.equal(value, expected[name]), name
    before, after = source["encoder.pos_embedding"], found["encoder.pos_embedding"]
    assert (before.shape[1], after.shape[1]) == (65, 17)
    assert torch.equal(after[:, 0], before[:, 0])  # the class token's
    assert torch.equal(after, pretrained.resampled(before, 1, 8, 4))


def test_resampling_keeps_what_is_even():
    # A ramp over a map is a ramp on the other grid, but for its border; the mean stays.
    ramp = torch.arange(8.0).repeat(8, 1).flatten().view(1, 64, 1)
    down = pretrained.resampled(ramp, 0, 8, 4).view(4, 4)
    torch.testing.assert_close(down[0], down[3])
    torch.testing.assert_close(down[0].mean(), torch.tensor(3.5))
    assert (down[0].diff() > 0).all()


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"bn1.weight": None}, "bn1.weight \\(missing in the file"),
        ({"more": torch.zeros(1)}, "more \\(not in the network"),
        ({"bn1.bias": torch.full((64,), torch.nan)}, "bn1.bias is not finite"),
        ({"conv1.weight": torch.zeros(64, 3, 3, 3)}, "conv1.weight is \\(64, 3, 3, 3\\), the network's"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, changes, found):
    settings = {"network": "torchvision:resnet18"}
    given = weights(classifier(settings), tmp_path / "w.safetensors", **changes)
    with pytest.raises(ValueError, match=found):
        classifier(settings | given)


def test_weights_that_are_no_file_are_refused(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        classifier({"network": "torchvision:resnet18", "pretrained": str(tmp_path / "w.safetensors")})


# --- the catalogue ---------------------------------------------------------------------------------

# The test builds a few of each library, by hand all of them: benchmarks/catalogue.py writes it anew.
QUICK = ("resnet18", "mobilenet_v2", "convnext_tiny", "vit_b_32", "vit_tiny_patch16_224")


@pytest.mark.parametrize("name", [name for name in registry.catalogue() if name.partition(":")[2] in QUICK])
def test_the_catalogue_is_right(name):
    if name.startswith("timm:") and importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    said = registry.catalogue()[name]
    network = facts.on_meta(lambda: NamedNetwork(network=name).build(said["classes"]))
    assert facts.parameters(network) == said["parameters"]
    assert facts.norms(network) == said["norms"]
    assert facts.head(network, said["min_side"]) == said["logits"]
    assert registry.declared("models", name).constants["min_side"] == said["min_side"]


@pytest.mark.parametrize(
    ("name", "parameters", "norms", "logits"),
    [
        ("torchvision:resnet18", 11_181_642, ["batch"], ["fc"]),
        ("torchvision:resnet50", 23_528_522, ["batch"], ["fc"]),
        ("timm:resnet50", 23_528_522, ["batch"], ["fc"]),
        ("torchvision:densenet121", 6_964_106, ["batch"], ["classifier"]),
        ("torchvision:mobilenet_v2", 2_236_682, ["batch"], ["classifier.1"]),
        ("torchvision:convnext_tiny", 27_827_818, ["layer"], ["classifier.2"]),
        ("timm:convnext_tiny", 27_827_818, ["layer"], ["head.fc"]),
        ("torchvision:swin_t", 27_527_044, ["layer"], ["head"]),
        ("torchvision:vit_b_16", 85_806_346, ["layer"], ["heads.head"]),
        ("timm:vit_base_patch16_224", 85_806_346, ["layer"], ["head"]),
        ("timm:vit_small_patch16_224", 21_669_514, ["layer"], ["head"]),
        ("timm:vit_tiny_patch16_224", 5_526_346, ["layer"], ["head"]),
        ("timm:deit_tiny_patch16_224", 5_526_346, ["layer"], ["head"]),
        ("timm:deit_tiny_distilled_patch16_224", None, ["layer"], ["head", "head_dist"]),
    ],
)
def test_the_catalogue_says_what_was_counted_by_others(name, parameters, norms, logits):
    said = registry.catalogue()[name]
    assert parameters in (None, said["parameters"])
    assert (said["norms"], said["logits"]) == (norms, logits)


def test_a_dry_run_imports_no_torch_for_it():
    program = textwrap.dedent(
        """
        import sys
        from detrojan import registry
        from detrojan.study import files, json_schema
        registry.declared("models", "torchvision:resnet50")
        assert not {"torch", "timm", "torchvision"} & set(sys.modules)
        """
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_multiplications_are_those_of_the_papers():
    network = facts.on_meta(lambda: NamedNetwork(network="torchvision:resnet18").build(1000))
    assert facts.macs(network, 224) == pytest.approx(1.8e9, rel=0.02)
