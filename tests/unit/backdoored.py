"""Train the backdoored models that the tests of defenses share: `python -m tests.unit.backdoored [ATTACK]`.

Another seed, torch or processor gives another model, on which some defenses need other hyperparameters
than those of their tests; so the tests read those that were kept.
"""

import sys

import torch

from detrojan import models, rng
from detrojan.labels import LabelMap
from detrojan.learning import training
from detrojan.learning.meter import meter
from detrojan.settings import Optimization
from detrojan.stages import classifier
from detrojan.storage import artifacts
from tests.unit.conftest import KEPT, attack_on, digits, kept_backdoor, poisoned_rows

SEED = 2
RATIO = 0.15
EPOCHS = {"bpp": 40}  # what is poisoned on the fly is learned last
CPU = torch.device("cpu")


def train(name: str) -> models.Classifier:
    """Return a PreAct-ResNet-18 of width 8 that has learned digits and an attack, its weights float16."""
    images, _, _ = digits()
    attack, trigger = attack_on(images, name)
    build = models.Build("preactresnet18", {"width": 8}, 10, images.info.mean, images.info.std)
    with rng.global_stream(rng.stream("init", SEED)):
        model = models.build(build)
    optimization = Optimization(epochs=EPOCHS.get(name, 16), batch_size=16, lr=0.05)
    batches: classifier.BatchOptions = {}
    if hasattr(attack, "control"):
        poisoner = attack.control(trigger, LabelMap(0)).begin(images, rng.stream("poisoner", SEED))
        batches = classifier.poisoned_batches(poisoner, RATIO)
    else:
        images = images.replaced(poisoned_rows(images, attack, trigger))
    with meter(CPU):
        training.fit(model, images, optimization, rng=rng.stream("train", SEED), **batches)
    return model.half()


def main() -> None:
    """Train those that the command line names, all if it names none, and say what they are."""
    for name in sys.argv[1:] or KEPT:
        artifacts.write_model(train(name), KEPT[name])
        kept = kept_backdoor(name)
        acc, asr, _ = kept.rates(kept.model)
        sys.stdout.write(f"{name}: ACC {acc:.1%}, ASR {asr:.1%}\n")


if __name__ == "__main__":
    main()
