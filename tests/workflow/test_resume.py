"""A training job that is killed goes on after its last epoch and ends with the same bits."""

import signal
import subprocess
import sys

import pytest

from detrojan import artifacts, registry

CONTROLLING = [name for name in registry.names("attacks") if registry.trigger_owner(name) == "model"]

# Trains a tiny victim as the script does; given a number of epochs, it kills itself after so many.
JOB = """
import os, signal, sys
from pathlib import Path
import torch
from detrojan import artifacts, registry, rng, training, victim
from detrojan.cells import Model
from detrojan.data import DatasetInfo, ImageSet
from detrojan.labels import LabelMap
from detrojan.settings import Augmentation

torch.set_num_threads(1)
name, folder, kill_after = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
augmentation = Augmentation(crop_padding=2, flip=True)
info = DatasetInfo(16, 16, tuple("abcd"), (0.5, 0.4, 0.3), (0.2, 0.3, 0.2), augmentation)
pixels = torch.randint(256, (50, 3, 16, 16), generator=rng.stream("pixels")).to(torch.uint8)
images = ImageSet.clean(pixels, torch.arange(50) % 4, torch.arange(50), info)
attack = registry.load("attacks", name, smoke=True)
trigger = attack.learn_trigger(images, rng=rng.stream("trigger"))
save = training.Checkpoint.save

def save_and_die(self, parts, history):
    save(self, parts, history)
    if len(history) == kill_after:
        os.kill(os.getpid(), signal.SIGKILL)

training.Checkpoint.save = save_and_die
trained = victim.train(
    images,
    Model("toy", "preactresnet18", name, 0.15, 0),
    architecture={"width": 4},
    optimization={"epochs": 4, "batch_size": 16},
    code="a",
    folder=folder,
    device=torch.device("cpu"),
    control=attack.control(trigger, LabelMap(0)),
)
artifacts.write_model(trained.model, folder / "model.safetensors")
artifacts.write_tensors(trained.trigger, folder / "trigger.safetensors")
rows = [{k: v for k, v in row.items() if k != "seconds"} for row in trained.history]
artifacts.write_card({"history": rows, "ratio": trained.card["effective_ratio"]}, folder / "card.json")
"""


def run(name, folder, kill_after=0):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", JOB, name, str(folder), str(kill_after)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@pytest.mark.parametrize("name", CONTROLLING)
def test_a_killed_training_ends_with_the_same_bits(name, tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    done = run(name, undisturbed)
    assert done.returncode == 0, done.stderr
    assert run(name, killed, kill_after=2).returncode == -signal.SIGKILL
    assert not (killed / "model.safetensors").exists()
    done = run(name, killed)
    assert done.returncode == 0, done.stderr
    for file in ("model.safetensors", "trigger.safetensors", "card.json"):
        assert (killed / file).read_bytes() == (undisturbed / file).read_bytes(), file
    card = artifacts.read_card(killed / "card.json")
    assert sum(row["num_poisoned"] for row in card["history"]) == pytest.approx(card["ratio"] * 4 * 50)
