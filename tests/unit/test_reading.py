"""Tables as pandas frames: types, categories, where they are looked for, what is said of what's wrong."""

import subprocess
import sys

import pandas as pd
import pyarrow as pa
import pytest

import detrojan
from detrojan import reading
from detrojan.analysis.statistics.collect import CELLS, MODELS
from detrojan.analysis.statistics.predictions import MEASURES
from detrojan.storage import records
from tests.unit.test_show import cell, model

CELL_ROWS = [
    cell("badnets", "ft", 0, acc=0.9, asr=0.2, ra=0.7, attack_took=True),
    cell("badnets", "anp", 1, status="diverged", reason="a loss is nan", attack_took=True),
    cell("none", "none", acc=0.95, spc=0, threat_model="none"),
    cell("badnets", "none", acc=0.94, asr=1.0, ra=0.0, spc=0, threat_model="none", attack_took=True),
]


@pytest.fixture
def results(tmp_path):
    """Return a folder of results with tables of cells and of models."""
    folder = tmp_path / "results"
    records.write_rows(CELL_ROWS, folder / "tables/cells.parquet", CELLS)
    models = [model("none", acc=0.95), model("badnets", acc=0.94, asr=1.0, ra=0.0, target=3)]
    records.write_rows(models, folder / "tables/models.parquet", MODELS)
    return folder


def test_columns_and_types(results):
    cells = detrojan.read_cells(results)
    assert list(cells.columns) == CELLS.names
    assert cells.index.equals(pd.RangeIndex(4))
    categories = ["dataset", "architecture", "attack", "defense", "threat_model", "status", "device"]
    assert [name for name in cells if cells[name].dtype == "category"] == [
        name for name in CELLS.names if name in categories
    ]
    kinds = {"attack_took": "boolean", "ratio": "float64", "seed": "int32", "reason": "string"}
    kinds |= {"peak_memory_bytes": "int64", "versions": "string", "asr": "float64", "der": "float64"}
    assert {name: str(cells[name].dtype) for name in kinds} == kinds
    assert cells["attack_took"].isna().tolist() == [False, False, True, False]
    assert cells["asr"].isna().tolist() == [False, True, True, False]
    assert cells["reason"].tolist() == [pd.NA, "a loss is nan", pd.NA, pd.NA]
    assert cells["acc"][0] == 0.9


def test_controls_come_first_and_unused_categories_are_absent(results):
    cells = detrojan.read_cells(results)
    assert cells["attack"].cat.categories.tolist() == ["none", "badnets"]
    assert cells["defense"].cat.categories.tolist() == ["none", "anp", "ft"]
    assert cells["threat_model"].cat.categories.tolist() == ["none", "clean_data"]
    assert cells["status"].cat.categories.tolist() == ["ok", "diverged"]
    assert cells["defense"].tolist() == ["ft", "anp", "none", "none"]


def test_whole_numbers_that_may_be_missing_stay_whole_numbers(results):
    models = detrojan.read_models(results)
    assert (str(models["target"].dtype), models["target"].tolist()) == ("Int16", [pd.NA, 3])
    assert str(models["num_train"].dtype) == "int32"
    assert models["label_map"].dtype == "category"


def test_the_folder_of_results_that_of_tables_and_the_file(results, monkeypatch):
    expected = detrojan.read_cells(results)
    for path in (results / "tables", results / "tables/cells.parquet", str(results)):
        pd.testing.assert_frame_equal(detrojan.read_cells(path), expected)
    monkeypatch.chdir(results.parent)
    pd.testing.assert_frame_equal(detrojan.read_cells(), expected)
    elsewhere = results.parent / "their numbers.pq"
    (results / "tables/cells.parquet").rename(elsewhere)
    pd.testing.assert_frame_equal(detrojan.read_cells(elsewhere), expected)


def test_some_columns_in_the_order_asked_for(results):
    cells = detrojan.read_cells(results, columns=["der", "attack"])
    assert list(cells.columns) == ["der", "attack"]
    with pytest.raises(ValueError, match="no column 'atack'; did you mean 'attack'"):
        detrojan.read_cells(results, columns=["atack"])


def test_row_groups_with_words_of_their_own(tmp_path):
    path = tmp_path / "cells.parquet"
    with records.table_writer(path, CELLS) as writer:
        for row in CELL_ROWS:
            writer.write_table(pa.Table.from_pylist([row], CELLS))
    assert detrojan.read_cells(path)["defense"].tolist() == ["ft", "anp", "none", "none"]


def test_measures_of_classes(tmp_path):
    key = {name: CELL_ROWS[0][name] for name in MEASURES.names if name in CELLS.names}
    rows = [
        key | {"measure": "acc", "label": None, "value": 0.5, "num_images": 8},
        key | {"measure": "class_acc", "label": 3, "value": None, "num_images": 0},
    ]
    records.write_rows(rows, tmp_path / "measures.parquet", MEASURES)
    measures = detrojan.read_measures(tmp_path)
    assert (str(measures["label"].dtype), measures["label"].tolist()) == ("Int16", [pd.NA, 3])
    assert measures["measure"].cat.categories.tolist() == ["acc", "class_acc"]
    assert measures["value"].isna().tolist() == [False, True]


def test_a_missing_table(results):
    with pytest.raises(ValueError, match=r"no summary.parquet \(tables there: .*cells.parquet, .*models"):
        detrojan.read_summary(results)
    with pytest.raises(ValueError, match=r"no tables there\); make it with `snakemake --profile local`"):
        detrojan.read_cells(results / "nowhere")
    with pytest.raises(ValueError, match="make it with `detrojan measure`"):
        detrojan.read_measures(results)
    with pytest.raises(ValueError, match=r"tables there: .*cells.parquet"):
        detrojan.read_cells(results / "tables/cell.parquet")


def test_a_table_of_another_version(results):
    path = results / "tables/cells.parquet"
    table = records.read_table(path)
    other = table.drop_columns("der").append_column("psnr", table["acc"])
    records.write_table(other, path, other.schema)
    with pytest.raises(
        ValueError, match=r"not this version's columns \(no der, unknown psnr\); run what made"
    ):
        detrojan.read_cells(path)
    wrong = table.set_column(0, "dataset", pa.array(range(4)))
    records.write_table(wrong, path, wrong.schema)
    with pytest.raises(ValueError, match=r"\(dataset is int64 and not string\)"):
        detrojan.read_cells(path)


def test_a_truncated_table(results):
    path = results / "tables/cells.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole Parquet table"):
        detrojan.read_cells(path)


@pytest.mark.parametrize("name", reading.names())
def test_every_table_has_a_reader(name, tmp_path):
    schema = reading.schema(name)
    records.write_table(schema.empty_table(), tmp_path / f"{name}.parquet", schema)
    frame = getattr(detrojan, f"read_{name}")(tmp_path)
    assert list(frame.columns) == schema.names


def test_all_readers_are_named():
    assert sorted(detrojan.__all__) == sorted(f"read_{name}" for name in reading.names())


def test_importing_the_package_imports_no_pandas():
    """The Snakefile imports the package at every parse, in every job."""
    code = (
        "import sys, detrojan\n"
        "assert not {'pandas', 'pyarrow', 'numpy', 'torch'} & sys.modules.keys()\n"
        "assert not hasattr(detrojan, 'read_everything')\n"
        "detrojan.read_cells\n"
        "assert 'pandas' in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


NO_TORCH = """
import sys
class NoTorch:  # None in sys.modules would do, but SciPy takes it for the module
    def find_spec(name, path, target=None):
        if name == "torch":
            raise ModuleNotFoundError("this machine has no torch")
sys.meta_path.insert(0, NoTorch)
import detrojan
for name in detrojan.__all__:
    getattr(detrojan, name)(sys.argv[1])
"""


def test_every_table_is_read_without_torch(tmp_path):
    for name in reading.names():
        schema = reading.schema(name)
        records.write_table(schema.empty_table(), tmp_path / f"{name}.parquet", schema)
    subprocess.run([sys.executable, "-c", NO_TORCH, tmp_path], check=True)
