"""Train the backdoored model that the tests of defenses share: `python -m tests.unit.backdoored`.

Another seed, torch or processor gives another model, on which some defenses need other hyperparameters
than those of their tests; so the tests read the one that was kept.
"""

from detrojan import models, rng
from detrojan.learning import training
from detrojan.settings import Optimization
from detrojan.storage import artifacts
from tests.unit.conftest import BACKDOORED, digits_with_badnets

SEED = 2


def train() -> models.Classifier:
    """Return a PreAct-ResNet-18 of width 8 that has learned digits and BadNets, its weights float16."""
    (images, _, _), _, _, rows = digits_with_badnets()
    build = models.Build("preactresnet18", {"width": 8}, 10, images.info.mean, images.info.std)
    with rng.global_stream(rng.stream("init", SEED)):
        model = models.build(build)
    optimization = Optimization(epochs=16, batch_size=16, lr=0.05)
    training.fit(model, images.replaced(rows), optimization, rng=rng.stream("train", SEED))
    return model.half()


if __name__ == "__main__":
    artifacts.write_model(train(), BACKDOORED)
