"""Files come back as they were written, whole or not at all, and a broken one is named."""

import dataclasses
import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open

from detrojan.errors import FaultError
from detrojan.images import DefenderSample, ImageSet, TriggeredSample
from detrojan.settings import Augmentation
from detrojan.storage import artifacts, records, seals

SCHEMA = pa.schema([pa.field("draw", pa.int32()), pa.field("acc", pa.float64())])
ROWS = [{"draw": 1, "acc": 0.5}, {"draw": 2, "acc": None}]


def write_sealed(table, path):
    """Write a table that was tampered with as a whole one."""
    records.write_table(table, path, table.schema)


def assert_same(first, second):
    assert first.info == second.info
    for name in ("images", "labels", "index", "true_labels"):
        one, other = getattr(first, name), getattr(second, name)
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def refuses(read, path, message):
    """Check that ``read`` refuses ``path`` with a ValueError of one line that names it."""
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text


@pytest.fixture
def sample(toy_images):
    images = toy_images()
    return DefenderSample(images[torch.tensor([7, 2, 0])], images[torch.tensor([5])])


# --- whole -----------------------------------------------------------------------------------------


def write_half(target, error=RuntimeError):
    with records.whole(target) as partial:
        partial.write_text("half")
        raise error


def write_half_a_folder(target):
    with records.whole(target) as partial:
        partial.mkdir()
        (partial / "new").write_text("half")
        raise RuntimeError


def test_whole_renames_a_finished_file(tmp_path):
    target = tmp_path / "new" / "folder" / "file.txt"
    with records.whole(target) as partial:
        partial.write_text("new")
        assert partial.parent == target.parent  # a rename can't cross file systems
        assert not target.exists()
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_whole_leaves_nothing_of_a_crash(tmp_path):
    target = tmp_path / "file.txt"
    with pytest.raises(KeyboardInterrupt):
        write_half(target, KeyboardInterrupt)
    assert list(tmp_path.iterdir()) == []


def test_whole_keeps_the_old_target_until_the_end(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError):
        write_half(target)
    assert target.read_text() == "old"
    with records.whole(target) as partial:
        partial.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_whole_folder(tmp_path):
    target = tmp_path / "weights"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(RuntimeError):
        write_half_a_folder(target)
    assert [file.name for file in target.iterdir()] == ["old"]
    with records.whole(target) as partial:
        partial.mkdir()
        (partial / "new").write_text("new")
    assert [file.name for file in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def died():
    """Return the number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def leave(target, pid, host=None, age=0, folder=False):
    """Leave beside ``target`` what a process was writing ``age`` seconds ago; return its path."""
    left = target.with_name(f".{target.name}.{host or socket.gethostname()}.{pid}.partial")
    left.mkdir() if folder else left.write_text("half")
    os.utime(left, 2 * (time.time() - age,))
    return left


@pytest.mark.parametrize("folder", [False, True])
def test_whole_clears_what_a_killed_job_left(tmp_path, folder):
    target = tmp_path / "file.txt"
    left = leave(target, died(), folder=folder)
    with records.whole(target) as partial:
        assert not left.exists()
        partial.write_text("new")
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_whole_leaves_alone_what_others_write(tmp_path):
    target = tmp_path / "file.txt"
    with subprocess.Popen(["sleep", "60"]) as other:
        theirs = leave(target, other.pid)
        of_another_target = leave(tmp_path / "file", died())
        elsewhere = leave(target, 1, host="a.b-c", age=24 * 3600)
        forgotten = leave(target, 2, host="a.b-c", age=8 * 24 * 3600)
        # The number serves another process by now: this file is older than that.
        anew = leave(target, os.getpid(), age=10**8)
        records.sweep(target)
        other.kill()
    assert theirs.exists()
    assert of_another_target.exists()
    assert elsewhere.exists()
    assert not forgotten.exists()
    assert not anew.exists()


# Writes its number into a file or a folder of files again and again, at the same time as others.
WRITER = """
import sys, time
from pathlib import Path
from detrojan.storage import records
target, number = Path(sys.argv[1]), sys.argv[2]
end = time.monotonic() + 1
while time.monotonic() < end:
    if target.suffix:
        with records.whole(target) as partial:
            partial.write_text(1000 * number)
    else:
        with records.whole_folder(target) as folder:
            for name in "abc":
                (folder / name).write_text(number)
"""


@pytest.mark.parametrize("name", ["file.txt", "folder"])
def test_of_two_writers_the_last_wins_whole(tmp_path, name):
    target = tmp_path / name
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(target), str(n)]) for n in (1, 2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    found = target.read_text() if target.is_file() else "".join(file.read_text() for file in target.iterdir())
    assert found in ([1000 * "1", 1000 * "2"] if target.is_file() else ["111", "222"])
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_a_line_with_the_file_and_what_to_do(tmp_path, number):
    target = tmp_path / "file.txt"
    with pytest.raises(FaultError) as caught:
        write_half(target, OSError(number, os.strerror(number)))
    text = str(caught.value)
    assert text.startswith(f"{target}: {os.strerror(number)}; ")
    assert text.endswith(", and run the workflow again")
    assert list(tmp_path.iterdir()) == []


def test_a_fault_names_the_file_and_not_what_it_is_called_while_it_is_written(tmp_path):
    target = tmp_path / "file.txt"
    with (
        pytest.raises(FaultError, match=r"/file\.txt: Permission denied; "),
        records.whole(target) as partial,
    ):
        raise PermissionError(errno.EACCES, "Permission denied", str(partial / "inside"))
    with pytest.raises(FaultError, match=r"^elsewhere: Permission denied; "), records.whole(target):
        raise PermissionError(errno.EACCES, "Permission denied", "elsewhere")


def test_other_errors_of_the_system_stay_what_they_are(tmp_path):
    with pytest.raises(OSError, match="no fault of the machine") as caught:
        write_half(tmp_path / "file.txt", OSError(errno.EINVAL, "no fault of the machine"))
    assert not isinstance(caught.value, FaultError)


def test_a_limit_on_the_size_of_files_is_met_as_a_full_disk_is(tmp_path, toy_images):
    """As when the disk is full, the library itself fails in the middle of writing."""
    target = tmp_path / "images.parquet"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.raises(FaultError) as caught:
            artifacts.write_images(toy_images(), target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(caught.value).startswith(f"{target}: File too large; ")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def forbidden(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    path = tmp_path / "card.json"
    records.write_card({"a": 1}, path)
    monkeypatch.setattr(Path, "read_bytes", forbidden)  # root may read everything
    with pytest.raises(FaultError, match=r"card\.json: Permission denied; give yourself the right to it"):
        records.read_card(path)


def test_files_follow_the_umask(tmp_path, toy_images):
    before = os.umask(0o027)
    try:
        artifacts.write_tensors({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
        artifacts.write_images(toy_images(), tmp_path / "a.parquet")
        records.write_card({}, tmp_path / "a.json")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o640}


@pytest.mark.parametrize(
    "write",
    [
        artifacts.write_images,
        artifacts.write_poisoned,
        lambda images, path: artifacts.write_samples({0: DefenderSample(images, images)}, path),
        lambda images, path: records.write_rows(ROWS, path, SCHEMA),
        lambda images, path: artifacts.write_tensors({"images": images.images}, path),
        lambda images, path: records.write_card({"count": len(images)}, path),
    ],
    ids=["images", "poisoned", "samples", "rows", "tensors", "card"],
)
def test_every_write_is_whole(tmp_path, toy_images, monkeypatch, write):
    def full_disk(partial):
        assert partial.stat().st_size  # all but the checksum is there
        raise OSError("no space left on device")

    target = tmp_path / "artifact"
    target.write_text("old")
    monkeypatch.setattr(seals, "seal", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write(toy_images(), target)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


# --- tables and cards ------------------------------------------------------------------------------


def test_rows_come_back(tmp_path):
    path = tmp_path / "rows.parquet"
    records.write_rows(ROWS, path, SCHEMA)
    assert records.read_table(path, SCHEMA).to_pylist() == ROWS


def test_no_rows_come_back(tmp_path):
    path = tmp_path / "rows.parquet"
    records.write_rows([], path, SCHEMA)
    table = records.read_table(path, SCHEMA)
    assert (table.num_rows, table.schema) == (0, SCHEMA)


@pytest.mark.parametrize("row", [{"draw": 1}, {"draw": 1, "acc": 0.5, "asr": 0.1}])
def test_rows_have_every_column_and_no_other(tmp_path, row):
    with pytest.raises(AssertionError):
        records.write_rows([row], tmp_path / "rows.parquet", SCHEMA)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("schema", "differing"),
    [
        (pa.schema([SCHEMA.field("draw")]), r"\(acc: double\)"),
        (pa.schema([*SCHEMA, pa.field("asr", pa.float64())]), r"\(asr: double\)"),
        (pa.schema([pa.field("draw", pa.int64()), SCHEMA.field("acc")]), r"\(draw: int32, draw: int64\)"),
        (pa.schema([SCHEMA.field("draw").with_nullable(False), SCHEMA.field("acc")]), "int32 not null"),
        (pa.schema([SCHEMA.field("acc"), SCHEMA.field("draw")]), "another order"),
    ],
)
def test_table_of_another_schema(tmp_path, schema, differing):
    path = tmp_path / "rows.parquet"
    records.write_rows(ROWS, path, SCHEMA)
    refuses(lambda path: records.read_table(path, schema), path, differing)


def test_missing_files(tmp_path):
    for read in (records.read_table, artifacts.read_images, artifacts.read_samples):
        refuses(read, tmp_path / "none.parquet", "no such Parquet table; run the workflow again")
    refuses(records.read_card, tmp_path / "none.json", "no such card")
    refuses(artifacts.read_tensors, tmp_path / "none.safetensors", "no such safetensors file")


@pytest.mark.parametrize("kept", [0, 4, 200, -1])
def test_truncated_table(tmp_path, toy_images, kept):
    path = tmp_path / "train.parquet"
    artifacts.write_images(toy_images(), path)
    path.write_bytes(path.read_bytes()[:kept])
    for read in (records.read_table, artifacts.read_images, artifacts.read_samples):
        refuses(read, path, "not a whole Parquet table")


def test_cards_come_back(tmp_path):
    path = tmp_path / "card.json"
    card = {"psnr": None, "ratio": 0.1, "classes": ["a", "ü"]}
    records.write_card(card, path)
    assert records.read_card(path) == card
    path.write_text(path.read_text()[:-5])
    refuses(records.read_card, path, "not a whole card")


def test_a_card_that_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        records.write_card({"psnr": float("nan")}, tmp_path / "card.json")
    assert list(tmp_path.iterdir()) == []


# --- images ----------------------------------------------------------------------------------------


def test_images_come_back(tmp_path, toy_images):
    images = toy_images(augmentation=Augmentation(crop_padding=2, flip=True))
    artifacts.write_images(images, tmp_path / "train.parquet")
    assert_same(artifacts.read_images(tmp_path / "train.parquet"), images)


def test_image_table_is_the_documented_one(tmp_path, toy_images):
    images = toy_images()
    artifacts.write_images(images, tmp_path / "train.parquet")
    table = pq.read_table(tmp_path / "train.parquet")
    expected = [("index", pa.int32()), ("image", pa.binary(192)), ("label", pa.int16())]
    assert [(field.name, field.type) for field in table.schema] == expected
    # Rows, columns, then red, green, blue.
    pixels = np.frombuffer(table["image"][3].as_py(), np.uint8).reshape(8, 8, 3)
    assert pixels[2, 5].tolist() == images.images[3, :, 2, 5].tolist()


def test_images_that_do_not_lie_in_order_come_back(tmp_path, toy_images):
    images = toy_images()
    channels_last = images.images.contiguous(memory_format=torch.channels_last)
    artifacts.write_images(dataclasses.replace(images, images=channels_last), tmp_path / "a.parquet")
    assert_same(artifacts.read_images(tmp_path / "a.parquet"), images)


def test_row_groups_are_put_together(tmp_path, toy_images):
    images = toy_images()
    artifacts.write_images(images, tmp_path / "a.parquet")
    table = records.read_table(tmp_path / "a.parquet")
    with records.table_writer(tmp_path / "a.parquet", table.schema) as writer:
        writer.write_table(table, row_group_size=5)
    assert_same(artifacts.read_images(tmp_path / "a.parquet"), images)


def test_poisoned_rows_come_back_with_their_true_labels(tmp_path, toy_images):
    images = toy_images()
    rows = ImageSet(images.images, torch.ones_like(images.labels), images.index, images.info, images.labels)
    artifacts.write_poisoned(rows, tmp_path / "train.parquet")
    read = artifacts.read_images(tmp_path / "train.parquet")
    assert_same(read, rows)
    assert read.labels.tolist() != read.true_labels.tolist()


def test_no_images_come_back(tmp_path, toy_images):
    nothing = toy_images()[torch.tensor([], dtype=torch.int64)]
    artifacts.write_images(nothing, tmp_path / "clean.parquet")
    assert_same(artifacts.read_images(tmp_path / "clean.parquet"), nothing)
    artifacts.write_poisoned(nothing, tmp_path / "poisoned.parquet")
    assert_same(artifacts.read_images(tmp_path / "poisoned.parquet"), nothing)


def test_images_of_another_size_than_the_table_says(tmp_path, toy_images):
    path = tmp_path / "train.parquet"
    artifacts.write_images(toy_images(side=8), path)
    table = records.read_table(path)
    card = json.loads(table.schema.metadata[b"detrojan"]) | {"height": 9}
    write_sealed(table.replace_schema_metadata({"detrojan": json.dumps(card)}), path)
    refuses(artifacts.read_images, path, r"fixed_size_binary\[192\], but 9×8 RGB is 216 bytes")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "detrojan"),
        ({"detrojan": "{"}, "not a whole image table"),
        ({"detrojan": "{}"}, "augmentation"),
        ({"detrojan": '{"augmentation": {}}'}, "height"),
        ({"detrojan": '{"augmentation": {"rotation": 3}}'}, "rotation"),
    ],
)
def test_images_without_their_metadata(tmp_path, toy_images, metadata, message):
    path = tmp_path / "train.parquet"
    artifacts.write_images(toy_images(), path)
    write_sealed(records.read_table(path).replace_schema_metadata(metadata), path)
    refuses(artifacts.read_images, path, message)


@pytest.mark.parametrize("column", ["index", "image", "label"])
def test_images_without_a_column(tmp_path, toy_images, column):
    path = tmp_path / "train.parquet"
    artifacts.write_images(toy_images(), path)
    write_sealed(records.read_table(path).drop_columns([column]), path)
    refuses(artifacts.read_images, path, column)


def test_images_with_a_label_out_of_range(tmp_path, toy_images):
    path = tmp_path / "train.parquet"
    artifacts.write_images(toy_images(), path)
    table = records.read_table(path)
    labels = pa.array([4] * 12, pa.int16())
    write_sealed(table.set_column(2, "label", labels), path)
    refuses(artifacts.read_images, path, "labels run from 4 to 4, but the 4 classes are 0 to 3")


# --- samples ---------------------------------------------------------------------------------------


def stamped_copies(sample):
    return TriggeredSample(
        *(dataclasses.replace(part, images=255 - part.images) for part in (sample.train, sample.validation))
    )


def test_samples_come_back(tmp_path, toy_images, sample):
    other = DefenderSample(toy_images()[torch.tensor([1])], toy_images()[torch.tensor([0])])
    artifacts.write_samples({4: sample, 2: other}, tmp_path / "samples.parquet")
    read = artifacts.read_samples(tmp_path / "samples.parquet")
    assert set(read) == {2, 4}
    for draw, expected in ((2, other), (4, sample)):
        assert_same(read[draw].train, expected.train)
        assert_same(read[draw].validation, expected.validation)
        assert read[draw].triggered is None
        assert read[draw].chosen == {}


def test_sample_without_validation_comes_back(tmp_path, sample, toy_images):
    nothing = toy_images()[torch.tensor([], dtype=torch.int64)]
    artifacts.write_samples({0: DefenderSample(sample.train, nothing)}, tmp_path / "samples.parquet")
    (read,) = artifacts.read_samples(tmp_path / "samples.parquet").values()
    assert_same(read.train, sample.train)
    assert_same(read.validation, nothing)


def test_stamped_samples_come_back(tmp_path, sample):
    clean, stamped = tmp_path / "samples.parquet", tmp_path / "stamped.parquet"
    copies = stamped_copies(sample)
    artifacts.write_samples({0: sample}, clean)
    artifacts.write_stamped({0: copies}, stamped)
    read = artifacts.read_samples(clean, stamped)[0]
    assert_same(read.train, sample.train)
    assert_same(read.triggered.train, copies.train)
    assert_same(read.triggered.validation, copies.validation)


@pytest.mark.parametrize("fault", ["another draw", "another order", "another split"])
def test_stamped_samples_of_other_images(tmp_path, sample, fault):
    clean, stamped = tmp_path / "samples.parquet", tmp_path / "stamped.parquet"
    copies = stamped_copies(sample)
    if fault == "another order":
        copies = TriggeredSample(copies.train[torch.tensor([1, 0, 2])], copies.validation)
    if fault == "another split":
        copies = TriggeredSample(copies.validation, copies.train)
    artifacts.write_samples({0: sample}, clean)
    artifacts.write_stamped({1 if fault == "another draw" else 0: copies}, stamped)
    refuses(
        lambda path: artifacts.read_samples(clean, path),
        stamped,
        r"not the copies of .*samples.parquet \(draw 0\)",
    )


def test_images_are_no_sample(tmp_path, toy_images):
    artifacts.write_images(toy_images(), tmp_path / "train.parquet")
    refuses(artifacts.read_samples, tmp_path / "train.parquet", "draw")


# --- tensors ---------------------------------------------------------------------------------------


def test_tensors_come_back(tmp_path):
    path = tmp_path / "trigger.safetensors"
    tensors = {
        "pattern": torch.arange(24, dtype=torch.uint8).view(2, 3, 4).permute(2, 0, 1),
        "mask": torch.tensor([True, False]),
        "signal": torch.tensor([0.1, -2.5], requires_grad=True),
        "none": torch.empty(0, 3),
    }
    artifacts.write_tensors(tensors, path, seed=3, names=["a", "b"])
    read, metadata = artifacts.read_tensors(path)
    assert metadata == {"seed": 3, "names": ["a", "b"]}
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value)


def test_tensors_are_aligned_as_torch_aligns_its_own(tmp_path):
    """On some processors the last bits of a convolution depend on where its weights start."""
    path = tmp_path / "model.safetensors"
    artifacts.write_tensors({f"weight {size}": torch.rand(size) for size in range(1, 12)}, path)
    read, _ = artifacts.read_tensors(path)
    assert {value.data_ptr() % 64 for value in read.values()} == {0}


def test_equal_tensors_are_equal_files(tmp_path):
    path, written = tmp_path / "model.safetensors", set()
    for _ in range(5):
        tensors = {"wide": torch.ones(3, dtype=torch.float64), "narrow": torch.ones(5, dtype=torch.uint8)}
        artifacts.write_tensors(tensors, path, a=1, b="ü", c=[3], d=4, e=5)
        written.add(path.read_bytes())
    assert len(written) == 1
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["b"]) == "ü"
        assert torch.equal(file.get_tensor("narrow"), tensors["narrow"])


def test_no_tensors_come_back(tmp_path):
    artifacts.write_tensors({}, tmp_path / "trigger.safetensors")
    assert artifacts.read_tensors(tmp_path / "trigger.safetensors") == ({}, {})
