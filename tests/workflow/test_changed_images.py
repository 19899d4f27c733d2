"""Images that were replaced or added are read anew; the same bytes elsewhere, or anew on disk, are not."""

import shutil

import numpy as np
from PIL import Image

from .conftest import STUDY, Workshop


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(path)


def test_what_changed_images_rerun(tmp_path):
    workshop = Workshop.make(tmp_path)
    study = STUDY | {"datasets": {"tiny": {"source": "image_folder", "path": "photos", "image_size": 16}}}
    study |= {"pool": "train", "grid": study["grid"] | {"attacks": ["badnets"]}}
    workshop.write(study)
    for number, place in enumerate(("train/a", "train/b", "test/a", "test/b")):
        for row in range(4):
            picture(tmp_path / "photos" / place / f"{row}.png", 10 * number + row)
    workshop.snakemake("--until", "sample")
    until = ("--until", "sample")
    # Elsewhere, and with other times.
    shutil.copytree(tmp_path / "photos", tmp_path / "copy", copy_function=shutil.copyfile)
    study["datasets"]["tiny"]["path"] = "copy"
    workshop.write(study)
    assert workshop.planned(*until) == {}
    picture(tmp_path / "copy/train/b/3.png", 99)
    assert workshop.planned(*until) == {"dataset": 1, "sample": 1}
    workshop.snakemake(*until)
    assert workshop.planned(*until) == {}
