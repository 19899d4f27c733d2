"""What the tests share: tiny image sets and a tiny classifier, the same whenever they are made."""

import pytest
import torch

from detrojan import models
from detrojan import rng as streams
from detrojan.images import DatasetInfo, ImageSet
from detrojan.settings import NO_AUGMENTATION

# The tests run side by side, a worker a core.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Put the folders whose files take longest first, or the last worker would be left with one of them.

    Files stay whole. ``pytest -n 2 --dist loadfile --no-loadscope-reorder`` hands them out in this order.
    """
    items.sort(key=lambda item: item.path.parent.name == "unit")


@pytest.fixture(scope="session")
def toy_images():
    """Return a function that makes clean images of noise, with the classes taking turns.

    ``index`` is not the row (10, 13, 16, ...), so that a test notices who takes one for the other.
    """

    def make(num_classes=4, side=8, count=12, seed=0, augmentation=NO_AUGMENTATION):
        info = DatasetInfo(
            height=side,
            width=side,
            classes=tuple(f"class {label}" for label in range(num_classes)),
            mean=(0.5, 0.4, 0.3),
            std=(0.25, 0.2, 0.3),
            augmentation=augmentation,
            digest=f"toy {seed}",
        )
        rng = streams.stream("toy images", seed)
        pixels = torch.randint(256, (count, 3, side, side), generator=rng).to(torch.uint8)
        rows = torch.arange(count)
        return ImageSet.clean(pixels, rows % num_classes, 10 + 3 * rows, info)

    return make


@pytest.fixture
def toy_model():
    """Return a PreAct-ResNet-18 of width 4 for the 4 classes of ``toy_images``, in eval mode.

    One batch has passed in training mode: as in a trained model, no running statistic is 0 or 1.
    """
    build = models.Build("preactresnet18", {"width": 4}, 4, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
    with streams.global_stream(streams.stream("toy model")), torch.no_grad():
        model = models.build(build).train()
        model(torch.rand(16, 3, 8, 8))
    return model.eval()
