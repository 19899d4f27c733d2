"""Training a classifier: a checkpoint is gone on from only if all that decides the result is equal."""

import dataclasses

import pytest
import torch

from detrojan.cells import Model
from detrojan.learning.training import Checkpoint
from detrojan.settings import Augmentation
from detrojan.stages import classifier

NAME = Model("toy", "preactresnet18", "badnets", 0.25, 0)


class KilledError(Exception):
    """Stands for a signal that ends the job."""


@pytest.fixture
def epochs_run(monkeypatch, toy_images, tmp_path):
    """Return a function that trains after a job was killed in its second epoch, and says which epochs ran."""
    saved, save = [], Checkpoint.save

    def recorded(self, parts, history):
        save(self, parts, history)
        saved.append(len(history))

    def kill(self, parts, history):
        save(self, parts, history)
        raise KilledError

    def train(saving, images, name, **changed):
        monkeypatch.setattr(Checkpoint, "save", saving)
        options = {"architecture": {"width": 2}, "optimization": {"epochs": 2, "batch_size": 8}, "code": "a"}
        classifier.train(images, name, folder=tmp_path, device=torch.device("cpu"), **options | changed)

    def run(images=None, name=NAME, **changed):
        with pytest.raises(KilledError):
            train(kill, toy_images(), NAME)
        train(recorded, images or toy_images(), name, **changed)
        return saved

    return run


def test_a_killed_job_goes_on(epochs_run):
    assert epochs_run() == [2]


@pytest.mark.parametrize(
    "changed",
    [
        {"code": "b"},
        {"optimization": {"epochs": 2, "batch_size": 8, "lr": 0.02}},
        {"name": NAME._replace(seed=1)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_another_job_s_checkpoint_is_not_gone_on_from(epochs_run, changed):
    assert epochs_run(**changed) == [1, 2]


def one_pixel(images):
    pixels = images.images.clone()
    pixels[3, 1, 4, 5] ^= 1
    return dataclasses.replace(images, images=pixels)


def one_label(images):
    labels = images.labels.clone()
    labels[3] = 0
    return dataclasses.replace(images, labels=labels)


def other_augmentation(images):
    return dataclasses.replace(
        images, info=dataclasses.replace(images.info, augmentation=Augmentation(flip=True))
    )


def other_normalization(images):
    return dataclasses.replace(images, info=dataclasses.replace(images.info, mean=(0.5, 0.5, 0.5)))


@pytest.mark.parametrize("change", [one_pixel, one_label, other_augmentation, other_normalization])
def test_a_checkpoint_of_other_images_is_not_gone_on_from(epochs_run, toy_images, change):
    assert epochs_run(change(toy_images())) == [1, 2]
