"""The sheet of a data set's triggers: which images it shows, what it says of them, the same bytes again."""

import dataclasses
import re

import matplotlib as mpl
import pyarrow as pa
import pytest
import torch
from PIL import Image

from detrojan.analysis.report import contact_sheet
from detrojan.analysis.report.pictures import STYLE, svg
from detrojan.cells import Cell
from detrojan.images import concatenate
from detrojan.storage import artifacts
from detrojan.workflow import graph

ATTACKS = [f"attack{number}" for number in range(8)]


def model(attack="sig", **others):
    row = {"dataset": "d", "architecture": "net", "attack": attack, "ratio": 0.05, "seed": 0}
    return row | {"attack_took": True, "psnr": 27.06, "ssim": 0.9871, "linf": 255} | others


@pytest.fixture
def examples(toy_images, tmp_path):
    """Return a function that writes the examples of a trigger that adds ``step`` grey levels."""

    def write(folder, step=10, side=16, count=8):
        clean = toy_images(side=side, count=count)
        clean = dataclasses.replace(clean, images=clean.images // 2)
        triggered = dataclasses.replace(clean, images=clean.images + step)
        path = f"triggered/{folder}/examples.parquet"
        artifacts.write_poisoned(concatenate(clean, triggered), tmp_path / path)
        axes = Cell.from_wildcards(graph.parse(path)[1]).axes
        return contact_sheet.Example(tmp_path / path, axes)

    return write


def blocks(rows, files):
    return contact_sheet.blocks("d", pa.Table.from_pylist(rows), files)


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_a_block_shows_test_images_triggered_and_clean(examples):
    (block,) = blocks([model("none", attack_took=None), model()], [examples("d/sig/seed-0")])
    assert block.clean.shape == (contact_sheet.NUM_SHOWN, 3, 16, 16)
    assert torch.equal(block.triggered, block.clean + 10)
    assert not block.failed
    # 127.5 / 10 is 12.75, rounded down to two digits.
    assert block.details.splitlines() == ["PSNR 27.1 dB, SSIM 0.987", "L∞ 255, difference ×12", "seed 0"]


def test_few_test_images_are_all_shown(examples):
    (block,) = blocks([model()], [examples("d/sig/seed-0", count=2)])
    assert len(block.clean) == 2


def test_a_trigger_of_one_model_is_named_by_its_model(examples):
    files = [examples("d/wide/sig/ratio-0.1/seed-0"), examples("d/net/sig/ratio-0.05/seed-0", step=20)]
    (block,) = blocks([model()], files)
    assert torch.equal(block.triggered, block.clean + 20)
    assert block.details.splitlines()[2:] == ["net", "ratio 0.05, seed 0"]


def test_the_first_model_whose_attack_took_is_shown(examples):
    files = [examples(f"d/sig/seed-{seed}", step=seed + 1) for seed in range(3)]
    rows = [model(seed=0, attack_took=False), model(seed=1), model(seed=2)]
    (block,) = blocks(rows, files)
    assert block.details.endswith("seed 1")
    assert not block.failed
    (block,) = blocks([row | {"attack_took": False} for row in rows], files)
    assert block.details.endswith("seed 0")
    assert block.failed


def test_attacks_stand_in_alphabetical_order_and_other_data_sets_elsewhere(examples):
    files = [examples(f"{dataset}/{attack}/seed-0") for dataset in "de" for attack in ("sig", "bpp")]
    rows = [model(attack, dataset=dataset) for dataset in "ed" for attack in ("sig", "bpp")]
    assert [block.attack for block in blocks(rows, files)] == ["bpp", "sig"]


@pytest.mark.parametrize(("step", "factor"), [(255, 0.5), (51, 2.5), (25, 5.1), (1, 120), (0, 120)])
def test_the_factor_never_clips(step, factor):
    clean = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    assert contact_sheet.amplification(clean, clean + step) == factor
    assert 127.5 + step * factor <= 255


@pytest.mark.parametrize("side", [16, 32, 64])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_nothing_overlaps(examples, count, side):
    """Labels of the longest kind stay in their margin and rows, and on the page."""
    files = [
        examples(f"d/mobilenet_v3_large/{name}/ratio-0.005/seed-10", side=side) for name in ATTACKS[:count]
    ]
    rows = [
        model(name, architecture="mobilenet_v3_large", ratio=0.005, seed=10, attack_took=False)
        for name in ATTACKS[:count]
    ]
    figure = contact_sheet.draw(blocks(rows, files))
    page = figure.axes[0]
    assert len(page.images) == contact_sheet.NUM_SHOWN * (1 + 2 * count)
    with mpl.rc_context(STYLE):
        figure.canvas.draw()
        boxes = [text.get_window_extent() for text in page.texts]
        boxes += [image.get_window_extent() for image in page.images]
    whole = figure.bbox
    for place, box in enumerate(boxes):
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1
        for other in boxes[:place]:
            across = min(box.x1, other.x1) - max(box.x0, other.x0)
            down = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert min(across, down) < 1  # a dot, of a hundred an inch


def test_pixels_are_the_images_own(examples):
    (block,) = blocks([model()], [examples("d/sig/seed-0")])
    images = contact_sheet.draw([block]).axes[0].images
    clean, triggered, difference = (images[place * contact_sheet.NUM_SHOWN].get_array() for place in range(3))
    assert torch.equal(torch.tensor(clean[::8, ::8]).permute(2, 0, 1), block.clean[0])
    assert torch.equal(torch.tensor(triggered[::8, ::8]).permute(2, 0, 1), block.triggered[0])
    assert set(difference.ravel().tolist()) == {248}  # 127.5 + 12 × 10, half to even


def test_failed_attacks_are_marked_and_explained(examples):
    files = [examples("d/sig/seed-0"), examples("d/bpp/seed-0")]
    took = contact_sheet.draw(blocks([model("bpp"), model("sig")], files))
    assert "failed" not in " ".join(texts(took))
    failed = contact_sheet.draw(blocks([model("bpp", attack_took=False), model("sig")], files))
    assert texts(failed).count("failed") == 1
    assert "failed: the attack failed the gate" in " ".join(texts(failed))


def test_a_data_set_without_attack_says_so():
    figure = contact_sheet.draw(blocks([model("none", attack_took=None)], []))
    assert "No model of this data set was attacked" in figure.texts[0].get_text()


def test_undefined_quality_is_a_dash(examples):
    (block,) = blocks([model(psnr=None)], [examples("d/sig/seed-0")])
    assert "PSNR – dB" in block.details


def test_files_are_whole_deterministic_and_offline(examples, tmp_path):
    models = pa.Table.from_pylist([model(), model("bpp")])
    files = [examples("d/sig/seed-0"), examples("d/bpp/seed-0", step=3)]
    written = []
    for name in ("once", "again"):
        sheets = contact_sheet.draw_all(["d"], models, *zip(*files, strict=True))
        texts = contact_sheet.write(sheets, tmp_path / name)
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert set(written[0]) == {"triggers-d.svg", "triggers-d.png", "triggers-d.pdf"}
    assert written[0] == written[1]
    assert texts == {"d": written[0]["triggers-d.svg"].decode()}
    text = svg(sheets["d"])
    assert "<dc:date>" not in text
    assert ">bpp</text>" in text
    assert not re.search(r"https?:(?!//www\.w3\.org/)", text)
    with Image.open(tmp_path / "once" / "triggers-d.png") as picture:
        assert picture.width == 7.2 * contact_sheet.DPI
