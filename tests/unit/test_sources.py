"""Whether a source still holds what was read, by its names, sizes and times, and else by its bytes."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from detrojan.datasets.image_folder import ImageFolder
from detrojan.study.schema import Dataset
from detrojan.workflow import sources
from detrojan.workflow.sources import Read, content, stamp
from tests.unit.test_datasets import encoded, noise, save, write_shard


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Images of two classes; results lie in the working folder beside them."""
    monkeypatch.chdir(tmp_path)
    for number, place in enumerate(("train/a", "train/b", "test/a", "test/b")):
        save(tmp_path / "photos" / place / "0.png", np.full((8, 8, 3), number, np.uint8))
    return tmp_path / "photos"


def test_stamp_and_content_see_what_changes(folder):
    def both():
        return stamp([folder]), content([folder])

    first = both()
    (folder / "train/a/.hidden").write_bytes(b"")
    (folder / "train/Thumbs.db").write_bytes(b"x")
    assert both() == first
    # Of the same size, at another time.
    file = folder / "train/a/0.png"
    told = file.stat()
    file.write_bytes(file.read_bytes()[::-1])
    os.utime(file, ns=(told.st_atime_ns, told.st_mtime_ns + 1))
    changed = both()
    assert changed[0] != first[0]
    assert changed[1] != first[1]
    file.rename(folder / "train/b/1.png")
    assert both()[1] != changed[1]


def test_a_moved_folder_has_the_same_stamp_and_a_copy_the_same_content(folder):
    first = stamp([folder]), content([folder])
    moved = folder.rename(folder.with_name("moved"))
    assert (stamp([moved]), content([moved])) == first
    copy = folder.with_name("copy")
    shutil.copytree(moved, copy, copy_function=shutil.copyfile)
    assert stamp([copy]) != first[0]
    assert content([copy]) == first[1]


def test_links_are_followed_but_not_in_circles(folder):
    (folder / "train/c").symlink_to(folder / "test/a")
    (folder / "train/up").symlink_to(folder)
    first = content([folder])
    (folder / "test/a/0.png").write_bytes(b"other")
    assert content([folder]) != first


def read_once(source):
    """Plan and do the job of the data set ``d``; return what it was planned with."""
    identity = Read("d").identity(source)
    with sources.unchanged(source) as card:
        pass
    Path("results/datasets/d").mkdir(parents=True, exist_ok=True)
    Path("results/datasets/d/card.json").write_text(json.dumps(card | {"planned": identity}))
    return identity


def test_the_identity_lasts_as_long_as_the_bytes(folder, monkeypatch):
    source = ImageFolder(path=folder)
    planned = read_once(source)
    assert Read("d").identity(source) == planned
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    assert Read("d").identity(ImageFolder(path=copy)) == planned
    # Both are known now by names, sizes and times.
    monkeypatch.setattr(sources, "content", lambda places: pytest.fail("no byte needs to be read"))
    assert Read("d").identity(source) == Read("d").identity(ImageFolder(path=copy)) == planned
    monkeypatch.undo()
    monkeypatch.chdir(folder.parent)
    save(copy / "train/a/1.png")
    changed = Read("d").identity(ImageFolder(path=copy))
    assert changed != planned
    # As long as its job has not run, what it has read before is what it was.
    assert Read("d").identity(source) == planned
    assert read_once(ImageFolder(path=copy)) == changed
    assert Read("d").identity(ImageFolder(path=copy)) == changed
    assert Read("d").identity(source) == planned  # other bytes than were read, those of before


def test_without_a_card_any_change_counts(folder):
    source = ImageFolder(path=folder)
    planned = read_once(source)
    Path("results/datasets/d/card.json").unlink()
    os.utime(folder / "train/a/0.png")
    assert Read("d").identity(source) != planned


def test_images_that_change_while_they_are_read_are_refused(folder):
    with (
        pytest.raises(ValueError, match="images were changed while they were read"),
        sources.unchanged(ImageFolder(path=folder)),
    ):
        save(folder / "train/a/1.png")


def test_what_counts_of_a_source_is_not_where_it_lies():
    dataset = Dataset(source="huggingface_parquet", image_size=32, path="x", train="a-*")
    assert sources.what(dataset) == {"train": "a-*"}
    assert sources.what(Dataset(source="digits", image_size=32)) == {}


def test_only_shards_count_and_the_files_that_they_name(tmp_path):
    for split in ("train", "test"):
        write_shard(tmp_path / f"{split}.parquet", [0], [encoded(noise(8, 8, 3))])
    source = sources.load(Dataset(source="huggingface_parquet", image_size=32, path=str(tmp_path)))
    before = stamp(source.places())
    (tmp_path / "notes.txt").write_text("of something else")
    assert stamp(source.places()) == before
    write_shard(tmp_path / "test.parquet", [0], [{"bytes": None, "path": "0.png"}])
    before = stamp(source.places())
    save(tmp_path / "0.png")
    assert stamp(source.places()) != before
