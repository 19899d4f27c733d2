"""Every attack of the registry keeps the interface; a new file is tested without a change here."""

import functools

import pytest
import torch

from detrojan import models, registry, rng
from detrojan.attacks import base
from detrojan.attacks.base import Attack, LabelMode
from detrojan.attacks.training_control.base import TrainingControlledAttack
from detrojan.images import Loader
from detrojan.labels import LabelMap
from detrojan.learning import training
from detrojan.settings import Optimization
from detrojan.stages import classifier, poisoning
from tests.contract.conftest import narrow_settings

SIZES = ((10, 32), (43, 32), (200, 64))
SOME = 20  # images: enough to see, and networks that redraw them take their time
IN_BATCH = 8  # images that they redraw at once, not 64: a batch is filled up, however few are asked for
CONTROLLING = [name for name in registry.names("attacks") if registry.trigger_owner(name) == "model"]
POISONING = [name for name in registry.names("attacks") if name not in CONTROLLING]
TARGET = LabelMap(0)


@pytest.fixture(scope="module", autouse=True)
def _small_batches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "IN_BATCH", IN_BATCH)
        yield


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]}-classes-{size[1]}-px", scope="module")
def train(request, toy_images):
    num_classes, side = request.param
    return toy_images(num_classes=num_classes, side=side, count=2 * num_classes)


@pytest.fixture(scope="module")
def clean_model(train):
    """A network for attacks that learn against one, untrained: it should not call all images the target."""
    build = models.Build("preactresnet18", {"width": 4}, train.num_classes, train.info.mean, train.info.std)
    with rng.global_stream(rng.stream("a clean model")), torch.no_grad():
        model = models.build(build).train()
        model(train.images.float() / 255)
    return model.eval()


def load(name):
    return registry.load("attacks", name, smoke=True)


def learned(name, train, clean_model):
    """Return the attack and its trigger, finished as far as a test can wait for it."""
    attack = load(name)
    model = clean_model if attack.against_model else None
    trigger = attack.learn_trigger(train, model, rng=rng.stream("trigger"))
    if isinstance(attack, TrainingControlledAttack):
        trigger = attack.poisoner(trigger, train, TARGET, rng=rng.stream("poisoner")).trigger()
    return attack, trigger


@pytest.fixture(scope="module")
def make(train, clean_model):
    """Return ``learned`` for these images, each attack once."""
    return functools.cache(lambda name: learned(name, train, clean_model))


@pytest.mark.parametrize("name", registry.names("attacks"))
def test_attack_is_declared_in_full(name):
    attack = load(name)
    assert isinstance(attack, Attack)
    assert isinstance(attack, TrainingControlledAttack) == (name in CONTROLLING)
    assert isinstance(attack.label_mode, LabelMode)
    assert all(field.description for field in type(attack).model_fields.values())


@pytest.mark.parametrize("name", registry.names("attacks"))
def test_triggered_images_differ_and_keep_their_form(name, make, train):
    attack, trigger = make(name)
    images = train.images[:SOME]
    before = images.clone()
    triggered = attack.apply(images, trigger)
    assert triggered.dtype == torch.uint8
    assert triggered.shape == images.shape
    # Every image is touched: a pattern that rounding swallows would be no attack.
    assert (triggered != images).flatten(1).any(1).all()
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", registry.names("attacks"))
def test_attack_is_pure_and_deterministic(name, make, train, clean_model):
    attack, trigger = make(name)
    state = torch.get_rng_state()
    weights = {key: value.clone() for key, value in clean_model.state_dict().items()}
    _, again = learned(name, train, clean_model)
    torch.testing.assert_close(dict(again), dict(trigger), rtol=0, atol=0)
    twice = [attack.apply(train.images[:SOME], trigger) for _ in range(2)]
    assert torch.equal(*twice)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(clean_model.state_dict(), weights, rtol=0, atol=0)


@pytest.mark.parametrize("name", registry.names("attacks"))
def test_stamping_an_image_does_not_depend_on_its_neighbours(name, make, train):
    attack, trigger = make(name)
    together = attack.apply(train.images[:3], trigger)
    alone = torch.cat([attack.apply(image[None], trigger) for image in train.images[:3]])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("name", registry.names("attacks"))
def test_trigger_survives_a_file(name, make, train, tmp_path):
    from detrojan.storage import artifacts

    attack, trigger = make(name)
    artifacts.write_tensors(trigger, tmp_path / "trigger.safetensors")
    read, _ = artifacts.read_tensors(tmp_path / "trigger.safetensors")
    assert torch.equal(attack.apply(train.images[:2], read), attack.apply(train.images[:2], trigger))


@pytest.mark.parametrize("name", POISONING)
def test_poisoned_rows_follow_the_label_mode(name, make, train):
    attack, trigger = make(name)
    ratio = 1 / train.num_classes  # as many images as the target class has
    rows = poisoning.poison(attack, trigger, train, ratio, TARGET, rng=rng.stream("poison"))
    assert len(rows) == 2
    assert (rows.labels == 0).all()
    if attack.label_mode is LabelMode.CLEAN_LABEL:
        assert torch.equal(rows.labels, rows.true_labels)


@pytest.mark.parametrize("kind", ["all_to_one", "all_to_all"])
@pytest.mark.parametrize("name", CONTROLLING)
def test_batches_are_poisoned_as_told(name, kind, train):
    attack = load(name)
    labels = LabelMap(0, kind)
    trigger = attack.learn_trigger(train, rng=rng.stream("trigger"))
    poisoner = attack.poisoner(trigger, train, labels, rng=rng.stream("poisoner"))
    state = torch.get_rng_state()
    (batch,) = Loader(train, len(train), poisoner.augmentation).epoch(rng.stream("epoch"))
    for count in (0, 1, 7):
        images, before = batch.images.clone(), batch.labels.clone()
        poisoned = poisoner.poison(batch, count, rng=rng.stream("poison"))
        assert poisoned.images.shape == images.shape
        assert poisoned.images.dtype == torch.float32
        assert float(poisoned.images.detach().min()) >= 0
        assert float(poisoned.images.detach().max()) <= 1
        # Only triggered images get other labels; cross, noise and negative images keep theirs.
        assert torch.equal(poisoned.labels[:count], labels.attacked(before[:count], train.num_classes))
        assert torch.equal(poisoned.labels[count:], before[count:])
        assert poisoned.num_poisoned == count
        assert torch.equal(batch.images, images)
        assert torch.equal(batch.labels, before)
        again = poisoner.poison(batch, count, rng=rng.stream("poison"))
        assert torch.equal(again.images[count:], poisoned.images[count:]) or poisoner.parts
    assert torch.equal(torch.get_rng_state(), state)


SHAPES = [
    ("preactresnet18", 200, 64),
    ("vgg19_bn", 43, 32),
    ("efficientnet_b3", 10, 32),
    ("mobilenet_v3_large", 43, 32),
    ("mobilenet_v3_large", 200, 64),
]
OTHERS = sorted(set(registry.names("models")) - {architecture for architecture, _, _ in SHAPES})


@pytest.mark.parametrize(
    ("architecture", "num_classes", "side"),
    SHAPES
    + [(name, 10, max(32, registry.declared("models", name).constants["min_side"])) for name in OTHERS],
)
@pytest.mark.parametrize("name", CONTROLLING)
def test_attack_trains_with_every_architecture(name, architecture, num_classes, side, toy_images):
    images = toy_images(num_classes=num_classes, side=side, count=8)
    attack = load(name)
    trigger = attack.learn_trigger(images, rng=rng.stream("trigger"))
    poisoner = attack.poisoner(trigger, images, TARGET, rng=rng.stream("poisoner"))
    build = models.Build(
        architecture, narrow_settings(architecture), num_classes, images.info.mean, images.info.std
    )
    with rng.global_stream(rng.stream("model")):
        model = models.build(build)
    (epoch,) = training.fit(
        model,
        images,
        Optimization(epochs=1, batch_size=8),
        rng=rng.stream("fit"),
        **classifier.poisoned_batches(poisoner, 0.25),
    )
    assert epoch.num_poisoned == 2
    stamped = attack.apply(images.images, poisoner.trigger())
    assert model(stamped.float() / 255).isfinite().all()
