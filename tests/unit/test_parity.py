"""Theirs beside ours: which belong together, how they differ, and how the settings do."""

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
import yaml
from scipy import stats

from detrojan.analysis import derived
from detrojan.analysis.others import external, parity
from detrojan.analysis.statistics.collect import CELLS, MODELS, NOTHING_MEASURED
from detrojan.analysis.statistics.relative import relative
from detrojan.storage import records
from detrojan.study import files
from tests.command import exit_code

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "config" / "external" / "backdoorbench.yaml"
LEADERBOARD = ROOT.parent / "shared" / "data" / "leaderboard.csv"

STUDY = {
    "pool": "train",
    "datasets": {
        "gtsrb": {
            "source": "huggingface_parquet",
            "path": "data/gtsrb",
            "image_size": 16,
            "classes": list(range(10)),
            "augmentation": {"crop_padding": 2},
        }
    },
    "grid": {
        "datasets": ["gtsrb"],
        "architectures": ["preactresnet18"],
        "attacks": ["badnets"],
        "ratios": [0.1],
        "defenses": ["none", "ft", "fp", "clp"],
        "spc": [10, 100],
        "draws": ["0-2"],
    },
}
# One model; ACC of the three draws of fine-tuning 0.80, 0.82, 0.84.
OURS = [
    ("none", 0, 0, 0.9, 0.9, 0.1),
    *(("ft", 10, draw, 0.80 + 0.02 * draw, 0.3, 0.6) for draw in range(3)),
    *(("ft", 100, draw, 0.88, 0.1, 0.7) for draw in range(3)),
    *(("fp", 10, draw, 0.7, 0.2, 0.5) for draw in range(3)),
    ("clp", 0, 0, 0.85, 0.4, 0.5),
]
THEIRS = """\
dataset,backbone,attack_name,defense_name,ratio,test_acc,test_asr,test_ra
gtsrb,preactresnet18,badnet,no defense,0.1,0.97,0.95,0.04
gtsrb,preactresnet18,badnet,ft,0.1,0.98,0.05,0.9
gtsrb,preactresnet18,badnet,fp,0.1,0.90,0.2,0.6
gtsrb,preactresnet18,badnet,clp,0.1,0.95,0.5,0.5
gtsrb,preactresnet18,badnet,no defense,0.05,0.96,0.85,0.1
gtsrb,preactresnet18,badnet,ft,0.05,0.97,0.04,0.9
gtsrb,preactresnet18,badnet,fp,0.05,,,
gtsrb,preactresnet18,badnet,nad,0.1,0.9,0.1,0.9
gtsrb,vgg19_bn,badnet,ft,0.1,0.9,0.1,0.9
"""


def our_cells(rows=OURS, ratio=0.1, *, took=True, seed=0):
    frame = pd.DataFrame(rows, columns=["defense", "spc", "draw", "acc", "asr", "ra"])
    frame = frame.assign(
        dataset="gtsrb", architecture="preactresnet18", attack="badnets", ratio=ratio, seed=seed,
        attack_took=took, status="ok", reason=None, **NOTHING_MEASURED,
    )  # fmt: skip
    frame["threat_model"] = frame["defense"].map(
        {"none": "none", "ft": "clean_data", "fp": "clean_data", "clp": "data_free"}
    )
    frame["protocol"] = frame["defense"].where(frame["defense"] == "none", "survey")
    frame["hyperparameters"] = frame["defense"].map({"ft": '{"epochs": 20, "lr": 0.01}'}).fillna("{}")
    frame = frame.assign(**dict(relative(frame).items()))
    return pa.Table.from_pandas(frame[CELLS.names], CELLS, preserve_index=False)


def our_model(ratio=0.1, *, seed=0):
    return (
        dict.fromkeys(MODELS.names, 0)
        | {"dataset": "gtsrb", "architecture": "preactresnet18", "attack": "badnets", "ratio": ratio}
        | {field.name: True for field in MODELS if field.type == pa.bool_()}
        | {"seed": seed, "acc": 0.9, "asr": 0.9, "ra": 0.1, "attack_took": True, "num_train": 2000}
        | dict.fromkeys(("gate_reason", "trigger_weakness", "label_map"))
        | {"attack_hyperparameters": '{"side": 3}', "architecture_settings": '{"width": 8}', "epochs": 15}
        | {"optimization": json.dumps({"epochs": 15, "batch_size": 128, "lr": 0.05, "schedule": "cosine"})}
        | dict.fromkeys(("device", "code", "versions", "git_commit"), "")
    )


def results_of(folder, cells, models=None):
    records.write_table(cells, folder / "tables" / "cells.parquet", CELLS)
    table = pa.Table.from_pylist(models or [our_model()], MODELS)
    records.write_table(table, folder / "tables" / "models.parquet", MODELS)
    files.keep(STUDY, folder)
    return parity.read_ours(folder)


@pytest.fixture(scope="module")
def mapping():
    return external.load_mapping(SHIPPED)


@pytest.fixture
def beside(tmp_path, mapping):
    """Set a table of theirs beside cells of ours."""

    def set_beside(cells, table=THEIRS, models=None):
        (tmp_path / "theirs.csv").write_text(table)
        theirs = external.cells(external.read_table(tmp_path / "theirs.csv"), mapping)
        return parity.parity(theirs, results_of(tmp_path / "results", cells, models), mapping)

    return set_beside


def by_key(pairs):
    return {(row["ratio"], row["defense"]): row for row in pairs.to_pylist()}


def test_pairs_and_what_is_left_out(beside):
    both = beside(our_cells())
    assert set(by_key(both.pairs)) == {
        (0.1, "none"), (0.1, "ft"), (0.1, "fp"), (0.1, "clp"), (0.05, "none"), (0.05, "ft")
    }  # fmt: skip
    # nad, and vgg19_bn; fine-pruning at 0.05.
    assert both.left_out == {
        "not in our study": 2,
        "no value in their table": 1,
        "no result in our study": 0,
    }


def test_a_defense_without_a_result_is_counted(beside):
    cells = our_cells().to_pandas()
    failed = cells["defense"] == "fp"
    cells.loc[failed, "status"] = "diverged"
    both = beside(pa.Table.from_pandas(cells, CELLS, preserve_index=False))
    assert (0.1, "fp") not in by_key(both.pairs)
    assert both.left_out["no result in our study"] == 1
    assert both.left_out["no value in their table"] == 1


def test_the_nearest_budget_that_has_a_result(beside):
    cells = our_cells().to_pandas()
    cells.loc[cells["spc"] == 100, "status"] = "diverged"
    row = by_key(beside(pa.Table.from_pandas(cells, CELLS, preserve_index=False)).pairs)[0.1, "ft"]
    assert (row["our_spc"], row["our_acc"]) == (10, pytest.approx(0.82))


def test_a_pair_in_numbers(beside):
    # 5 % of GTSRB is 45.6 images a class: in proportion nearer to 100 than to 10.
    row = by_key(beside(our_cells()).pairs)[0.1, "ft"]
    assert (row["our_spc"], row["our_num_models"], row["our_num_runs"], row["num_runs"]) == (100, 1, 3, 1)
    assert (row["acc"], row["our_acc"]) == (0.98, pytest.approx(0.88))
    assert row["acc_difference"] == pytest.approx(-0.1)
    assert row["asr_difference"] == pytest.approx(0.05)
    # Our three draws are all alike: no spread was seen, and so there's no interval.
    assert (row["acc_within"], row["our_interval_over"]) == (None, "draws")
    assert row["comparable"]
    alone = by_key(beside(our_cells()).pairs)[0.1, "clp"]
    assert (alone["acc_within"], alone["our_acc_low"]) == (None, None)  # one run has no interval


@pytest.mark.parametrize(("acc", "within"), [(0.81, True), (0.99, False)])
def test_theirs_within_our_interval(beside, acc, within):
    rows = [row for row in OURS if row[1] != 100]
    table = THEIRS.replace("ft,0.1,0.98", f"ft,0.1,{acc}")
    row = by_key(beside(our_cells(rows), table).pairs)[0.1, "ft"]
    assert row["our_acc"] == pytest.approx(0.82)
    assert row["our_acc_low"] < 0.82 < row["our_acc_high"]
    assert row["acc_within"] is within


def test_differences_are_spelled_out(beside):
    rows = by_key(beside(our_cells()).pairs)
    setting = (
        "16 px / 32 px; 10 of 43 classes; training images 2,000 / 39,209; width 8 / 64; epochs 15 / 50; "
        "lr 0.05 / 0.01; schedule cosine / cosine of 100 epochs, half run; crop padding 2 / 4"
    )
    assert rows[0.1, "none"]["differences"] == setting
    assert rows[0.1, "ft"]["differences"] == (
        f"SPC 100 / 5 % of the training set; {setting}; ft epochs 20 / 100; 3 draws of 1 model / 1 model"
    )
    assert rows[0.1, "clp"]["differences"] == setting  # it is given no images
    assert rows[0.05, "none"]["differences"] == f"ratio 0.1 / 0.05; {setting}"
    assert rows[0.1, "fp"]["differences"].endswith("theirs stops pruning by accuracy on the test set")


def test_nearest_ratio_and_which_pairs_are_comparable(beside):
    cells = pa.concat_tables([our_cells(), our_cells(ratio=0.01)])
    rows = by_key(beside(cells, models=[our_model(), our_model(0.01)]).pairs)
    assert rows[0.05, "ft"]["our_ratio"] == 0.1  # twice as much, and not a fifth
    assert not rows[0.05, "ft"]["comparable"]
    assert rows[0.1, "ft"]["comparable"]


def test_pairs_of_attacks_that_did_not_take(beside):
    both = beside(our_cells(took=False))
    rows = by_key(both.pairs)
    assert not rows[0.1, "ft"]["comparable"]
    assert "attack took no / yes" in rows[0.1, "ft"]["differences"]
    assert rows[0.1, "none"]["comparable"]  # how strong the attack is, is what they compare
    # Of two seeds, the one whose attack took stands for ours.
    both = beside(
        pa.concat_tables([our_cells(took=False), our_cells(seed=1)]), models=[our_model(), our_model(seed=1)]
    )
    assert by_key(both.pairs)[0.1, "ft"]["our_attack_took"] is True


def test_budgets_without_a_number_are_met_by_our_largest(tmp_path, mapping):
    (tmp_path / "theirs.csv").write_text(THEIRS)
    theirs = external.cells(external.read_table(tmp_path / "theirs.csv"), mapping)
    bare = mapping.model_copy(update={"settings": mapping.settings.model_copy(update={"overrides": []})})
    ours = results_of(tmp_path / "results", our_cells())
    assert by_key(parity.parity(theirs, ours, bare).pairs)[0.1, "ft"]["our_spc"] == 100
    for spc, our_spc, said in ((12, 10, "SPC 10 / SPC 12; 16 px"), (10, 10, "16 px")):
        column = pa.array([spc] * len(theirs), pa.int32())
        given = theirs.set_column(CELLS.get_field_index("spc"), CELLS.field("spc"), column)
        row = by_key(parity.parity(given, ours, mapping).pairs)[0.1, "ft"]
        assert row["our_spc"] == our_spc
        assert row["differences"].startswith(said)


def test_seeds_are_models(beside):
    cells = pa.concat_tables([our_cells(), our_cells(seed=1)])
    row = by_key(beside(cells, models=[our_model(), our_model(seed=1)]).pairs)[0.1, "ft"]
    assert (row["our_num_models"], row["our_num_runs"], row["our_interval_over"]) == (2, 6, "models_draws")
    assert row["differences"].endswith("6 draws of 2 models / 1 model")


def test_classes_are_counted_where_the_images_lie(beside, tmp_path):
    folder = tmp_path / "results" / "datasets" / "gtsrb"
    folder.mkdir(parents=True)
    metadata = {"detrojan": json.dumps({"classes": ["a"] * 7})}
    table = pa.table({"index": [0]}).replace_schema_metadata(metadata)
    pa.parquet.write_table(table, folder / "train.parquet")
    assert "7 of 43 classes" in by_key(beside(our_cells()).pairs)[0.1, "none"]["differences"]


def test_by_defense(beside):
    both = beside(our_cells())
    rows = {row["defense"]: row for row in parity.by_defense(both.pairs).to_pylist()}
    # Those of ratio 0.05 are not comparable: ours has none.
    assert {name: row["num_pairs"] for name, row in rows.items()} == {
        "clp": 1, "fp": 1, "ft": 1, "none": 1, None: 4
    }  # fmt: skip
    assert rows["ft"]["acc_difference"] == pytest.approx(-0.1)
    assert rows["ft"]["acc_correlation"] is None
    # Ours 0.9, 0.88, 0.7, 0.85 against 0.97, 0.98, 0.9, 0.95.
    together = rows[None]
    assert together["acc_difference"] == pytest.approx((-0.07 - 0.1 - 0.2 - 0.1) / 4)
    expected = stats.pearsonr([0.9, 0.88, 0.7, 0.85], [0.97, 0.98, 0.9, 0.95]).statistic
    assert together["acc_correlation"] == pytest.approx(expected)
    assert together["acc_spearman"] == pytest.approx(0.8)  # of four ranks two are swapped
    assert together["acc_kendall"] == pytest.approx(2 / 3)
    assert together["acc_within"] is None


def test_agreement_is_over_defenses_in_each_setting(beside):
    rows = {row["measure"]: row for row in parity.agreement(beside(our_cells()).pairs).to_pylist()}
    # ASR of ft, fp, clp: ours 0.1, 0.2, 0.4; theirs 0.05, 0.2, 0.5. RA: 0.7, 0.5, 0.5; 0.9, 0.6, 0.5.
    assert rows["asr"] == {"measure": "asr", "num_settings": 1, "spearman": pytest.approx(1), "kendall": 1.0}
    assert rows["ra"]["spearman"] == pytest.approx(
        stats.spearmanr([0.7, 0.5, 0.5], [0.9, 0.6, 0.5]).statistic
    )


def test_nothing_in_common(beside):
    both = beside(our_cells(), THEIRS.replace("gtsrb", "cifar10"))
    assert both.pairs.num_rows == 0
    assert both.left_out["not in our study"] == 9
    assert both.apart == ["No dataset in common: ours gtsrb; theirs cifar10."]
    assert parity.by_defense(both.pairs).num_rows == 0
    assert {row["num_settings"] for row in parity.agreement(both.pairs).to_pylist()} == {0}


def test_results_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="no such Parquet table"):
        parity.read_ours(tmp_path)
    results_of(tmp_path, our_cells())
    (tmp_path / "study.yaml").unlink()
    with pytest.raises(ValueError, match=r"study\.yaml is missing"):
        parity.read_ours(tmp_path)


# --- the command -----------------------------------------------------------------------------------


def test_command(tmp_path, capsys):
    (tmp_path / "theirs.csv").write_text(THEIRS)
    results_of(tmp_path / "results", our_cells())
    into = tmp_path / "out"
    asked = [str(tmp_path / "theirs.csv"), "--mapping", str(SHIPPED), "--into", str(into)]
    assert exit_code("compare", *asked, "--results", tmp_path / "results") == 0
    assert "6 of theirs stand beside ours, 4 of them" in capsys.readouterr().out
    for name, schema in {"cells": CELLS, **{name: of.schema for name, of in derived.TABLES.items()}}.items():
        records.read_table(into / "tables" / f"{name}.parquet", schema)
    for name in ("parity", "parity_by_defense", "parity_agreement"):
        table = records.read_table(into / "tables" / f"{name}.parquet")
        assert len(pd.read_csv(into / "tables" / f"{name}.csv")) == len(table)
    html = (into / "report" / "index.html").read_text()
    assert "BackdoorBench leaderboard, analysed by Detrojan" in html
    assert "6 of theirs stand beside ours" in html
    assert yaml.safe_load((into / "mapping.yaml").read_text()) == yaml.safe_load(SHIPPED.read_text())
    page = (into / "README.md").read_text()
    assert "| ft | 1 | -10.0 | – | 5.0 | – | -20.0 | – |" in page
    assert "88.0 / 98.0" in page
    [line] = [
        line
        for line in (into / "tables" / "parity.tex").read_text().splitlines()
        if " ft " in line and ", ratio 0.1 " in line
    ]
    assert line.startswith(r"gtsrb · preactresnet18 · badnets, ratio 0.1 & ft & 88.0 / 98.0 & 10.0 / 5.0 & ")
    assert line.endswith(r"3 draws of 1 model / 1 model \\")
    assert r"SPC 100 / 5 \% of the training set; " in line
    # Ranked are mitigations alone.
    ranked = set(records.read_table(into / "tables" / "ranks.parquet")["defense"].to_pylist())
    assert ranked <= {"ft", "fp", "clp", "nad"}


def test_command_says_what_is_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("theirs.csv").write_text("dataset,backbone\na,b\n")
    assert exit_code("compare", "theirs.csv", "--mapping", SHIPPED) == 1
    assert "detrojan: the table has 6 mistakes" in capsys.readouterr().err
    assert not Path("compare").exists()
    assert exit_code("compare", "theirs.csv", "--mapping", "none.yaml") == 1
    assert "none.yaml: No such file" in capsys.readouterr().err


def test_leaderboard_beside_a_study(tmp_path, mapping):
    if not LEADERBOARD.exists():
        pytest.skip("the leaderboard is not here")
    theirs = external.cells(external.read_table(LEADERBOARD), mapping)
    both = parity.parity(theirs, results_of(tmp_path, our_cells()), mapping)
    assert both.pairs.num_rows == 20  # five ratios of three defenses and the untouched model
    assert sum(both.left_out.values()) + both.pairs.num_rows == 15360
