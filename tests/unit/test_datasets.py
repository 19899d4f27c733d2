"""Data sources: right pixels, labels and counts on made data; a clear error for whatever is broken."""

import io
import json
import os
import pickle
import struct
import sys
import types
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps
from pydantic import Field

from detrojan.datasets import torchvision_folder
from detrojan.datasets.base import (
    BrokenImageError,
    RawImages,
    Source,
    decode,
    decode_all,
    resize_all,
    selected,
    selected_counts,
    split_counts,
)
from detrojan.datasets.digits import Digits
from detrojan.datasets.huggingface_parquet import HuggingFaceParquet
from detrojan.datasets.image_folder import ImageFolder
from detrojan.datasets.torchvision_folder import TorchvisionFolder
from detrojan.settings import NO_AUGMENTATION
from detrojan.stages import ingest

SHARED = Path(__file__).parents[3] / "shared" / "data"


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(array, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def save(path, array=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(8, 8, 3) if array is None else array).save(path)


# --- decoding --------------------------------------------------------------------------------------


def test_all_broken_images_are_named_at_once(tmp_path):
    contents = [(f"{row}.png", PNG[:99] if row % 2 else PNG) for row in range(30)]
    with pytest.raises(BrokenImageError, match=r"^15 images can't be read: 1\.png: no ") as raised:
        decode_all(contents, 30, 8)
    said = str(raised.value)
    assert "; 19.png: no " in said
    assert "21.png" not in said
    assert said.endswith("; and 5 more; replace or remove them")
    for place in ("train/a", "train/b", "test/a", "test/b"):
        for row in range(2):
            save(tmp_path / place / f"{row}.png")
        (tmp_path / place / "2.png").write_bytes(b"")
    # Of both splits.
    with pytest.raises(BrokenImageError, match=r"^4 images .*/train/a/2\.png.*/test/b/2\.png: .*replace"):
        build(ImageFolder(path=tmp_path))


def test_a_pipe_in_place_of_an_image_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ValueError, match="no regular file"):
        decode("x", tmp_path / "x.png")


def test_paths_may_begin_at_home_or_in_a_variable(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("PHOTOS", folder.name)
    for path in (f"~/{folder.name}", "$HOME/$PHOTOS", "${HOME}/${PHOTOS}"):
        assert ImageFolder(path=path).counts("test") == {0: 1, 1: 1}
    with pytest.raises(ValueError, match=r"the environment has no \$NOWHERE; set it"):
        ImageFolder(path="$NOWHERE/photos")


def test_lossless_images_keep_their_pixels_and_order():
    pixels = noise(5, 8, 8, 3)
    contents = [(str(row), encoded(image)) for row, image in enumerate(pixels)]
    assert np.array_equal(decode_all(iter(contents), 5, 8), pixels)


def test_resize_is_pillows_antialiased_bilinear():
    image = noise(20, 30, 3)
    expected = np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling.BILINEAR))
    assert np.array_equal(decode_all([("x", encoded(image))], 1, 8)[0], expected)
    assert np.array_equal(resize_all(image[np.newaxis], 8)[0], expected)
    # Single-pixel stripes become grey: sampling without a filter would keep 0 or 255.
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2] = 255
    assert 100 < resize_all(stripes[np.newaxis], 8)[0, 4, 4, 0] < 155


def rgba():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[..., 0], pixels[0, :, 3] = 255, 255  # red above, transparent red below
    return encoded(pixels)


def palette():
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def animation():
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("blue", "red")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def cmyk():
    buffer = io.BytesIO()
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(buffer, "TIFF")
    return buffer.getvalue()


def with_exif(image, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def png(depth, rows, **chunks):
    """A grey PNG of ``rows``, big-endian; Pillow itself writes none with 16 bits and transparency."""
    parts = {
        "IHDR": struct.pack(">IIBBBBB", *rows.shape[::-1], depth, 0, 0, 0, 0),
        **chunks,
        "IDAT": zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)),
        "IEND": b"",
    }
    framed = (
        struct.pack(">I", len(data))
        + kind.encode()
        + data
        + struct.pack(">I", zlib.crc32(kind.encode() + data))
        for kind, data in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def grey_and_transparent():
    return png(16, np.array([[0x4000, 0x4000], [0xC000, 0xC000]], ">u2"), tRNS=b"\xc0\x00")


def white_icon():
    """A white bar on transparent."""
    pixels = np.full((4, 4, 4), 255, np.uint8)
    pixels[:2, :, 3] = 0
    return encoded(pixels)


@pytest.mark.parametrize(
    ("content", "top", "bottom"),
    [
        (encoded(np.full((2, 2), 77, np.uint8)), (77,) * 3, (77,) * 3),
        (encoded(np.full((2, 2), True)), (255,) * 3, (255,) * 3),
        (encoded(np.full((2, 2), 0x4DFF, np.uint16)), (0x4D,) * 3, (0x4D,) * 3),
        (grey_and_transparent(), (0x40,) * 3, (255,) * 3),
        (b"P5 2 2 65535\n" + b"\x40\x00" * 4, (0x40,) * 3, (0x40,) * 3),
        (b"P5 2 2 4095\n" + b"\x08\x00" * 4, (0x80,) * 3, (0x80,) * 3),
        (rgba(), (255, 0, 0), (255, 255, 255)),
        (palette(), (10, 20, 30), (10, 20, 30)),
        (cmyk(), (255, 0, 0), (255, 0, 0)),
        (animation(), (0, 0, 255), (0, 0, 255)),
    ],
    ids=[
        "grey",
        "1 bit",
        "16 bits",
        "16 bits, transparent",
        "PGM",
        "12 bits",
        "alpha",
        "palette",
        "cmyk",
        "animation",
    ],
)
def test_every_kind_of_pixel_becomes_rgb(content, top, bottom):
    image = decode("x", content)
    assert (image.mode, image.getpixel((0, 0)), image.getpixel((0, 1))) == ("RGB", top, bottom)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_or_left_in_every_format_alike(kind, orientation):
    upright = Image.fromarray(noise(2, 4, 3))
    stored = ImageOps.exif_transpose(Image.open(io.BytesIO(with_exif(upright, orientation, "PNG"))))
    content = with_exif(upright, orientation, kind)
    assert np.array_equal(decode("x", content), stored)
    assert np.array_equal(decode("x", content, "stored"), upright)


def test_photos_of_a_phone_are_turned_where_the_study_does_not_forbid_it(tmp_path):
    """The same scene, held upright and sideways, is the same image; as JPEG or TIFF."""
    scene = np.zeros((16, 24, 3), np.uint8)
    scene[:8] = 60, 120, 250
    scene = Image.fromarray(scene)
    sideways = scene.transpose(Image.Transpose.ROTATE_90)
    photos = {"a.jpg": (scene, 1, "JPEG"), "b.jpg": (sideways, 6, "JPEG"), "c.tif": (sideways, 6, "TIFF")}
    for place in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (tmp_path / place).mkdir(parents=True)
        for name, photo in photos.items():
            (tmp_path / place / name).write_bytes(with_exif(*photo))
    applied = ImageFolder(path=tmp_path).read("train", 8).images.astype(int)
    assert abs(applied[:3] - applied[0]).max() < 20  # JPEG's loss
    stored = ImageFolder(path=tmp_path, orientation="stored").read("train", 8).images.astype(int)
    assert abs(stored[1] - stored[2]).max() < 20
    assert abs(stored[1] - stored[0]).max() > 100


def test_broken_exif_leaves_an_image_as_it_lies():
    content = with_exif(Image.fromarray(noise(2, 4, 3)), 6, "JPEG")
    assert decode("x", content.replace(b"Exif\0\0MM", b"Exif\0\0MX")).size == (4, 2)


def flipped_bit(content):
    middle = content.index(b"IDAT") + 20
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


JPEG = encoded(noise(32, 32, 3), "JPEG")
PNG = encoded(noise(32, 32, 3))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "an empty file"),
        (b"no image at all", "an unknown format"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (PNG[: len(PNG) // 2], "Truncated|truncated|broken"),
        (flipped_bit(PNG), "broken|CRC|checksum"),
        (encoded(np.ones((2, 2), np.float32), "TIFF"), "floating-point"),
        (encoded(np.full((2, 2), 1 << 20, np.int32), "TIFF"), "32-bit grey levels"),
        (encoded(np.full((2, 2), 200, np.int32), "TIFF"), "32-bit grey levels"),
        (white_icon(), "white on transparent"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "an unknown format"),
        (Path("/nowhere/x.png"), "No such file"),
    ],
    ids=[
        "empty",
        "text",
        "cut JPEG",
        "cut PNG",
        "flipped bit",
        "float",
        "32 bits",
        "few of 32 bits",
        "white",
        "EPS",
        "missing",
    ],
)
def test_broken_image_is_named(content, reason):
    with pytest.raises(ValueError, match=rf"folder/x\.png: no .*image \(.*({reason})"):
        decode_all([("folder/x.png", content)], 1, 8)


# --- counts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "held_out", "per_class", "reserved"),
    [
        (100, 0, None, 0),
        (100, 0.05, None, 5),
        (50, 0.05, None, 2),  # 2.5, and 3.5 below: half to even
        (70, 0.05, None, 4),
        (3, 0.01, None, 1),
        (100, 0.05, 40, 2),
        (30, 0.1, 40, 3),
    ],
)
def test_split_counts(number, held_out, per_class, reserved):
    train, pool = split_counts(Counter({0: number}), held_out, per_class)
    assert pool == {0: reserved}
    assert train == {0: min(number, per_class or number) - reserved}


def test_split_counts_leaves_a_training_image():
    with pytest.raises(ValueError, match=r"class 1 has 1 training images.*lower held_out"):
        split_counts(Counter({0: 9, 1: 1}), 0.1, None)


# --- digits ----------------------------------------------------------------------------------------


def test_digits():
    from sklearn.datasets import load_digits

    bundled = load_digits()
    source = Digits()
    train, test = source.read("train", 8), source.read("test", 8)
    assert (len(train.labels), len(test.labels)) == (1442, 355)
    assert Counter(train.labels.tolist()) == source.counts("train")
    assert Counter(test.labels.tolist()) == source.counts("test")
    threes = np.flatnonzero(bundled.target == 3)
    fifth = np.rint(bundled.images[threes[4]] / 16 * 255)
    assert np.array_equal(test.images[test.labels == 3][0], np.stack([fifth] * 3, axis=-1))
    assert np.array_equal(
        train.images[train.labels == 3][4, ..., 1], np.rint(bundled.images[threes[5]] / 16 * 255)
    )
    assert source.read("test", 16).images.shape == (355, 16, 16, 3)


# --- image folders ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Two classes, three training images and one test image each."""
    for split, number in (("train", 3), ("test", 1)):
        for label, name in enumerate(("cat", "dog")):
            for row in range(number):
                save(tmp_path / split / name / f"{row}.png", np.full((8, 8, 3), 100 * label + row, np.uint8))
    return tmp_path


def test_image_folder(folder):
    (folder / "train/cat/.hidden.png").write_bytes(b"")
    (folder / "train/cat/Thumbs.db").write_bytes(b"")
    (folder / "train/dog/readme.txt").write_text("no image")
    (folder / "train/.cache").mkdir()
    save(folder / "train/dog/3.JPG", np.full((8, 8), 200, np.uint8))
    source = ImageFolder(path=folder)
    raw = source.read("train", 8)
    assert raw.classes == source.read("test", 8).classes == ("cat", "dog")
    assert raw.images[:, 3, 3, 1].tolist() == [0, 1, 2, 100, 101, 102, 200]
    assert raw.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert (source.counts("train"), source.counts("test")) == (Counter({0: 3, 1: 4}), Counter({0: 1, 1: 1}))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            lambda f: [file.unlink() for file in (f / "train/cat").iterdir()],
            r"train/cat: a class folder without",
        ),
        (lambda f: (f / "train/cat/more").mkdir(), r"train/cat/more: a folder inside a class folder"),
        (lambda f: (f / "train/emu").mkdir(), r"test/emu: no such class folder, but train has one"),
        (lambda f: save(f / "test/emu/0.png"), r"train/emu: no such class folder, but test has one"),
        (lambda f: (f / "test").rename(f / "tset"), r"test: no such folder; path must name"),
        (lambda f: (f / "train/cat/0.png").write_bytes(PNG[:99]), r"train/cat/0\.png: no .*image"),
        (lambda f: (f / "train/cat/x.png").mkdir(), r"train/cat/x\.png: a folder inside a class folder"),
        (lambda f: os.mkfifo(f / "train/cat/x.png"), r"train/cat/x\.png: no regular file"),
        (
            lambda f: (f / "train/emu").symlink_to("/mnt/gone/emu"),
            r"train/emu: a link that leads nowhere, to /mnt/gone/emu",
        ),
        (lambda f: (f / "test/dog/x.png").symlink_to("gone.png"), r"dog/x\.png: a link that leads nowhere"),
        (
            lambda f: [(f / f"train/dog/{row}.HEIC").write_bytes(b"heic") for row in range(4)],
            r"train/dog: 3 images, but 4 files of no format that is read, as 0\.HEIC",
        ),
    ],
)
def test_image_folder_refuses(folder, broken, message):
    broken(folder)
    with pytest.raises(ValueError, match=message):
        build(ImageFolder(path=folder))


@pytest.mark.parametrize("wrong", ["empty", "HEIC", "a broken link"])
def test_a_class_that_the_study_leaves_out_needs_no_images(folder, wrong):
    source = ImageFolder(path=folder)
    for split in ("train", "test"):
        (folder / split / "bat").mkdir()
        if wrong == "HEIC":
            (folder / split / "bat/0.HEIC").write_bytes(b"heic")
        if wrong == "a broken link":
            save(folder / split / "bat/0.png", np.full((8, 8, 3), 50, np.uint8))
            (folder / split / "bat/1.png").symlink_to("gone.png")
    assert not [line for line in source.remarks() if "no test image" in line]
    train, _, test = build(source, classes=["cat", 2], overlap="allowed")
    assert train.info.classes == ("cat", "dog")
    assert (train.labels.tolist().count(1), test.labels.tolist()) == (2, [0, 1])
    with pytest.raises(ValueError, match=r"^2 problems: .*train/bat.*; .*test/bat"):
        build(source, classes=["bat", "dog"])
    with pytest.raises(ValueError, match=r"^2 problems: .*train/bat.*; .*test/bat"):
        build(source)


def test_all_that_is_wrong_with_a_folder_is_named_at_once(folder):
    for row in range(12):
        (folder / f"train/cat/{row:02}.png").symlink_to("gone.png")
    os.mkfifo(folder / "train/dog/x.png")
    with pytest.raises(ValueError, match=r"^13 problems: .*cat/00\.png: a link .*/09\.png.*; and 3 more$"):
        ImageFolder(path=folder).check_classes(None)


def test_image_folder_tells_what_it_leaves_out(folder):
    assert ImageFolder(path=folder).remarks() == []
    for name in (".DS_Store", "train/Thumbs.db", "train/cat/desktop.ini", "test/cat/.0.jpg"):
        (folder / name).write_bytes(b"")
    (folder / "train/cat/@eaDir").mkdir()
    assert ImageFolder(path=folder).remarks() == []
    for name in ("train/cat/a.HEIC", "train/dog/a", "test/dog/0.jpg~", "train/dog/0.jpg.part", "train/x.jpg"):
        (folder / name).write_bytes(b"")
    where = {
        name: str(folder / name)
        for name in ("train/x.jpg", "train/cat/a.HEIC", "train/dog/0.jpg.part", "train/dog/a")
    }
    first = ", ".join(where[name] for name in ("train/cat/a.HEIC", "train/dog/0.jpg.part", "train/dog/a"))
    assert ImageFolder(path=folder).remarks() == [
        f"left out, in no class folder: 1 file: {where['train/x.jpg']}",
        f"left out, of no image format that is read: 4 files: {first}, ...",
    ]


def test_folders_of_other_names_are_pointed_at(folder):
    (folder / "test").rename(folder / "val")
    with pytest.raises(ValueError, match=r"test: no such folder; val/ lies there: .*ln -s val .*/test\)"):
        ImageFolder(path=folder).counts("train")
    (folder / "train").rename(folder / "Train")
    with pytest.raises(ValueError, match=r"train: no such folder; Train/ lies there"):
        ImageFolder(path=folder).counts("train")


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        ([str(n) for n in range(12)], [str(n) for n in range(12)]),
        (["00001", "00010", "2"], ["00001", "2", "00010"]),
        (["10", "9", "cat"], ["10", "9", "cat"]),
    ],
)
def test_class_folders_that_are_numbers_are_numbered_as_numbers(tmp_path, names, ordered):
    for number, name in enumerate(ordered):
        for split in ("train", "test"):
            save(tmp_path / split / name / "0.png", np.full((8, 8, 3), number, np.uint8))
    source = ImageFolder(path=tmp_path)
    raw = source.read("train", 8)
    assert raw.classes == source.class_names() == tuple(ordered)
    assert raw.images[:, 0, 0, 0].tolist() == raw.labels.tolist() == list(range(len(names)))


def test_a_link_that_makes_a_training_folder_the_test_folder_is_refused(folder):
    (folder / "test/dog/0.png").unlink()
    (folder / "test/dog").rmdir()
    (folder / "test/dog").symlink_to(folder / "train/dog")
    with pytest.raises(ValueError, match=r"test/dog: the same folder as .*train/dog"):
        ImageFolder(path=folder).counts("train")


# --- Parquet ---------------------------------------------------------------------------------------


def write_shard(path, labels, images=None, *, names=None, label="label", image="image"):
    """Write a shard; ``images`` holds values for the image column, by default PNG of a solid colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if images is None:
        images = [
            {"bytes": encoded(np.full((8, 8, 3), 9 * n, np.uint8)), "path": None} for n in range(len(labels))
        ]
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    kind = struct if any(isinstance(value, dict) for value in images) else None
    table = pa.table({image: pa.array(images, kind), label: pa.array(labels)})
    if names:
        features = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path, row_group_size=2)


@pytest.mark.parametrize("inner", ["", "data"])
@pytest.mark.parametrize("names", [None, ["cat", "dog"]])
def test_parquet_shards(tmp_path, inner, names):
    write_shard(tmp_path / inner / "train-00000-of-00002.parquet", [0, 1, 1], names=names)
    write_shard(tmp_path / inner / "train-00001-of-00002.parquet", [0], names=names)
    write_shard(tmp_path / inner / "test.parquet", [1, 0], names=names)
    source = HuggingFaceParquet(path=tmp_path)
    raw = source.read("train", 8)
    assert raw.images[:, 0, 0, 2].tolist() == [0, 9, 18, 0]
    assert raw.labels.tolist() == [0, 1, 1, 0]
    assert raw.classes == source.read("test", 8).classes == tuple(names or ("0", "1"))
    assert (source.counts("train"), source.counts("test")) == (Counter({0: 2, 1: 2}), Counter({0: 1, 1: 1}))


def test_parquet_of_other_names(tmp_path):
    pixels = noise(8, 8, 3)
    write_shard(tmp_path / "a/train-0.parquet", [0], [encoded(pixels)], label="fine", image="img")
    write_shard(tmp_path / "a/valid-0.parquet", [0], [encoded(pixels)], label="fine", image="img")
    source = HuggingFaceParquet(path=tmp_path, train="a/train-*", test="a/valid-*", label_column="fine")
    assert np.array_equal(source.read("test", 8).images[0], pixels)


def test_parquet_of_paths(tmp_path):
    pixels = noise(8, 8, 3)
    save(tmp_path / "images/0.png", pixels)
    for split in ("train", "test"):
        write_shard(tmp_path / f"{split}.parquet", [0], [{"bytes": None, "path": "images/0.png"}])
    source = HuggingFaceParquet(path=tmp_path)
    assert np.array_equal(source.read("train", 8).images[0], pixels)
    (tmp_path / "images/0.png").unlink()
    with pytest.raises(
        ValueError, match=r"train\.parquet, row 0 \(.*0\.png\): no whole image \(No such file"
    ):
        source.read("train", 8)


IN_ROW = pa.list_(pa.list_(pa.list_(pa.uint8(), 3), 6), 4)  # of one size, as tensors are


@pytest.mark.parametrize("kind", [None, IN_ROW], ids=["int64 lists", "fixed-size lists"])
def test_parquet_of_arrays(tmp_path, kind):
    images = [noise(4, 6, 3, seed=seed) for seed in range(3)]
    for split in ("train", "test"):
        values = pa.array([image.tolist() for image in images], kind)
        write_shard(tmp_path / f"{split}.parquet", [0, 1, 0], values)
    raw = HuggingFaceParquet(path=tmp_path).read("train", 6)
    resized = [Image.fromarray(image).resize((6, 6), Image.Resampling.BILINEAR) for image in images]
    assert np.array_equal(raw.images, np.stack([np.asarray(image) for image in resized]))
    assert raw.labels.tolist() == [0, 1, 0]
    assert raw.found.sizes == {(6, 4): 3}


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        (noise(3, 8, 8), lambda levels: levels.transpose(1, 2, 0)),  # channels first, as torch has them
        (noise(1, 8, 8), lambda levels: np.repeat(levels.transpose(1, 2, 0), 3, axis=2)),
        (noise(8, 8, 1), lambda levels: np.repeat(levels, 3, axis=2)),
        (noise(8, 8), lambda levels: np.repeat(levels[:, :, None], 3, axis=2)),
    ],
    ids=["3xHxW", "1xHxW", "HxWx1", "HxW"],
)
def test_parquet_of_arrays_in_other_orders(tmp_path, value, seen):
    for split in ("train", "test"):
        write_shard(tmp_path / f"{split}.parquet", [0], [value.tolist()])
    raw = HuggingFaceParquet(path=tmp_path).read("test", 8)
    assert np.array_equal(raw.images[0], seen(value))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((3, 8, 3), int), r"3 x 8 x 3 numbers, of which the channels may be the first or the last"),
        (np.zeros((8, 8, 4), int), r"8 x 8 x 4 numbers, of which neither end is 1 or 3 channels"),
        (np.full((8, 8, 3), 256), r"levels from 256 to 256, but they must lie in 0 to 255"),
        (np.full((8, 8, 3), -1), r"levels from -1 to -1"),
        ([[[1, 2, 3]], [[4, 5]]], r"no image \(its lists are empty, or of several lengths\)"),
        ([[[1, None, 3]]], r"no image \(there is a null in it\)"),
        (None, r"no image \(there is a null in it\)"),
        ([], r"no image \(its lists are empty"),
    ],
)
def test_parquet_of_arrays_refuses(tmp_path, value, message):
    good = noise(8, 8, 3).tolist()
    value = value.tolist() if isinstance(value, np.ndarray) else value
    for split in ("train", "test"):
        write_shard(tmp_path / f"{split}.parquet", [0, 1], [good, value])
    with pytest.raises(BrokenImageError, match=rf"train\.parquet, row 1: {message}"):
        HuggingFaceParquet(path=tmp_path).read("train", 8)


def test_parquet_of_arrays_beside_files_is_refused(tmp_path):
    write_shard(tmp_path / "train-0.parquet", [0], [noise(8, 8, 3).tolist()])
    for name in ("train-1", "test"):
        write_shard(tmp_path / f"{name}.parquet", [0])
    with pytest.raises(ValueError, match=r"train-1\.parquet: its image column is not of the kind of train-0"):
        HuggingFaceParquet(path=tmp_path).read("train", 8)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


def good():
    return {"bytes": encoded(noise(8, 8, 3)), "path": None}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda f: write_shard(f, [0, None, 1]), r"row 1: its label is null"),
        (lambda f: write_shard(f, [0, 1, -1]), r"row 2: label -1, but labels start at 0"),
        (lambda f: write_shard(f, [0, 10**9, 2]), r"labels up to 1000000000, but only 3 training images"),
        (lambda f: write_shard(f, ["a", "b"]), r"column label is string, but labels must be integers"),
        (lambda f: write_shard(f, [0, 1], label="y"), r"no column label; it has image, y"),
        (lambda f: write_shard(f, [0, 1], image="x"), r"no column image or img; it has x, label"),
        (lambda f: write_shard(f, [0, 1], ["a", "b"]), r"column image is string, but must be binary"),
        (
            lambda f: write_shard(f, [0, 1], [[[0.5]], [[0.5]]]),
            r"image is list.*double.*, but must be binary",
        ),
        (lambda f: write_shard(f, [0, 1], [[1, 2], [3]]), r"image is list.*, but must be binary"),
        (lambda f: write_shard(f, [0, 1], [good(), None]), r"row 1: its image is null"),
        (lambda f: write_shard(f, [0, 1], [good(), {}]), r"row 1: its image is null"),
        (
            lambda f: write_shard(f, [0, 1, 0], [good(), good(), {"bytes": PNG[:99]}]),
            r"row 2: no whole image",
        ),
        (lambda f: write_shard(f, [0, 1], names=["cat", "dog"]), r"its class names \(none\) are not those"),
        (truncate, r"not a whole Parquet file"),
        (lambda f: f.write_bytes(b""), r"not a whole Parquet file"),
        (lambda f: f.rename(f.with_name("other")), r"no file like train-\*\.parquet or train\.parquet"),
        (
            lambda f: f.rename(f.with_name("train-00001-of-00002.parquet")),
            r"shard 0 of 0 to 1 is missing",
        ),
    ],
)
def test_parquet_refuses(tmp_path, broken, message):
    for split in ("train", "test"):
        write_shard(tmp_path / f"{split}.parquet", [0, 1])
    broken(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=message) as raised:
        HuggingFaceParquet(path=tmp_path).read("train", 8)
    assert str(tmp_path) in str(raised.value)


def test_labels_with_gaps_are_refused_only_where_a_study_uses_them(tmp_path):
    for seed, split in enumerate(("train", "test")):
        images = [encoded(image) for image in noise(6, 8, 8, 3, seed=seed)]
        write_shard(tmp_path / f"{split}.parquet", [0, 0, 2, 2, 4, 4], images, names=list("abcdef"))
    source = HuggingFaceParquet(path=tmp_path)
    train, _, test = build(source, classes=[0, "e", 2], held_out=0)
    assert train.info.classes == test.info.classes == ("a", "e", "c")
    assert train.labels.tolist() == [0, 0, 2, 2, 1, 1]
    for classes in (None, [0, 1]):
        with pytest.raises(ValueError, match=r"data set made: no training image of class 1 \(b\)"):
            build(source, classes=classes)


def test_parquet_labels_stay_within_the_names(tmp_path):
    for split, labels in (("train", [0, 1]), ("test", [0, 2])):
        write_shard(tmp_path / f"{split}.parquet", labels, names=["cat", "dog"])
    with pytest.raises(ValueError, match=r"test\.parquet, row 1: label 2, but the schema names 2 classes"):
        HuggingFaceParquet(path=tmp_path).counts("train")


def test_an_image_column_may_have_any_name(tmp_path):
    pixels = noise(8, 8, 3)
    for split in ("train", "test"):
        write_shard(tmp_path / f"{split}.parquet", [0], [encoded(pixels)], image="jpg")
    source = HuggingFaceParquet(path=tmp_path, image_column="jpg")
    assert np.array_equal(source.read("train", 8).images[0], pixels)


def fractions(file):
    pixels = (noise(2, 8, 8, 3) / 255).tolist()
    pq.write_table(pa.table({"image": pixels, "label": [0, 1]}), file)


def two_columns(file, names):
    pq.write_table(pa.table([pa.array([b"", b""]), pa.array([0, 1]), pa.array([0, 1])], names=names), file)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda f: write_shard(f, [0, 1], image="x"), r"no column image or img; it has x, label"),
        (fractions, r"column image is list<.*double>>>, but must be binary"),
        (lambda f: two_columns(f, ["image", "label", "label"]), r"2 columns are called label"),
        (lambda f: two_columns(f, ["image", "label", "image"]), r"2 columns are called image"),
        (lambda f: two_columns(f, ["image", "label", "img"]), r"it has columns image and img: say which"),
        (lambda f: write_shard(f, [0, 1], label="\ufefflabel"), r"no column label; it has '\\ufefflabel'"),
        (
            lambda f: write_shard(f, np.array([0, 2**63 + 5], np.uint64)),
            r"label 9223372036854775813 is no number of a class",
        ),
        (lambda f: (f.unlink(), os.mkfifo(f)), r"no regular file, but a folder, a pipe"),
    ],
)
def test_columns_are_checked_before_the_first_job(tmp_path, broken, message):
    for split in ("train", "test"):
        write_shard(tmp_path / f"{split}.parquet", [0, 1])
    broken(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=message):
        HuggingFaceParquet(path=tmp_path).counts("test")


def test_all_broken_shards_are_named_at_once(tmp_path):
    for name in ("train-0", "train-1", "test"):
        write_shard(tmp_path / f"{name}.parquet", [0, 1])
        truncate(tmp_path / f"{name}.parquet")
    with pytest.raises(
        ValueError, match=r"^3 problems: .*train-0\.parquet: not a whole.*/test\.parquet: not"
    ):
        HuggingFaceParquet(path=tmp_path).counts("train")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["default/train/0000", "default/test/0000"], r"say train: default/train/\*\.parquet"),
        (["train", "validation-00000-of-00001"], r"if that is meant, say test: validation-\*\.parquet"),
        (["a"], r"set path to the folder of the shards, and train to a pattern"),
    ],
)
def test_shards_of_other_names_are_pointed_at(tmp_path, names, message):
    for name in names:
        write_shard(tmp_path / f"{name}.parquet", [0, 1])
    with pytest.raises(ValueError, match=message):
        HuggingFaceParquet(path=tmp_path).counts("train")


def test_what_the_hints_say_works(tmp_path):
    for split in ("train", "test"):
        write_shard(tmp_path / f"default/{split}/0000.parquet", [0, 1])
    source = HuggingFaceParquet(path=tmp_path, train="default/train/*.parquet", test="default/test/*.parquet")
    assert source.counts("test") == {0: 1, 1: 1}


def test_what_save_to_disk_wrote_is_pointed_at(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"save_to_disk.*to_parquet\('train\.parquet'\)"):
        HuggingFaceParquet(path=tmp_path).counts("train")
    with pytest.raises(ValueError, match=r"there is no such folder"):
        HuggingFaceParquet(path=tmp_path / "x").counts("train")


HASH, OTHER = "0c1f2d3e4f5a6b7c", "9b8a7c6d5e4f3210"  # as push_to_hub once put them behind the count


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([f"train-00000-of-00002-{HASH}"], r"shard 1 of 0 to 1 is missing"),
        (["data/train-00001-of-00003", "data/train-00002-of-00003"], r"shard 0 of 0 to 2 is missing"),
        (["train-00000-of-00001", "train-00001-of-00001"], r"shard 1 beside it is none of 0 to 0"),
        (["train-0", "train-2"], r"shard 1 of 0 to 2 is missing"),
        ([f"train-00000-of-00001-{HASH}", f"train-00000-of-00001-{OTHER}"], r"the same shard as"),
        (["train-00000-of-00001", "train-00000-of-00001 (1)"], r"the same shard as"),
        (
            ["train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"],
            r"shards train of 1 and of 2 lie side by side",
        ),
        (["train-00000-of-00001", "data/train-00000-of-00001"], r"lies there too, and which of them train"),
        (["train", "train-00000-of-00001"], r"lies there too, and which of them train"),
    ],
)
def test_shards_that_are_missing_or_doubled_are_refused(tmp_path, names, message):
    write_shard(tmp_path / "test.parquet", [0, 1])
    for name in names:
        write_shard(tmp_path / f"{name}.parquet", [0, 1])
    with pytest.raises(ValueError, match=message):
        HuggingFaceParquet(path=tmp_path).counts("test" if "beside it" in message else "train")


@pytest.mark.parametrize("names", [["1990", "2000"], ["a-0000-of-0001", "b-0000-of-0001"], ["000", "001"]])
def test_names_that_count_nothing_else_are_taken_as_they_are(tmp_path, names):
    write_shard(tmp_path / "test.parquet", [0, 1])
    for name in names:
        write_shard(tmp_path / f"train/{name}.parquet", [0, 1])
    assert HuggingFaceParquet(path=tmp_path, train="train/*").counts("train") == {0: 2, 1: 2}


@pytest.mark.parametrize("link", [False, True])
def test_a_shard_of_both_splits_is_refused(tmp_path, link):
    write_shard(tmp_path / "all.parquet", [0, 1])
    if link:
        (tmp_path / "test.parquet").symlink_to(tmp_path / "all.parquet")
    source = HuggingFaceParquet(path=tmp_path, train="a*.parquet", test="t*.parquet" if link else "*.parquet")
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=r"\.parquet: the patterns of both train and test match it"):
            source.counts(split)


@pytest.mark.parametrize(
    ("name", "train", "test", "num_classes"),
    [("cifar10", 5170, 1017, 10), ("gtsrb", 9803, 3158, 43), ("tiny-imagenet", 4500, 500, 10)],
)
def test_real_parquet(name, train, test, num_classes):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is not on this machine")
    source = HuggingFaceParquet(path=SHARED / name)
    assert (source.counts("train").total(), source.counts("test").total()) == (train, test)
    assert len(source.counts("train")) == num_classes
    if name == "tiny-imagenet":
        raw = source.read("test", 64)
        assert raw.images.shape == (500, 64, 64, 3)
        assert Counter(raw.labels.tolist()) == dict.fromkeys(range(10), 50)


# --- CIFAR-10 --------------------------------------------------------------------------------------


def python_two(pixels, labels):
    """Return a batch as numpy 1 on Python 2 pickled it: byte strings, and numpy's old module names."""
    raw = pixels.tobytes()
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        + b"(K\x01(K%cM\x00\x0ct" % len(labels)  # a version, then the shape (N, 3072)
        + dtype
        + b"\x89T%btb" % (len(raw).to_bytes(4, "little") + raw)
    )
    numbers = b"(l" + b"".join(b"K%ca" % label for label in labels)
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + numbers + b"U\x0bbatch_labelU\x05batchu."


def cifar_pixels(count, seed):
    return noise(count, 3072, seed=seed)


def write_cifar(root, kind):
    """Write six batches of ten images in one of the forms that CIFAR-10 comes in; return batch 1's pixels."""
    folder = root / ("cifar-10-batches-bin" if kind == "binary" else "cifar-10-batches-py")
    folder.mkdir(parents=True)
    for seed, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        pixels, labels = cifar_pixels(10, seed), list(range(10))
        if kind == "binary":
            records = np.concatenate([np.array(labels, np.uint8)[:, np.newaxis], pixels], axis=1)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
        elif kind == "python 2":
            (folder / name).write_bytes(python_two(pixels, labels))
        else:
            content = {"data": pixels, "labels": labels, "batch_label": name, "filenames": ["x.png"] * 10}
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return folder


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("kind", ["binary", "python 2", "python 3"])
def test_cifar10(tmp_path, kind, inner):
    folder = write_cifar(tmp_path, kind)
    source = TorchvisionFolder(path=folder if inner else tmp_path, layout="cifar10")
    raw = source.read("train", 32)
    assert raw.images.shape == (50, 32, 32, 3)
    assert raw.images[13, 2, 5].tolist() == cifar_pixels(10, 1)[3].reshape(3, 32, 32)[:, 2, 5].tolist()
    assert raw.labels.tolist() == list(range(10)) * 5
    assert raw.classes[:2] == ("airplane", "automobile")
    assert np.array_equal(source.read("test", 16).images, resize_all(source.read("test", 32).images, 16))
    assert (source.counts("train"), source.counts("test")) == (
        Counter(dict.fromkeys(range(10), 5)),
        Counter(range(10)),
    )


def test_python_two_batch_is_one():
    """The made batch is what an unrestricted unpickler reads as CIFAR's."""
    batch = pickle.loads(python_two(cifar_pixels(10, 0), range(10)), encoding="latin1")
    assert np.array_equal(batch["data"], cifar_pixels(10, 0))
    assert batch["labels"] == list(range(10))


def write_cifar100(folder, kind):
    """Write CIFAR-100's two files, of three images each; return their fine labels and their pixels."""
    images = np.arange(3 * 3072, dtype=np.int64).reshape(3, 3072).astype(np.uint8)
    coarse, fine = [19, 0, 7], [99, 4, 42]
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        if kind == "binary":
            heads = np.array([coarse, fine], np.uint8).T
            (folder / f"{split}.bin").write_bytes(np.concatenate([heads, images], 1).tobytes())
        else:
            batch = {"data": images, "fine_labels": fine, "coarse_labels": coarse, "filenames": ["a"] * 3}
            (folder / split).write_bytes(pickle.dumps(batch, protocol=2))
    return fine, images.reshape(3, 3, 32, 32).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize(("kind", "name"), [("binary", "cifar-100-binary"), ("pickled", "cifar-100-python")])
def test_cifar100_has_its_fine_labels(tmp_path, kind, name, inner):
    fine, pixels = write_cifar100(tmp_path / name, kind)
    source = TorchvisionFolder(path=tmp_path / name if inner else tmp_path, layout="cifar100")
    raw = source.read("test", 32)
    assert raw.labels.tolist() == fine
    np.testing.assert_array_equal(raw.images, pixels)
    assert [source.class_names()[label] for label in fine] == ["worm", "beaver", "leopard"]
    assert source.counts("train") == dict.fromkeys(fine, 1)
    assert source.remarks()[0].startswith("train has 3 images, but 50000 were published as cifar100")


def test_cifar100_refuses_what_is_broken(tmp_path):
    source = TorchvisionFolder(path=tmp_path, layout="cifar100")
    write_cifar100(tmp_path / "cifar-100-python", "pickled")
    (tmp_path / "cifar-100-python" / "train").write_bytes(pickle.dumps({"data": print}))
    with pytest.raises(ValueError, match=r"not a file of CIFAR-100 .*builtins\.print"):
        source.counts("train")
    write_cifar100(tmp_path / "cifar-100-binary", "binary")
    (tmp_path / "cifar-100-binary" / "train.bin").write_bytes(b"\0" * 3075)
    with pytest.raises(ValueError, match="no whole number of records of 3074"):
        source.counts("train")
    (tmp_path / "cifar-100-binary" / "train.bin").write_bytes(b"\0\x64" + b"\0" * 3072)
    with pytest.raises(ValueError, match="image 0: label 100, but CIFAR-100 has labels 0 to 99"):
        source.counts("train")


def test_cifar10_prefers_the_binary_batches(tmp_path):
    write_cifar(tmp_path, "binary")
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py/data_batch_1").write_bytes(b"never read")
    assert len(TorchvisionFolder(path=tmp_path, layout="cifar10").read("train", 32).labels) == 50


class Command:
    """A pickle of this runs a shell command when it's loaded."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_malicious_pickle_is_refused_and_not_run(tmp_path):
    folder, marker = write_cifar(tmp_path, "python 3"), tmp_path / "marker"
    (folder / "data_batch_2").write_bytes(pickle.dumps({"data": Command(f"touch {marker}")}, protocol=2))
    with pytest.raises(ValueError, match=r"data_batch_2: .*asks for posix\.system, which is refused"):
        TorchvisionFolder(path=tmp_path, layout="cifar10").read("train", 32)
    assert not marker.exists()


@pytest.mark.parametrize(
    "module_and_name", ["builtins\neval", "builtins\ngetattr", "numpy\nload", "codecs\nencode", "os\nsystem"]
)
@pytest.mark.parametrize("opcode", ["global", "stack"])
def test_unpickler_refuses_every_other_name(tmp_path, module_and_name, opcode):
    folder = write_cifar(tmp_path, "python 3")
    module, name = (part.encode() for part in module_and_name.split("\n"))
    asks = (
        b"c%b\n%b\n" % (module, name)
        if opcode == "global"
        else b"\x8c%c%b\x8c%c%b\x93" % (len(module), module, len(name), name)
    )
    (folder / "test_batch").write_bytes(b"\x80\x04" + asks + b"(tR.")
    with pytest.raises(ValueError, match=r"test_batch: not a batch of CIFAR-10 \(it asks for"):
        TorchvisionFolder(path=tmp_path, layout="cifar10").counts("test")


def repickled(**changes):
    content = {"data": cifar_pixels(10, 0), "labels": list(range(10))} | changes
    return pickle.dumps(content, protocol=2)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a batch"),
        (repickled()[:-5000], "not a batch"),
        (pickle.dumps([1, 2], protocol=2), "not a batch"),
        (repickled(labels=[0]), "1 labels, but images of shape"),
        (repickled(labels=[*range(9), 10]), "image 9: label 10"),
        (repickled(data=cifar_pixels(10, 0).astype(np.int16)), "'i2', not bytes"),
        (repickled(data=np.asfortranarray(cifar_pixels(10, 0))), "C order"),
    ],
)
def test_broken_batch_is_named(tmp_path, content, reason):
    folder = write_cifar(tmp_path, "python 3")
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=rf"test_batch.*{reason}"):
        TorchvisionFolder(path=tmp_path, layout="cifar10").read("test", 32)


def test_broken_binary_batch_is_named(tmp_path):
    folder = write_cifar(tmp_path, "binary")
    truncate(folder / "data_batch_3.bin")
    (folder / "test_batch.bin").unlink()
    source = TorchvisionFolder(path=tmp_path, layout="cifar10")
    with pytest.raises(ValueError, match=r"data_batch_3\.bin: 30710 bytes are no whole number of records"):
        source.read("train", 32)
    with pytest.raises(ValueError, match=r"test_batch\.bin: this batch is missing"):
        source.counts("test")


# --- GTSRB -----------------------------------------------------------------------------------------


@pytest.fixture
def gtsrb(tmp_path):
    """Two training images of each class (one of class 0 only without a table) and three test images."""
    training = tmp_path / "gtsrb/GTSRB/Training"
    for label in range(43):
        rows = [f"0000{n}_00000.ppm;9;7;1;1;5;5;{label}" for n in range(2)]
        for n in range(2):
            save(training / f"{label:05}/0000{n}_00000.ppm", np.full((7, 9, 3), label + n, np.uint8))
        table = training / f"{label:05}/GT-{label:05}.csv"
        table.write_text(
            "\n".join(["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId", *rows]) + "\n"
        )
    (training / "00000/GT-00000.csv").unlink()
    (training / "Readme.txt").write_text("about")
    lines = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for n, label in enumerate((42, 0, 7)):
        save(tmp_path / f"gtsrb/GTSRB/Final_Test/Images/0000{n}.ppm", np.full((7, 9, 3), 200 + n, np.uint8))
        lines.append(f"0000{n}.ppm;9;7;1;1;5;5;{label}")
    (tmp_path / "gtsrb/GT-final_test.csv").write_text("\r\n".join(lines))
    return tmp_path


def test_kaggles_signs_are_known(tmp_path):
    (tmp_path / "Test.csv").write_text("Width,Height,ClassId,Path\n")
    with pytest.raises(ValueError, match=r"GTSRB as Kaggle has it.*source: image_folder"):
        TorchvisionFolder(path=tmp_path, layout="gtsrb").counts("train")


def test_a_pipe_in_place_of_a_list_is_not_waited_for(tiny):
    (tiny / "tiny-imagenet-200/wnids.txt").unlink()
    os.mkfifo(tiny / "tiny-imagenet-200/wnids.txt")
    with pytest.raises(ValueError, match=r"wnids\.txt: no regular file"):
        TorchvisionFolder(path=tiny, layout="tiny_imagenet").counts("train")


def test_lists_may_begin_with_a_byte_order_mark(tiny):
    names = tiny / "tiny-imagenet-200/wnids.txt"
    names.write_bytes(b"\xef\xbb\xbf" + names.read_bytes())
    assert TorchvisionFolder(path=tiny, layout="tiny_imagenet").counts("train") == {0: 2, 1: 2}


def test_signs_that_stand_in_no_table_are_told(gtsrb):
    save(gtsrb / "gtsrb/GTSRB/Training/00001/00009_00000.ppm")
    save(gtsrb / "gtsrb/GTSRB/Final_Test/Images/00009.ppm")
    assert [
        Path(name).name for name in TorchvisionFolder(path=gtsrb, layout="gtsrb").left_out().popitem()[1]
    ] == [
        "00009_00000.ppm",
        "00009.ppm",
    ]


@pytest.mark.parametrize("inner", [".", "gtsrb", "gtsrb/GTSRB"])
def test_gtsrb(gtsrb, inner):
    source = TorchvisionFolder(path=gtsrb / inner, layout="gtsrb")
    train, test = source.read("train", 4), source.read("test", 4)
    assert train.images[:, 1, 1, 0].tolist() == [label + n for label in range(43) for n in range(2)]
    assert train.labels.tolist() == [label for label in range(43) for _ in range(2)]
    assert len(train.classes) == len(set(train.classes)) == 43
    assert (test.labels.tolist(), test.images[:, 0, 0, 2].tolist()) == ([42, 0, 7], [200, 201, 202])
    assert source.counts("train") == dict.fromkeys(range(43), 2)
    assert source.counts("test") == {42: 1, 0: 1, 7: 1}


def test_gtsrb_prefers_the_final_training_set(gtsrb):
    for label in range(43):
        save(gtsrb / f"gtsrb/GTSRB/Final_Training/Images/{label:05}/00000_00000.ppm")
    assert TorchvisionFolder(path=gtsrb, layout="gtsrb").counts("train").total() == 43


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            lambda f: (f / "GTSRB/Training/00007/00001_00000.ppm").unlink(),
            r"00007/00001_00000\.ppm: no whole",
        ),
        (lambda f: (f / "GTSRB/Training/00000").rename(f / "x"), r"Training/00000: no \.ppm images there"),
        (lambda f: (f / "GTSRB/Training").rename(f / "x"), r"GTSRB: no folder .*Training; unpack"),
        (
            lambda f: (f / "GTSRB/Training/00007/GT-00007.csv").write_text("Filename;ClassId\nx.ppm;8\n"),
            r"GT-00007\.csv: x\.ppm has ClassId 8, but lies in the folder of class 7",
        ),
        (
            lambda f: (f / "GTSRB/Training/00007/GT-00007.csv").write_text("Filename;ClassId\nx.ppm;43\n"),
            r"GT-00007\.csv, line 2: .*'43', but a row needs a file and a class from 0 to 42",
        ),
        (
            lambda f: (f / "GTSRB/Training/00007/GT-00007.csv").write_text("Filename\nx.ppm\n"),
            r"GT-00007\.csv, line 2: .*ClassId None",
        ),
        (lambda f: (f / "GTSRB/Training/00007/GT-00007.csv").write_text(""), r"GT-00007\.csv: no rows"),
        (lambda f: (f / "GTSRB/Training/00007/GT-00007.csv").write_bytes(b"\xff"), r"csv: can't be read"),
    ],
)
def test_gtsrb_refuses(gtsrb, broken, message):
    broken(gtsrb / "gtsrb")
    with pytest.raises(ValueError, match=message):
        TorchvisionFolder(path=gtsrb, layout="gtsrb").read("train", 4)


def test_gtsrb_needs_the_test_labels(gtsrb):
    (gtsrb / "gtsrb/GT-final_test.csv").unlink()
    with pytest.raises(ValueError, match=r"gtsrb/GT-final_test\.csv: can't be read"):
        TorchvisionFolder(path=gtsrb, layout="gtsrb").counts("test")


# --- Tiny-ImageNet ---------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path):
    """Two classes, listed against the alphabet; a grey JPEG among the training images."""
    folder = tmp_path / "tiny-imagenet-200"
    for label, wnid in enumerate(("n01", "n02")):
        save(folder / f"train/{wnid}/images/{wnid}_0.JPEG", np.full((8, 8, 3), 100 * label, np.uint8))
        save(folder / f"train/{wnid}/images/{wnid}_1.JPEG", np.full((8, 8), 100 * label + 50, np.uint8))
        (folder / f"train/{wnid}/{wnid}_boxes.txt").write_text("boxes")
        save(folder / f"val/images/val_{label}.JPEG", np.full((8, 8, 3), 100 * label + 20, np.uint8))
    (folder / "wnids.txt").write_text("n02\nn01\n")
    (folder / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn03\tbullfrog\n")
    annotations = "val_1.JPEG\tn01\t0\t0\t8\t8\nval_0.JPEG\tn02\t0\t0\t8\t8\n"
    (folder / "val/val_annotations.txt").write_text(annotations)
    return tmp_path


@pytest.mark.parametrize("inner", [".", "tiny-imagenet-200"])
def test_tiny_imagenet(tiny, inner):
    source = TorchvisionFolder(path=tiny / inner, layout="tiny_imagenet")
    train, test = source.read("train", 8), source.read("test", 8)
    assert train.classes == test.classes == ("goldfish, Carassius auratus", "n02")
    assert train.images[:, 4, 4, 0].tolist() == [0, 50, 100, 150]
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert (test.labels.tolist(), test.images[:, 4, 4, 0].tolist()) == ([0, 1], [120, 20])
    assert (source.counts("train"), source.counts("test")) == (Counter({0: 2, 1: 2}), Counter({0: 1, 1: 1}))


@pytest.mark.parametrize(
    ("split", "broken", "message"),
    [
        ("train", lambda f: (f / "wnids.txt").unlink(), r"wnids\.txt: can't be read"),
        ("train", lambda f: (f / "wnids.txt").write_text("\n"), r"wnids\.txt: it names no class"),
        ("train", lambda f: (f / "train/n02/images").rename(f / "x"), r"n02/images: no \.jpeg images there"),
        ("train", lambda f: truncate(f / "train/n01/images/n01_0.JPEG"), r"n01_0\.JPEG: no .*image"),
        ("test", lambda f: (f / "val/images/val_0.JPEG").unlink(), r"val_0\.JPEG: no whole image"),
        (
            "test",
            lambda f: (f / "val/val_annotations.txt").write_text("val_0.JPEG\tn09\n"),
            r"val_annotations\.txt, line 1: 'n09' is no class of wnids\.txt",
        ),
        ("test", lambda f: (f / "val/val_annotations.txt").write_text(""), r"val_annotations\.txt: no rows"),
    ],
)
def test_tiny_imagenet_refuses(tiny, split, broken, message):
    broken(tiny / "tiny-imagenet-200")
    with pytest.raises(ValueError, match=message):
        TorchvisionFolder(path=tiny, layout="tiny_imagenet").read(split, 8)


def test_what_an_archive_half_unpacked_lacks_is_told(tiny):
    folder = tiny / "tiny-imagenet-200"
    save(folder / "val/images/val_9.JPEG")
    save(folder / "train/n09/images/n09_0.JPEG")
    (folder / "train/n01/images/n01_1.JPEG.part").write_bytes(b"")
    (folder / "val/val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t8\t8\n")
    remarks = TorchvisionFolder(path=tiny, layout="tiny_imagenet").remarks()
    first = ["train/n01/images/n01_1.JPEG.part", "train/n09", "val/images/val_1.JPEG"]
    again = "and 200 of 200 classes differ; unpack the archive anew to have all"
    assert remarks == [
        f"left out, in no table, or no image of a class: 4 files: {folder}/{f', {folder}/'.join(first)}, ...",
        "1 of 2 classes have training images, but no test image: 0 (goldfish, Carassius auratus)",
        f"train has 4 images, but 100000 were published as tiny_imagenet: class 0 has 2 of 500, {again}",
        f"test has 1 images, but 10000 were published as tiny_imagenet: class 0 has 0 of 50, {again}",
    ]
    assert not TorchvisionFolder(path=tiny / "x", layout="tiny_imagenet", download=True).remarks()


# --- downloads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", list(torchvision_folder.LAYOUTS))
def test_absent_folder_says_what_to_do(tmp_path, layout):
    source = TorchvisionFolder(path=tmp_path / "x", layout=layout)
    for ask in (lambda: source.counts("train"), lambda: source.read("train", 8)):
        with pytest.raises(ValueError, match=rf"/x: no {layout} in it .*download: true"):
            ask()


@pytest.mark.parametrize(
    ("layout", "train", "test"),
    [("cifar10", 50000, 10000), ("gtsrb", 39209, 12630), ("tiny_imagenet", 100000, 10000)],
)
def test_published_counts_before_a_download(tmp_path, layout, train, test):
    source = TorchvisionFolder(path=tmp_path / "x", layout=layout, download=True)
    assert (source.counts("train").total(), source.counts("test").total()) == (train, test)
    assert not (tmp_path / "x").exists()


def stand_in_torchvision(monkeypatch, download):
    """Put a torchvision in place whose downloads call ``download`` with the folder to unpack into."""
    utils = types.SimpleNamespace(download_and_extract_archive=lambda url, root, **_: download(Path(root)))
    datasets = types.SimpleNamespace(
        utils=utils,
        CIFAR10=types.SimpleNamespace(url="u", filename="f", tgz_md5="m"),
        GTSRB=lambda root, split, download: (Path(root) / "gtsrb/GTSRB/Final_Test").mkdir(parents=True),
    )
    vision = types.SimpleNamespace(torchvision=types.SimpleNamespace(datasets=datasets))
    monkeypatch.setitem(sys.modules, "detrojan.models._parts.torchvision", vision)


def test_download_is_read_and_leaves_nothing_else(tmp_path, monkeypatch):
    stand_in_torchvision(monkeypatch, lambda root: write_cifar(root, "python 2"))
    source = TorchvisionFolder(path=tmp_path / "x", layout="cifar10", download=True)
    assert len(source.read("train", 32).labels) == 50
    assert [entry.name for entry in (tmp_path / "x").iterdir()] == ["cifar-10-batches-py"]
    stand_in_torchvision(monkeypatch, lambda root: pytest.fail("it is there already"))
    assert source.counts("test").total() == 10
    assert len(source.read("test", 32).labels) == 10


def test_gtsrb_download_is_the_final_training_set(tmp_path, monkeypatch):
    def download(root):
        for label in range(43):
            save(root / f"GTSRB/Final_Training/Images/{label:05}/00000_00000.ppm")

    stand_in_torchvision(monkeypatch, download)
    source = TorchvisionFolder(path=tmp_path, layout="gtsrb", download=True)
    assert source.read("train", 8).labels.tolist() == list(range(43))


def test_failed_download_leaves_nothing(tmp_path, monkeypatch):
    def fail(root):
        (root / "tiny-imagenet-200").mkdir()
        raise OSError("network is unreachable")

    stand_in_torchvision(monkeypatch, fail)
    source = TorchvisionFolder(path=tmp_path / "x", layout="tiny_imagenet", download=True)
    with pytest.raises(ValueError, match=r"could not download tiny_imagenet \(network is unreachable\)"):
        source.read("train", 8)
    assert not list((tmp_path / "x").iterdir())


# --- ingest ----------------------------------------------------------------------------------------


class Made(Source):
    """Twenty training images of class 0, ten of class 1, three test images; class names as given."""

    def read(self, split, side):
        labels = np.array(([0, 0, 1] * 10) if split == "train" else [0, 1, 1], np.int64)
        return RawImages(noise(len(labels), side, side, 3, seed=len(split)), labels, ("cat", "dog"))


OPTIONS = {
    "name": "made",
    "side": 4,
    "held_out": 0.1,
    "classes": None,
    "per_class": None,
    "augmentation": NO_AUGMENTATION,
    "mean": None,
    "std": None,
}


def build(source=None, **changes):
    return ingest.build(source or Made(), **(OPTIONS | changes))


@pytest.mark.parametrize("held_out", [0, 0.05, 0.1, 0.25])
@pytest.mark.parametrize("per_class", [None, 6, 15])
def test_build_keeps_what_the_planner_counts(held_out, per_class):
    raw = Made().read("train", 4)
    train, pool, test = build(held_out=held_out, per_class=per_class)
    counted = split_counts(Counter(raw.labels.tolist()), held_out, per_class)
    for images, expected in zip((train, pool), counted, strict=True):
        assert Counter(images.labels.tolist()) == +expected
        assert torch.equal(images.index, images.index.sort().values)
    # Together they are the limited split, each image once, at the row that its index says.
    both = torch.cat([train.index, pool.index])
    assert sorted(both.tolist()) == list(range(len(both)))
    kept = np.sort(np.concatenate([np.flatnonzero(raw.labels == label)[:per_class] for label in (0, 1)]))
    pixels = torch.cat([train.images, pool.images])[both.argsort()].permute(0, 2, 3, 1)
    assert np.array_equal(pixels.numpy(), raw.images[kept])
    assert (len(test), test.index.tolist()) == (3, [0, 1, 2])


def test_build_keeps_chosen_classes_in_the_order_given():
    raw, both = Made().read("train", 4), [1, 0]
    assert selected_counts(Counter(raw.labels.tolist()), raw.classes, both) == {0: 10, 1: 20}
    train, _, test = build(classes=both, held_out=0)
    assert train.info.classes == ("dog", "cat")
    assert torch.equal(train.labels, 1 - torch.from_numpy(raw.labels))
    assert test.labels.tolist() == [1, 0, 0]

    class Three(Made):
        def read(self, split, side):
            images = super().read(split, side)
            return RawImages(images.images, images.labels * 2, ("cat", "ant", "dog"))

    train, _, _ = build(Three(), classes=[2, 0], per_class=4, held_out=0)
    assert train.info.classes == ("dog", "cat")
    # The first four of each class, cats at 0, 1, 3, 4 and dogs at 2, 5, 8, 11.
    assert train.labels.tolist() == [1, 1, 0, 1, 1, 0, 0, 0]
    assert np.array_equal(train.images.permute(0, 2, 3, 1).numpy(), raw.images[[0, 1, 2, 3, 4, 5, 8, 11]])


def test_classes_may_be_given_by_name():
    names = ("cat", "dog", "7", "emu", "emu")
    assert selected(names, ["dog", 0, "7"]) == [1, 0, 2]
    assert selected(names, None) == [0, 1, 2, 3, 4]
    assert selected_counts(Counter({0: 5, 1: 6}), names, ["dog", 0]) == {0: 6, 1: 5}
    for wanted, message in (
        (["dig"], r"classes: there is no class 'dig': classes are cat, dog, 7, emu, emu"),
        (["7", 7], r"classes: there is no label 7: labels are 0 to 4"),
        (["emu"], r"classes: labels 3, 4 are all 'emu': write the number"),
        (["dog", 0, 1], r"classes: 1 is label 1, which stands there already"),
    ):
        with pytest.raises(ValueError, match=message):
            selected(names, wanted)


def test_build_describes_the_data_set():
    train, pool, test = build()
    pixels = train.images.double() / 255
    assert train.info == pool.info == test.info
    assert train.info.classes == ("cat", "dog")
    assert train.info.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert train.info.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-12)
    assert train.images.is_contiguous(memory_format=torch.channels_last)
    assert train.labels is train.true_labels


def test_build_is_repeatable_and_keyed_by_name():
    assert torch.equal(build()[1].index, build()[1].index)
    assert not torch.equal(build(held_out=0.5)[1].index, build(held_out=0.5, name="other")[1].index)
    assert build()[0].info.digest == build(name="other", held_out=0.5)[0].info.digest
    assert build()[0].info.digest != build(per_class=9)[0].info.digest


def test_given_statistics_are_kept_and_a_flat_channel_divides_by_something():
    class Flat(Made):
        def read(self, split, side):
            raw = super().read(split, side)
            raw.images[..., 1] = 51
            return raw

    info = build(Flat(), mean=(0.0, 0.0, 0.0))[0].info
    assert (info.mean, info.std[1]) == ((0.0, 0.0, 0.0), 1 / 255)
    info = build(Flat(), std=(1.0, 1.0, 1.0))[0].info
    assert (info.mean[1], info.std) == (pytest.approx(0.2), (1.0, 1.0, 1.0))


class Edited(Made):
    """``Made`` with one split's labels or class names put in place."""

    split: str
    labels: list[int] | None = None
    classes: tuple[str, ...] = ("cat", "dog")

    def read(self, split, side):
        raw = super().read(split, side)
        if split != self.split:
            return raw
        labels = raw.labels if self.labels is None else np.array(self.labels, np.int64)
        return RawImages(raw.images[: len(labels)], labels, self.classes)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            Edited(split="test", classes=("cat", "emu")),
            r"data set made: the classes of train \(2: cat, dog\)",
        ),
        (Edited(split="train", labels=[0, 0, 0]), r"data set made: no training image of class 1 \(dog\)"),
        (Edited(split="test", labels=[0, 2]), r"data set made: labels of split test run from 0 to 2"),
        (Edited(split="test", labels=[]), r"data set made: split test has no images"),
        (Edited(split="train", labels=[0, 0, 1]), r"class 1 has 1 training images, and held_out 0\.1"),
    ],
)
def test_build_refuses(source, message):
    with pytest.raises(ValueError, match=message):
        build(source)


class Doubled(Source):
    """Ten training images of each class and four test images; some of them are copies of others."""

    again: dict[int, int] = Field({})  # rows of the training split that copy other rows
    tested: dict[int, int] = Field({})  # rows of the test split that copy training rows

    def read(self, split, side):
        train, test = noise(20, side, side, 3), noise(4, side, side, 3, seed=1)
        for row, other in self.again.items():
            train[row] = train[other]
        for row, other in self.tested.items():
            test[row] = train[other]
        images = train if split == "train" else test
        return RawImages(images, np.arange(len(images)) % 2, ("cat", "dog"))


def test_a_test_image_that_is_a_training_image_is_refused():
    source = Doubled(tested={1: 7, 2: 4})
    with pytest.raises(
        ValueError, match=r"2 of 4 test images are, pixel for pixel, training images"
    ) as raised:
        build(source)
    assert "row 1 (dog) = row 7 (dog), row 2 (cat) = row 4 (cat);" in str(raised.value)
    assert "datasets.made.overlap: 0.5 (or allowed)" in str(raised.value)


@pytest.mark.parametrize("overlap", [0.5, "allowed"])
def test_a_study_may_allow_test_images_that_are_training_images(overlap, caplog):
    build(Doubled(tested={1: 7, 2: 4}), overlap=overlap)
    assert "2 of 4 test images are" in caplog.text
    with pytest.raises(ValueError, match="2 of 4 test images"):
        build(Doubled(tested={1: 7, 2: 4}), overlap=0.49)


def test_what_stands_twice_in_training_stays_out_of_the_pool(caplog):
    again = {row: row - 2 for row in (2, 3, 6, 7, 10)}  # of ten cats four are there once, of ten dogs six
    for seed in range(20):
        train, pool, _ = build(Doubled(again=again), held_out=0.4, name=str(seed))
        assert Counter(pool.labels.tolist()) == {0: 4, 1: 4}
        assert not {image.numpy().tobytes() for image in pool.images} & {
            image.numpy().tobytes() for image in train.images
        }
    assert "5 of 20 images of split train are, pixel for pixel, others of it" in caplog.text
    assert "row 2 (cat) = row 0 (cat)" in caplog.text
    with pytest.raises(ValueError, match=r"needs 5 images of class 0 \(cat\), but only 4 of its 10"):
        build(Doubled(again=again), held_out=0.5)
    assert len(build(Doubled(again=again), held_out=0.5, overlap="allowed")[1]) == 10


def test_equal_images_of_several_labels_are_counted(caplog):
    build(Doubled(again={3: 0, 5: 0, 6: 4}))
    assert "row 3 (dog) = row 0 (cat), row 5 (dog) = row 0 (cat), row 6 (cat) = row 4 (cat)" in caplog.text
    assert "; of several labels: 1" in caplog.text


class Flat(Made):
    """``Made`` with one colour in place of some images' own."""

    split: str = "train"
    rows: list[int]
    levels: list[int] = Field([7])

    def read(self, split, side):
        raw = super().read(split, side)
        if split == self.split:
            raw.images[self.rows] = np.resize(self.levels, len(self.rows))[:, None, None, None]
        return raw


DOGS = list(range(2, 30, 3))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_of_one_colour_is_refused(split):
    rows = DOGS if split == "train" else [1, 2]
    with pytest.raises(ValueError, match=r"images of class 1 \(dog\) in split t.* one colour, \(7, 7, 7\)"):
        build(Flat(split=split, rows=rows))
    # Each of one colour of its own: plain, but something to tell them apart.
    build(Flat(split=split, rows=rows, levels=list(range(20))))


def test_images_of_one_colour_are_told(caplog):
    build(Flat(rows=[3, 4], levels=[3, 4]))
    assert "2 of 30 images of split train are of one colour each: row 3, row 4" in caplog.text


def test_a_split_whose_images_are_all_the_same_colour_is_refused():
    class One(Source):
        def read(self, split, side):
            images = np.full((2, side, side, 3), 9, np.uint8)
            return RawImages(images, np.array([0, 1], np.int64), ("cat", "dog"))

    with pytest.raises(ValueError, match="all images of split train are of one colour"):
        build(One(), held_out=0)


def test_a_narrow_range_of_levels_is_told(caplog):
    class Dark(Made):
        def read(self, split, side):
            raw = super().read(split, side)
            return RawImages(raw.images >> 4, raw.labels, raw.classes)

    build(Dark())
    assert "all pixels of split train have levels from 0 to 15, of 0 to 255" in caplog.text
