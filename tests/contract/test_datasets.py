"""Every source of images keeps the interface; a new file is tested without a change here.

But for one that reads files: what these look like it alone knows, so ``EXAMPLES`` needs a few.
"""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from detrojan import registry
from detrojan.datasets.base import RawImages, Source
from detrojan.study.schema import Dataset
from tests.unit.test_datasets import encoded, noise, save, write_cifar, write_shard

SIDE = 24  # of no source's own images


def image_folder(folder):
    for seed, place in enumerate(("train/cat/a", "train/dog/a", "train/dog/b", "test/cat/a", "test/dog/a")):
        save(folder / f"{place}.png", noise(10, 12, 3, seed=seed))
    return {"path": folder}


def huggingface_parquet(folder):
    for seed, split in enumerate(("train", "test")):
        pixels = noise(3, 10, 12, 3, seed=seed)
        write_shard(folder / f"{split}.parquet", [0, 1, 1], [encoded(image) for image in pixels])
    return {"path": folder}


def torchvision_folder(folder):
    write_cifar(folder, "binary")
    return {"path": folder, "layout": "cifar10"}


# For each source that reads files: writes some into a folder, and returns what a study file says of them.
EXAMPLES = {
    "image_folder": image_folder,
    "huggingface_parquet": huggingface_parquet,
    "torchvision_folder": torchvision_folder,
}


@pytest.fixture(params=registry.names("datasets"), scope="module")
def name(request):
    return request.param


@pytest.fixture(scope="module")
def settings(name, tmp_path_factory):
    fields = registry.declared("datasets", name).settings.model_fields
    if name in EXAMPLES:
        return EXAMPLES[name](tmp_path_factory.mktemp(name))
    needs = [field for field, info in fields.items() if info.is_required()]
    assert not needs, f"{name} needs {needs}: add a function to EXAMPLES that writes a few files for it"
    return {}


@pytest.fixture
def source(name, settings):
    return registry.load("datasets", name, settings)


def test_source_is_declared_in_full(name, source, settings):
    assert isinstance(source, Source)
    assert all(field.description for field in type(source).model_fields.values())
    assert registry.declared("datasets", name).settings(**settings).model_dump() == source.model_dump()
    # Its fields stand beside those that all data sets have.
    assert not set(type(source).model_fields) & set(Dataset.model_fields)


def test_images_are_of_the_size_asked_for_and_counted_right(source):
    splits = {split: source.read(split, SIDE) for split in ("train", "test")}
    for split, raw in splits.items():
        assert isinstance(raw, RawImages)
        assert raw.images.shape == (len(raw.labels), SIDE, SIDE, 3)
        assert raw.images.dtype == np.uint8
        assert raw.labels.dtype == np.int64
        # Planning reads the counts alone, and asks for no more images than there are.
        assert source.counts(split) == Counter(raw.labels.tolist())
        assert set(raw.labels.tolist()) == set(range(len(raw.classes)))
    assert splits["train"].classes == splits["test"].classes


def test_images_are_the_same_whenever_they_are_read(source):
    first, again = source.read("train", SIDE), source.read("train", SIDE)
    assert np.array_equal(first.images, again.images)
    assert np.array_equal(first.labels, again.labels)
    # A source that gives one image for all teaches nothing.
    assert len(np.unique(first.images.reshape(len(first.images), -1), axis=0)) > 1


def test_splits_share_no_image(source):
    train, test = (
        {image.tobytes() for image in source.read(split, SIDE).images} for split in ("train", "test")
    )
    assert not train & test


def test_planning_needs_no_heavy_library(name, settings):
    plain = {key: str(value) for key, value in settings.items()}
    code = (
        "import sys; from detrojan import registry\n"
        f"source = registry.load('datasets', {name!r}, {plain!r})\n"
        "heavy = {'torch', 'torchvision', 'sklearn'}\n"
        "assert not (heavy | {'pandas'}) & set(sys.modules), sys.modules\n"
        # pyarrow takes pandas along where it is installed.
        "source.counts('train')\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
