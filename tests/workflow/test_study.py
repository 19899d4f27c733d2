"""A whole study: what it leaves, and what its tables say."""

import json

import pyarrow.parquet as pq
import pytest

from detrojan.analysis import derived
from detrojan.analysis.statistics import collect
from detrojan.learning import metrics
from detrojan.stages import evaluate
from detrojan.storage import artifacts, columns, records
from detrojan.storage.columns import NOT_APPLICABLE, OK


def test_every_cell_ends_as_a_row(finished):
    rows = finished.table("cells").to_pylist()
    # Two models: untouched and CLP once each, two draws of FT and of Grad-Prune.
    assert len(rows) == 2 * (1 + 1 + 2 + 2)
    assert {(r["attack"], r["defense"], r["status"]) for r in rows if r["status"] != OK} == {
        ("none", "grad_prune", NOT_APPLICABLE)
    }
    assert all(r["reason"] for r in rows if r["status"] != OK)


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("cells", collect.CELLS),
        ("models", collect.MODELS),
        *((name, table.schema) for name, table in derived.TABLES.items()),
    ],
)
def test_tables_have_their_declared_schema(finished, name, schema):
    found = pq.read_schema(finished.folder / f"results/tables/{name}.parquet")
    assert found.remove_metadata().equals(schema.remove_metadata())


def test_the_page_says_what_the_data_sets_hold(finished):
    page = (finished.folder / "results/report/index.html").read_text()
    numbers = "".join(f'<td class="n">{number}</td>' for number in (10, 70, 30, 100, 0, 0, 0, 0))
    assert f'<th scope="row" class="stick">tiny</th>{numbers}' in page


def test_measures_follow_from_stored_predictions(finished):
    results = finished.folder / "results"
    test = artifacts.read_images(results / "datasets/tiny/test.parquet")
    triggered = artifacts.read_images(results / "triggered/tiny/badnets/seed-0/test.parquet")
    shard = results / "metrics/tiny/preactresnet18/badnets/ratio-0.1/seed-0/ft/survey/spc-2/draws-0-1"
    rows = records.read_rows(shard / "metrics.parquet", columns.METRICS)
    predictions = records.read_table(shard / "predictions.parquet", columns.PREDICTIONS).to_pandas()
    labels = dict(zip(test.index.tolist(), test.labels.tolist(), strict=True))
    for row in rows:
        own = predictions[predictions["draw"] == row["draw"]]
        clean, stamped = own[~own["triggered"]], own[own["triggered"]]
        assert len(clean) == row["num_test"] == len(test)
        assert len(stamped) == row["num_triggered"] == len(triggered)
        assert (clean["predicted"] == clean["index"].map(labels)).mean() == pytest.approx(row["acc"])
        assert (stamped["predicted"] == 0).mean() == pytest.approx(row["asr"])
        assert (stamped["predicted"] == stamped["index"].map(labels)).mean() == pytest.approx(row["ra"])
        assert 0 not in set(stamped["index"].map(labels))


def test_untouched_models_are_measured_as_trained(finished):
    results = finished.folder / "results"
    test = artifacts.read_images(results / "datasets/tiny/test.parquet")
    for row in finished.table("models").to_pylist():
        ratio = "0.1" if row["attack"] != "none" else "0"
        folder = f"models/tiny/preactresnet18/{row['attack']}/ratio-{ratio}/seed-0"
        model = artifacts.read_model(results / folder / "model.safetensors")
        assert metrics.accuracy(evaluate.predict(model, test), test.labels) == row["acc"]
        assert (row["asr"] is None) == (row["attack"] == "none")


def test_a_model_row_tells_how_it_was_made(finished):
    clean, attacked = sorted(finished.table("models").to_pylist(), key=lambda row: row["ratio"])
    assert (clean["num_poisoned"], clean["effective_ratio"], clean["target"]) == (0, 0.0, None)
    assert attacked["num_train"] == 70  # 10 of each class, 3 of them held out
    assert attacked["num_poisoned"] == 7
    assert attacked["effective_ratio"] == pytest.approx(0.1)
    assert json.loads(attacked["attack_hyperparameters"]) == {"side": 3}
    assert json.loads(attacked["architecture_settings"]) == {"width": 4}
    assert json.loads(attacked["optimization"])["epochs"] == attacked["epochs"] == 3
    assert attacked["linf"] == 255


def test_nothing_temporary_is_left(finished):
    names = [path.name for path in (finished.folder / "results").rglob("*")]
    assert not [name for name in names if "partial" in name or "checkpoint" in name]
    assert "defended" not in {path.parent.name for path in (finished.folder / "results").rglob("*")}
    assert not list((finished.folder / "logs/attempts").iterdir())


def test_repaired_weights_stay_if_asked_for(workshop):
    study = workshop.study() | {"keep_defended": True}
    study["grid"] |= {"defenses": ["none", "ft"], "attacks": ["badnets"], "draws": ["7-7"]}
    workshop.write(study)
    workshop.snakemake("--until", "evaluate")
    (kept,) = workshop.folder.glob("results/defended/*/*/badnets/*/*/ft/*/*/draws-7-7/*.safetensors")
    assert kept.name == "draw-7.safetensors"


def test_a_cell_is_the_same_in_another_shard(workshop):
    study = workshop.study()
    study["grid"] |= {"draws": ["1-1"]}
    before = workshop.table("cells").to_pylist()
    workshop.write(study)
    workshop.snakemake("--until", "aggregate")
    after = workshop.table("cells").to_pylist()
    assert len(after) == len(before) - 4
    assert all(row in before for row in after)


def test_broken_input_is_one_clear_line_and_leaves_nothing(workshop):
    (sample,) = workshop.folder.glob("results/samples/tiny/spc-2/draws-0-1.parquet")
    sample.write_bytes(sample.read_bytes()[:-200])
    (rows,) = workshop.folder.glob("results/metrics/*/*/badnets/*/*/ft/*/*/*/metrics.parquet")
    before = rows.read_bytes()
    shard = rows.parent.relative_to(workshop.folder / "results/metrics")
    output = workshop.snakemake("-R", f"results/defended/{shard}", "--until", "defend", check=False)
    assert workshop.returncode != 0
    # One for each job that had begun: all that read the sample are out of date with it.
    lines = {line for line in output.splitlines() if line.startswith("ERROR: rule defend, dataset=tiny")}
    assert lines
    for line in lines:
        assert "draws-0-1.parquet: not a whole" in line
        path = sample.relative_to(workshop.folder)
        assert line.endswith(f"run your study with -R {path}, as `snakemake --profile local -R {path}`")
    assert "Traceback" not in output
    # The rows of the run before, and nothing half-written.
    assert rows.read_bytes() == before
    assert not [path for path in (workshop.folder / "results/defended").rglob("*") if path.is_file()]
    # What is left is the record of the failure.
    failed = [path.read_text() for path in (workshop.folder / "logs/attempts").iterdir()]
    assert any("not a whole" in text for text in failed)
