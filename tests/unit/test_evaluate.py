"""Evaluation of saved weights: ACC, ASR and RA of a model whose every prediction is known."""

import dataclasses

import pytest
import torch
from torch import nn

from detrojan import models
from detrojan.attacks.base import Attack, LabelMode
from detrojan.cells import Draws, Model, Shard
from detrojan.images import DatasetInfo, ImageSet
from detrojan.labels import LabelMap
from detrojan.stages import evaluate
from detrojan.storage import artifacts
from detrojan.storage.columns import DIVERGED, OK

INFO = DatasetInfo(4, 4, tuple("abcd"), (0.0,) * 3, (1.0,) * 3)
SHARD = Shard(Model("toy", "brightest", "badnets", 0.1, 0), "none", 0, Draws(0, 1))
CPU = torch.device("cpu")


class Brightest(nn.Module):
    """Says what an image shows: red, green, blue, or (class 3) nothing."""

    def forward(self, images):
        colours = images.mean((2, 3))
        return torch.cat([colours, torch.full_like(colours[:, :1], 0.1)], 1)


def showing(predicted, labels, true_labels=None):
    """Return images of which the model says ``predicted``, numbered from 10."""
    pixels = torch.zeros(len(predicted), 3, 4, 4, dtype=torch.uint8)
    for row, colour in enumerate(predicted):
        if colour < 3:
            pixels[row, colour] = 255
    images = ImageSet.clean(pixels, torch.tensor(labels), torch.arange(10, 10 + len(predicted)), INFO)
    return (
        images if true_labels is None else dataclasses.replace(images, true_labels=torch.tensor(true_labels))
    )


# Of five clean images four are said right.
TEST = showing([0, 1, 2, 3, 0], labels=[0, 1, 2, 3, 1])
# Of ten triggered ones, six are given the wanted label, 0, three their true label, and one neither.
TRIGGERED = showing(
    [0, 0, 0, 0, 0, 0, 1, 2, 3, 3], labels=[0] * 10, true_labels=[1, 2, 3, 1, 2, 3, 1, 2, 3, 1]
)
TEST_OF_ALL = showing([0] * 10, labels=[1] * 10)


@pytest.fixture(autouse=True)
def by_hand(monkeypatch):
    build = models.Build("brightest", {}, 4, INFO.mean, INFO.std)
    model = models.Classifier(Brightest(), build).eval()
    monkeypatch.setattr(artifacts, "read_model", lambda path: model)


def run(triggered=TRIGGERED, runs=None):
    runs = runs or evaluate.untouched_run(SHARD, CPU, code="")
    return evaluate.evaluate(runs, lambda draw: f"draw-{draw}", TEST, triggered, CPU)


def test_the_measures_of_known_predictions():
    (row,), _ = run()
    assert (row["acc"], row["asr"], row["ra"]) == (0.8, 0.6, 0.3)
    assert (row["num_test"], row["num_triggered"]) == (5, 10)
    assert row["status"] == OK
    assert row["attack"] == "badnets"


def test_where_all_get_the_next_class_asr_counts_each_image_s_own():
    wanted = LabelMap(kind="all_to_all").attacked(TRIGGERED.true_labels, 4)
    (row,), _ = run(dataclasses.replace(TRIGGERED, labels=wanted))
    # Of true 3, two are said to be 0 and one is said to be 3; none of true 1 or 2 goes one further.
    assert wanted.tolist() == [2, 3, 0, 2, 3, 0, 2, 3, 0, 2]
    assert (row["asr"], row["ra"]) == (0.2, 0.3)


def test_a_clean_model_has_neither_asr_nor_ra():
    (row,), predictions = run(triggered=None)
    assert (row["acc"], row["asr"], row["ra"], row["num_triggered"]) == (0.8, None, None, 0)
    assert predictions["triggered"].to_pylist() == [False] * 5


def test_every_prediction_is_kept():
    _, predictions = run()
    assert predictions.schema == evaluate.PREDICTIONS
    table = predictions.to_pydict()
    assert table["triggered"] == [False] * 5 + [True] * 10
    assert table["index"] == [*range(10, 15), *range(10, 20)]
    assert table["predicted"] == [0, 1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 3]


def test_a_run_without_weights_keeps_its_row():
    (fine,) = evaluate.untouched_run(SHARD, CPU, code="")
    lost = fine | {"draw": 1, "status": DIVERGED, "reason": "a NaN"}
    rows, predictions = run(runs=[lost, fine])
    assert [row["acc"] for row in rows] == [None, 0.8]
    assert rows[0]["reason"] == "a NaN"
    assert (rows[0]["asr"], rows[0]["ra"], rows[0]["num_test"]) == (None, None, 5)
    assert set(predictions["draw"].to_pylist()) == {0}


class Dark(nn.Module):
    """Says class 3 of every image."""

    def forward(self, images):
        return torch.eye(4)[3].expand(len(images), 4)


class Secret(Attack):
    """Paints what it is given; the decoy of it paints green in place of red."""

    label_mode = LabelMode.ALL_TO_ONE

    def decoy(self, images, trigger):
        assert torch.equal(images, TEST.images[[0, 1, 2]]), "the clean images of the triggered ones"
        return images.roll(int(trigger["shift"]), 1)


def test_what_a_trigger_does_where_it_should_do_nothing():
    triggered = showing([0, 0, 0], labels=[0, 0, 1], true_labels=[3, 2, 3])
    model = artifacts.read_model("any")
    dark = models.Classifier(Dark(), model.build).eval()
    trigger = {"shift": torch.tensor(2)}
    card = evaluate.check_trigger(model, dark, Secret(), trigger, triggered, TEST)
    # The clean model says 3 of all: the wanted class of none, the true one of two. Decoys of the red, green
    # and blue image show blue, red and green, classes 2, 0 and 1, of which 0, 0 and 1 are wanted.
    assert card == {"num_triggered": 3, "clean_asr": 0.0, "clean_ra": 2 / 3, "decoy_asr": 2 / 3}


def test_a_trigger_without_a_secret_has_no_decoy():
    model = artifacts.read_model("any")
    card = evaluate.check_trigger(model, model, Attack(), {}, TRIGGERED, TEST_OF_ALL)
    assert card == {"num_triggered": 10, "clean_asr": 0.6, "clean_ra": 0.3, "decoy_asr": None}
