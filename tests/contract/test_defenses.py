"""Every defense of the registry keeps the interface; a new file is tested without a change here."""

import contextlib
import copy
import dataclasses

import pytest
import torch

from detrojan import models, registry, rng
from detrojan.cells import Draws, Model, Shard
from detrojan.defenses.base import Defense
from detrojan.errors import NotApplicableError
from detrojan.images import DefenderSample
from detrojan.stages import defend, poisoning, sampling
from detrojan.storage import artifacts
from detrojan.storage.columns import NOT_APPLICABLE, OK
from detrojan.study.schema import shipped
from tests.contract.conftest import narrow_settings

# Classes, side, SPC: the smallest sample that can be split, an odd one, and the three data sets' shapes.
SETTINGS = ((10, 32, 2), (10, 64, 3), (43, 32, 2), (200, 64, 2))
OTHER_ARCHITECTURES = [name for name in registry.names("models") if name != "preactresnet18"]
# Those for which the settings that come along with the methods name layers.
SUPPORTED = {
    architecture
    for name in registry.names("defenses")
    for override in shipped("defenses", name).overrides
    for architecture in OTHER_ARCHITECTURES
    if override.when.matches({"architecture": architecture})
}
STREAM = ("defend", "toy")


@pytest.fixture(params=registry.names("defenses"), scope="module")
def name(request):
    return request.param


@pytest.fixture(scope="module")
def defense(name):
    return load(name, "preactresnet18")


def load(name, architecture):
    """Return the defense as a study would on ``architecture``, but quick."""
    settings = shipped("defenses", name).resolve({"architecture": architecture})
    return registry.load("defenses", name, settings, smoke=True)


@pytest.fixture(scope="module")
def make_setting(toy_images):
    """Return a function that makes a model and the samples of two draws, triggered copies among them."""

    def make(name, num_classes, side, spc, architecture="preactresnet18"):
        pool = toy_images(num_classes=num_classes, side=side, count=(spc + 1) * num_classes)
        samples = sampling.draw_samples(pool, "toy", spc, range(2))
        attack = registry.load("attacks", "badnets")
        trigger = attack.learn_trigger(pool, rng=rng.stream("trigger"))
        triggered = poisoning.stamp(attack, trigger, samples)
        if registry.threat_model("defenses", name) == "known_trigger":
            samples = {draw: dataclasses.replace(s, triggered=triggered[draw]) for draw, s in samples.items()}
        # Narrower still where there are most images.
        width = 2 if num_classes == 200 else 4
        spec = models.Build(
            architecture,
            narrow_settings(architecture, width),
            num_classes,
            (0.5, 0.5, 0.5),
            (0.25, 0.25, 0.25),
        )
        with rng.global_stream(rng.stream("init")):
            return models.build(spec), samples

    return make


def run(defense, model, sample):
    return defense(model, dataclasses.replace(sample, chosen={}), rng=rng.stream(*STREAM))


def test_defense_is_declared_in_full(name, defense):
    assert isinstance(defense, Defense)
    assert all(field.description for field in type(defense).model_fields.values())
    assert registry.threat_model("defenses", name) in ("data_free", "clean_data", "known_trigger")


@dataclasses.dataclass
class Trial:
    """A defense run once, and what it was given, before and after."""

    model: models.Classifier
    sample: DefenderSample
    before: dict[str, torch.Tensor]
    images_before: torch.Tensor
    global_state_kept: bool
    repaired: models.Classifier


SETTING = "{0[0]}-classes-{0[1]}-px-spc-{0[2]}".format


@pytest.fixture(scope="module", params=SETTINGS, ids=SETTING)
def trial(request, name, defense, make_setting):
    model, samples = make_setting(name, *request.param)
    before, images = copy.deepcopy(model.state_dict()), samples[0].everything.images.clone()
    state = torch.get_rng_state()
    repaired = run(defense, model, samples[0])
    kept = torch.equal(torch.get_rng_state(), state)
    return Trial(model, samples[0], before, images, kept, repaired)


def test_defense_is_pure(trial):
    assert trial.global_state_kept
    assert torch.equal(trial.sample.everything.images, trial.images_before)
    assert not trial.model.training
    torch.testing.assert_close(trial.model.state_dict(), trial.before, rtol=0, atol=0)


# Not in the largest setting, which would take a quarter of all tests' time; nor does it add to the others.
@pytest.mark.parametrize("trial", SETTINGS[:-1], indirect=True, ids=SETTING)
def test_defense_is_deterministic(defense, trial):
    again = run(defense, trial.model, trial.sample)
    torch.testing.assert_close(again.state_dict(), trial.repaired.state_dict(), rtol=0, atol=0)


def test_repaired_model_is_whole(trial, tmp_path):
    repaired = trial.repaired
    assert not repaired.training
    # A defense may add layers, if the model's build declares them, and nothing else.
    added = tuple(f"network.{host}.{kind}." for host, kind in repaired.build.inserted.items())
    assert {k: v.shape for k, v in repaired.state_dict().items() if not k.startswith(added)} == {
        k: v.shape for k, v in trial.model.state_dict().items()
    }
    assert repaired.build == dataclasses.replace(trial.model.build, inserted=repaired.build.inserted)
    images = trial.sample.train.images[:8].float() / 255
    with torch.inference_mode():
        logits = repaired(images)
        artifacts.write_model(repaired, tmp_path / "model.safetensors")
        assert torch.equal(artifacts.read_model(tmp_path / "model.safetensors")(images), logits)
    assert logits.isfinite().all()


def test_a_draw_is_the_same_alone_and_in_a_shard(name, defense, make_setting, tmp_path):
    model, samples = make_setting(name, *SETTINGS[0])

    def weights(folder, draws):
        (tmp_path / folder).mkdir()
        shard = Shard(Model("toy", "preactresnet18", "badnets", 0.1, 0), name, 2, draws)
        rows = defend.run_shard(defense, model, samples, shard, tmp_path / folder, code="")
        assert [row["status"] for row in rows] == [OK] * len(draws)
        return artifacts.read_tensors(tmp_path / folder / "draw-1.safetensors")[0]

    torch.testing.assert_close(weights("alone", Draws(1, 1)), weights("shard", Draws(0, 1)), rtol=0, atol=0)


@pytest.mark.parametrize("architecture", OTHER_ARCHITECTURES)
def test_defense_works_on_every_architecture(name, make_setting, architecture):
    side = max(32, registry.declared("models", architecture).constants["min_side"])
    model, samples = make_setting(name, 10, side, 2, architecture)
    before = copy.deepcopy(model.state_dict())
    # Until a setting names the layers of a new architecture, a method may say in a row that it lacks them.
    lacks_layers = () if architecture in SUPPORTED else NotApplicableError
    with contextlib.suppress(lacks_layers):
        artifacts.check_finite(run(load(name, architecture), model, samples[0]), name)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_settings_name_layers_of_all_that_the_survey_has():
    assert {"efficientnet_b3", "mobilenet_v3_large", "vgg19_bn"} <= SUPPORTED


def test_too_small_a_sample_is_a_row_with_a_reason(name, defense, make_setting, tmp_path):
    model, samples = make_setting(name, 10, 32, 1)
    shard = Shard(Model("toy", "preactresnet18", "badnets", 0.1, 0), name, 1, Draws(0, 0))
    (row,) = defend.run_shard(defense, model, samples, shard, tmp_path, code="")
    if defense.min_spc > 1:
        assert row["status"] == NOT_APPLICABLE
        assert f"needs {defense.min_spc} clean samples per class" in row["reason"]
        assert not list(tmp_path.iterdir())
    else:
        assert row["status"] == OK
