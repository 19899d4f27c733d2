"""No damaged file is taken for a whole one, and others can read what carries a checksum."""

import hashlib
import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open

import damage
from detrojan.images import DefenderSample
from detrojan.learning.training import HISTORY
from detrojan.storage import artifacts, records, seals
from detrojan.storage.columns import PREDICTIONS

EPOCHS = [
    {"epoch": n, "lr": 0.1, "loss": 1 / n, "accuracy": 0.5, "num_poisoned": 0, "seconds": 0.1} for n in (1, 2)
]
CARD = {"dataset": "digits", "seed": 0, "psnr": 31.25, "classes": ["a", "ü"]}


@pytest.fixture
def results(tmp_path, toy_images, toy_model):
    """A folder with a small file of each kind."""
    images = toy_images()
    folder = tmp_path / "results"
    artifacts.write_images(images, folder / "datasets/toy/test.parquet")
    sample = DefenderSample(images[torch.tensor([7, 2, 0])], images[torch.tensor([5])])
    artifacts.write_samples({0: sample}, folder / "samples/toy/spc-1/draws-0-0.parquet")
    rows = {"draw": [0] * 4, "triggered": [False] * 4, "index": range(4), "predicted": [1, 2, 1, 0]}
    records.write_predictions(pa.table(rows, PREDICTIONS), folder / "metrics/toy/predictions.parquet")
    for table in ("metrics/toy/metrics", "models/toy/history", "tables/cells"):
        records.write_rows(EPOCHS, folder / f"{table}.parquet", HISTORY)
    artifacts.write_model(toy_model, folder / "models/toy/model.safetensors", cell={"seed": 0})
    records.write_card(CARD, folder / "models/toy/card.json")
    return folder


def test_a_flipped_bit_is_never_taken_for_a_result(results):
    found = damage.damaged(results, flips=40, seed=0)
    assert {sum(counts.values()) for counts in found.values()} == {40}
    assert not [kind for kind, counts in found.items() if "wrong" in counts]
    assert all(counts["refused"] >= 36 for counts in found.values())


@pytest.mark.parametrize("kind", ["history", "cards"])
def test_no_byte_is_left_out(results, tmp_path, kind):
    (path,) = results.glob(damage.KINDS[kind].pattern)
    bits = range(0, 8 * path.stat().st_size, 8 if kind == "cards" else 24)
    found = damage.outcomes(path, damage.KINDS[kind], bits, tmp_path)
    # Where the word itself is hit by which the checksum is found, the content is as it was.
    assert found.get("equal", 0) <= len(seals.MARK)
    assert found["refused"] == len(bits) - found.get("equal", 0)


def test_without_checksums_damage_would_pass(results, monkeypatch):
    monkeypatch.setattr(seals, "read", lambda path: path.read_bytes())
    found = damage.damaged(results, flips=40, seed=0)
    assert found["safetensors"]["wrong"] > 30


def test_pages_of_tables_have_checksums_for_other_readers(results):
    path = results / "datasets/toy/test.parquet"
    content = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(2)
    content[column.dictionary_page_offset + column.total_compressed_size - 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSError, match="CRC"):
        pq.ParquetFile(path, page_checksum_verification=True).read()


def test_anybody_can_check_a_file(results):
    # As docs/reliability.md does it.
    for path in (*results.rglob("*.parquet"), *results.rglob("*.safetensors"), *results.rglob("*.json")):
        (said,) = re.findall(rb"detrojan-sha256:([0-9a-f]{64})", path.read_bytes())
        assert hashlib.sha256(path.read_bytes().replace(said, b"0" * 64)).hexdigest().encode() == said


def test_others_read_the_files_as_ever(results):
    table = pq.read_table(results / "tables/cells.parquet")
    assert table.to_pylist() == EPOCHS
    with safe_open(results / "models/toy/model.safetensors", framework="np") as file:
        assert json.loads(file.metadata()["cell"]) == {"seed": 0}
        assert all(np.isfinite(file.get_tensor(name)).all() for name in file.keys())  # noqa: SIM118, no dict
    text = (results / "models/toy/card.json").read_text(encoding="utf-8")
    card = json.loads(text)
    assert card.pop("sha256").startswith("detrojan-sha256:")
    assert card == CARD


def test_a_file_of_another_program_is_read_with_a_word(results, monkeypatch, caplog):
    monkeypatch.chdir(results.parent)
    pq.write_table(pq.read_table("results/tables/cells.parquet").replace_schema_metadata(None), "own.parquet")
    assert records.read_table("own.parquet").to_pylist() == EPOCHS
    assert "own.parquet: it has no checksum" in caplog.text


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("models/toy/model.safetensors", artifacts.read_model),
        ("metrics/toy/predictions.parquet", records.read_table),
        ("datasets/toy/test.parquet", artifacts.read_images),
    ],
)
def test_a_file_in_anothers_place_is_refused(results, name, read):
    path = results / name
    there = results / name.replace("/toy/", "/other/")
    there.parent.mkdir()
    shutil.copy(path, there)
    with pytest.raises(ValueError, match=rf"{there}: written as {name}, so it is another's"):
        read(there)
    # The folder of results may have any name later.
    results.rename(results.with_name("results of May"))
    read(results.with_name("results of May") / name)


def test_a_file_in_a_folder_that_is_being_written_is_of_its_place(tmp_path):
    folder = tmp_path / "results/defended/ft/draws-0-1"
    with records.whole_folder(folder) as partial:
        artifacts.write_tensors({}, partial / "draw-0.safetensors")
    assert artifacts.read_tensors(folder / "draw-0.safetensors") == ({}, {})
    with safe_open(folder / "draw-0.safetensors", framework="np") as file:
        assert file.metadata()["place"] == "defended/ft/draws-0-1/draw-0.safetensors"


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("results/tables/cells.parquet", "tables/cells.parquet"),
        ("/results/of/results/models/m.safetensors", "models/m.safetensors"),
        ("elsewhere/cells.parquet", ""),
        ("results", ""),
    ],
)
def test_a_place_is_told_from_the_last_folder_of_results(path, place):
    assert records.place(path) == place


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("results/tables/cells.parquet", "results/tables/cells.parquet"),
        ("/far/away/my results/results/a b/card.json", "'results/a b/card.json'"),
        ("elsewhere/cells.parquet", "elsewhere/cells.parquet"),
    ],
)
def test_the_command_that_makes_a_file_anew(path, target):
    assert records.anew(path).endswith(f"`snakemake --profile local -R {target}`")


def test_what_waits_to_be_evaluated_is_made_anew_as_one(tmp_path):
    folder = tmp_path / "results/defended/ft/draws-0-1"
    folder.mkdir(parents=True)
    (folder / "runs.parquet").touch()
    for name in ("runs.parquet", "draw-0.safetensors"):
        assert records.anew(folder / name).endswith("-R results/defended/ft/draws-0-1`")
    assert records.anew(tmp_path / ".checkpoint.safetensors") == "delete it and run the workflow again"
