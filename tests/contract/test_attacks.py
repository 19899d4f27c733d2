"""Every attack of the registry keeps the interface; a new file is tested without a change here."""

import pytest
import torch

from detrojan import poisoning, registry, rng
from detrojan.attacks.base import Attack, LabelMode

SIZES = ((10, 32), (43, 32), (200, 64))


@pytest.fixture(params=registry.names("attacks"))
def attack(request):
    return registry.load("attacks", request.param, smoke=True)


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]}-classes-{size[1]}-px")
def train(request, toy_images):
    num_classes, side = request.param
    return toy_images(num_classes=num_classes, side=side, count=2 * num_classes)


def test_attack_is_declared_in_full(attack):
    assert isinstance(attack, Attack)
    assert isinstance(attack.label_mode, LabelMode)
    assert all(field.description for field in type(attack).model_fields.values())


def test_triggered_images_differ_and_keep_their_form(attack, train):
    trigger = attack.learn_trigger(train, rng=rng.stream("trigger"))
    before = train.images.clone()
    triggered = attack.apply(train.images, trigger)
    assert triggered.dtype == torch.uint8
    assert triggered.shape == train.images.shape
    # Every image is touched: a pattern that rounding swallows would be no attack.
    assert (triggered != train.images).flatten(1).any(1).all()
    assert torch.equal(train.images, before)


def test_attack_is_pure_and_deterministic(attack, train):
    state = torch.get_rng_state()
    runs = []
    for _ in range(2):
        trigger = attack.learn_trigger(train, rng=rng.stream("trigger"))
        runs.append((trigger, attack.apply(train.images, trigger)))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_stamping_an_image_does_not_depend_on_its_neighbours(attack, train):
    trigger = attack.learn_trigger(train, rng=rng.stream("trigger"))
    together = attack.apply(train.images[:3], trigger)
    alone = torch.cat([attack.apply(image[None], trigger) for image in train.images[:3]])
    assert torch.equal(together, alone)


def test_poisoned_rows_follow_the_label_mode(attack, train):
    trigger = attack.learn_trigger(train, rng=rng.stream("trigger"))
    ratio = 1 / train.num_classes  # as many images as the target class has
    rows = poisoning.poison(attack, trigger, train, ratio, 0, rng=rng.stream("poison"))
    assert len(rows) == 2
    assert (rows.labels == 0).all()
    if attack.label_mode is LabelMode.CLEAN_LABEL:
        assert torch.equal(rows.labels, rows.true_labels)
