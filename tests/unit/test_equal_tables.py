"""The comparison of two folders of results sees a changed bit, and no time, memory or code."""

import importlib.util
import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

FILE = Path(__file__).parents[2] / "benchmarks" / "equal_tables.py"
SPEC = importlib.util.spec_from_file_location("equal_tables", FILE)
equal_tables = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(equal_tables)

COLUMNS = {
    "attack": ["badnets", "none"],
    "acc": [0.5, math.nan],
    "asr": [0.25, None],
    "image": [b"\0\1", b"\2\3"],
    "seconds": [1.0, 2.0],
    "code": ["a", "a"],
}


@pytest.fixture
def folders(tmp_path):
    """Two folders of equal results."""
    both = tmp_path / "before", tmp_path / "after"
    for folder in both:
        (folder / "tables" / "ratio=0").mkdir(parents=True)
        write(folder)
    return both


def write(folder, metadata=None, **changed):
    table = pa.table(COLUMNS | changed).replace_schema_metadata(metadata)
    pq.write_table(table, folder / "tables" / "ratio=0" / "cells.parquet")


def differences(folders):
    return [
        line.removeprefix("tables/ratio=0/cells.parquet: ") for line in equal_tables.differences(*folders)
    ]


def test_equal_tables_have_no_differences(folders):
    assert differences(folders) == []
    write(folders[1], seconds=[3.0, 4.0], code=["b", "b"])
    assert differences(folders) == []


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (
            {"acc": [math.nextafter(0.5, 1), math.nan]},
            "acc differs in 1 of 2 rows, first in row 0: 0.5 became",
        ),
        ({"acc": [0.5, None]}, "acc differs in 1 of 2 rows, first in row 1: nan became None"),
        ({"asr": [0.25, 0.0]}, "asr differs in 1 of 2 rows, first in row 1: None became 0.0"),
        ({"attack": ["none", "badnets"]}, "attack differs in 2 of 2 rows, first in row 0: 'badnets' became"),
        ({"image": [b"\0\1", b"\2\4"]}, "image differs in 1 of 2 rows, first in row 1"),
        ({"acc": [1, 2]}, "other columns, types or metadata"),
        ({"more": [1, 2]}, "other columns, types or metadata"),
        ({"metadata": {"height": "32"}}, "other columns, types or metadata"),
        ({name: values[:1] for name, values in COLUMNS.items()}, "2 rows became 1"),
    ],
)
def test_each_difference_is_told(folders, changed, line):
    write(folders[1], **changed)
    (told,) = differences(folders)
    assert told.startswith(line)


def test_a_file_that_only_one_has_is_told(folders):
    before, after = folders
    (after / "tables" / "ratio=0" / "cells.parquet").rename(after / "tables" / "models.parquet")
    assert list(equal_tables.differences(before, after)) == [
        f"tables/models.parquet: only in {after}",
        f"tables/ratio=0/cells.parquet: only in {before}",
    ]


def test_the_command_fails_where_something_differs(folders, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["equal_tables.py", *map(str, folders)])
    assert equal_tables.main() == 0
    assert capsys.readouterr().out == "Equal, file by file: 1.\n"
    write(folders[1], acc=[0.5, 0.5])
    assert equal_tables.main() == 1
    monkeypatch.setattr("sys.argv", ["equal_tables.py", *[str(folders[0] / "nothing")] * 2])
    with pytest.raises(SystemExit, match="nothing to compare"):
        equal_tables.main()


# --- what lies beside tables ------------------------------------------------------------------------


CARD = {"psnr": 31.5, "ok": True, "hyperparameters": {"side": 3}, "seconds": 1.5, "git_commit": "c0ffee"}


def write_beside(folder, shift=0.0, metadata="a", content=b"png", **changed):
    tensors = {"weight": torch.tensor([[1.0, -0.0]]) + shift, "count": torch.tensor(3)}
    save_file(tensors, folder / "model.safetensors", {"build": metadata, "cell": "b"})
    (folder / "card.json").write_text(json.dumps(CARD | changed))
    (folder / "preview.png").write_bytes(content)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({}, ""),
        ({"seconds": 7.0, "git_commit": "beef"}, ""),
        ({"psnr": 31.5000001}, "card.json: psnr: 31.5 became 31.5000001"),
        ({"hyperparameters": {"side": 4}}, 'card.json: hyperparameters: {"side": 3} became {"side": 4}'),
        ({"ok": 1}, "card.json: ok: true became 1"),
        ({"more": 1}, "card.json: more: nothing became 1"),
        ({"shift": 1e-7}, "model.safetensors: tensor weight: other values"),
        ({"shift": torch.zeros(2, 2)}, "model.safetensors: tensor weight: F32 [1, 2] became F32 [2, 2]"),
        (
            {"shift": torch.zeros(1, 2, dtype=torch.float64)},
            "model.safetensors: tensor weight: F32 [1, 2] became F64",
        ),
        ({"metadata": "b"}, "model.safetensors: metadata build: a became b"),
        ({"content": b"gif"}, "preview.png: other content"),
    ],
)
def test_tensors_cards_and_pictures_are_compared(folders, changed, line):
    before, after = folders
    write_beside(before)
    write_beside(after, **changed)
    found = list(equal_tables.differences(before, after))
    assert len(found) == bool(line)
    assert not line or found[0].startswith(line)


def test_a_changed_sign_of_zero_is_told(folders):
    before, after = folders
    for folder, zero in ((before, 0.0), (after, -0.0)):
        save_file({"weight": torch.tensor([zero])}, folder / "trigger.safetensors")
        (folder / "card.json").write_text(json.dumps({"loss": zero}))
    assert list(equal_tables.differences(before, after)) == [
        "card.json: loss: 0.0 became -0.0",
        "trigger.safetensors: tensor weight: other values",
    ]


def test_the_report_and_the_study_file_are_left_out(folders):
    before, after = folders
    for folder, text in ((before, "a"), (after, "b")):
        (folder / "report").mkdir()
        (folder / "report" / "index.html").write_text(text)
        (folder / "study.yaml").write_text(text)
    assert list(equal_tables.differences(before, after)) == []


def test_a_broken_file_is_named(folders):
    before, after = folders
    (after / "tables" / "ratio=0" / "cells.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"tables/ratio=0/cells.parquet, in .* can't be read"):
        list(equal_tables.differences(before, after))
