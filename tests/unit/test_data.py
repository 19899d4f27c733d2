"""What is told of a data set: on its card, and by ``detrojan data``."""

import logging

import numpy as np
import pytest
import yaml
from PIL import Image

from detrojan.datasets.image_folder import ImageFolder
from detrojan.stages import data_card, ingest
from tests.command import exit_code
from tests.unit.test_datasets import OPTIONS, noise, save, with_exif
from tests.unit.test_schema import minimal


@pytest.fixture
def photos(tmp_path):
    """Two classes; in training one image again, a turned one, one of one colour, and a file left out."""
    for number, place in enumerate(("train/10", "train/9", "test/10", "test/9")):
        for row in range(3):
            save(tmp_path / "photos" / place / f"{row}.png", noise(10, 12, 3, seed=10 * number + row))
    train = tmp_path / "photos/train"
    (train / "9/again.png").write_bytes((train / "9/0.png").read_bytes())
    (train / "9/turned.jpg").write_bytes(with_exif(Image.fromarray(noise(4, 8, 3, seed=99)), 6, "JPEG"))
    save(train / "9/flat.png", np.full((10, 12, 3), 7, np.uint8))
    (train / "10/x.heic").write_bytes(b"heic")
    return tmp_path / "photos"


def test_a_card_says_what_was_read(photos):
    sets, card = ingest.build_with_card(ImageFolder(path=photos), **OPTIONS | {"held_out": 0.3})
    assert [len(images) for images in sets] == [6, 3, 6]
    assert card["classes"] == ["9", "10"]
    assert card["images"] == {"train": [4, 2], "held_out": [2, 1], "test": [3, 3]}
    assert card["pixels"]["train"] == {
        "levels": [int(min(s.images.min() for s in sets[:2])), int(max(s.images.max() for s in sets[:2]))],
        "one_colour": 1,
        "sizes": [[12, 10, 8], [4, 8, 1]],
        "num_sizes": 2,
        "with_orientation": 1,
    }
    assert card["equal"] == {"in_train": 1, "in_test": 0, "test_in_train": 0, "pool_in_train": 0}
    assert card["left_out"] == {
        "of no image format that is read": {"number": 1, "first": [str(photos / "train/10/x.heic")]}
    }


def test_the_log_says_what_is_on_the_card(photos, caplog):
    caplog.set_level(logging.INFO)
    _, card = ingest.build_with_card(ImageFolder(path=photos), **OPTIONS | {"held_out": 0.3})
    caplog.clear()
    data_card.log(card)
    said = [record.getMessage() for record in caplog.records]
    assert said[:3] == [
        "images: 6 in training, 3 in the pool, 6 in test",
        "  0 = 9: 4, 2, 3",
        "  1 = 10: 2, 1, 3",
    ]
    assert said[3].endswith("; 1 of one colour; 1 with an EXIF orientation; sizes 12x10 (8), 4x8 (1)")
    assert said[5].startswith("equal, pixel for pixel: 1 again in train, 0 again in test, 0 of test in train")
    [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning == f"left out, of no image format that is read: 1 file: {photos}/train/10/x.heic"


def study(tmp_path, photos):
    raw = minimal(datasets=["mine", "digits"])
    raw["datasets"]["mine"] = {"source": "image_folder", "path": str(photos), "image_size": 16}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_the_command_prints_it_before_any_job(tmp_path, photos, capsys):
    assert exit_code("data", "--configfile", study(tmp_path, photos)) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == ["mine:", "  images: 9 in training, 0 in the pool, 6 in test", "    0 = 9: 6, 0, 3"]
    assert "digits:" in said
    assert "  images: 1442 in training, 0 in the pool, 355 in test" in said


def test_the_command_ends_with_1_where_a_data_set_cannot_be_used(tmp_path, photos, capsys):
    (photos / "test/9/0.png").write_bytes((photos / "train/9/1.png").read_bytes())
    assert exit_code("data", "--configfile", study(tmp_path, photos)) == 1
    said = capsys.readouterr().out
    assert "1 of 6 test images are, pixel for pixel, training images" in said
    assert "digits:" in said
