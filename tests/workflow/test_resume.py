"""A training job that is killed goes on after its last epoch and ends with the same bits."""

import json
import signal
import subprocess
import sys

import pytest

from detrojan import registry
from detrojan.storage import records

CONTROLLING = [name for name in registry.names("attacks") if registry.trigger_owner(name) == "model"]

# Trains a tiny classifier as the script does, each time in a process of its own, which a fork makes
# quickly: in one folder to the end, in another until it kills itself after its second epoch, and there
# again. Prints how each ended and whether it left a model.
PROGRAM = """
import json, os, signal, sys, traceback
from pathlib import Path
import torch
from detrojan import registry, rng
from detrojan.cells import Model
from detrojan.images import DatasetInfo, ImageSet
from detrojan.labels import LabelMap
from detrojan.learning import determinism, training
from detrojan.settings import Augmentation
from detrojan.stages import classifier
from detrojan.storage import artifacts, records

determinism.configure(1)
name = sys.argv[1]
augmentation = Augmentation(crop_padding=2, flip=True)
info = DatasetInfo(16, 16, tuple("abcd"), (0.5, 0.4, 0.3), (0.2, 0.3, 0.2), augmentation)
pixels = torch.randint(256, (50, 3, 16, 16), generator=rng.stream("pixels")).to(torch.uint8)
images = ImageSet.clean(pixels, torch.arange(50) % 4, torch.arange(50), info)
attack = registry.load("attacks", name, smoke=True)
trigger = attack.learn_trigger(images, rng=rng.stream("trigger"))
save = training.Checkpoint.save

def train(folder, kill_after):
    def save_and_die(self, parts, history):
        save(self, parts, history)
        if len(history) == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    training.Checkpoint.save = save_and_die
    trained = classifier.train(
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
    records.write_card({"history": rows, "ratio": trained.card["effective_ratio"]}, folder / "card.json")

def job(folder, kill_after=0):
    folder.mkdir(exist_ok=True)
    process = os.fork()
    if not process:
        try:
            train(folder, kill_after)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    ending = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return ending, (folder / "model.safetensors").exists()

undisturbed, killed = Path(sys.argv[2]), Path(sys.argv[3])
print(json.dumps([job(undisturbed), job(killed, kill_after=2), job(killed)]))
"""


@pytest.mark.parametrize("name", CONTROLLING)
def test_a_killed_training_ends_with_the_same_bits(name, tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    command = [sys.executable, "-c", PROGRAM, name, str(undisturbed), str(killed)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    endings = json.loads(done.stdout)
    assert endings == [[0, True], [-signal.SIGKILL, False], [0, True]], done.stderr
    for file in ("model.safetensors", "trigger.safetensors", "card.json"):
        assert (killed / file).read_bytes() == (undisturbed / file).read_bytes(), file
    card = records.read_card(killed / "card.json")
    assert sum(row["num_poisoned"] for row in card["history"]) == pytest.approx(card["ratio"] * 4 * 50)
