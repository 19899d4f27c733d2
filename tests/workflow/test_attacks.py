"""Triggers that belong to an architecture or to a model, from the data set to the tables."""

import json

import pytest

from detrojan.learning import metrics
from detrojan.storage import artifacts, records
from detrojan.storage.columns import OK

from .conftest import Workshop

ATTACKS = ("lf", "iab")  # a trigger of an architecture; one of a model, with networks that learn along


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """A finished study of these attacks, with all-to-all labels."""
    workshop = Workshop.make(tmp_path_factory.mktemp("attacks") / "study")
    study = workshop.study()
    study["label_map"] = "all_to_all"
    study["attacks"] = {
        "lf": {"num_images": 10, "max_passes": 2, "eval_per_class": 2},
        "iab": {"mask_epochs": 1, "mask_batch_size": 8, "max_images": 16},
    }
    study["grid"] |= {"attacks": ["none", *ATTACKS], "defenses": ["none", "grad_prune"], "draws": ["0-0"]}
    study["gate"] = {"min_asr": 0, "max_acc_loss": 1, "min_asr_gain": -1}
    workshop.write(study)
    workshop.snakemake()
    return workshop


def model_folder(attack):
    return f"tiny/preactresnet18/{attack}/ratio-0.1/seed-0"


def test_every_cell_ends_as_a_row(attacked):
    rows = attacked.table("cells").to_pylist()
    assert {(row["attack"], row["defense"]) for row in rows if row["status"] == OK} == {
        ("none", "none"),
        *((attack, defense) for attack in ATTACKS for defense in ("none", "grad_prune")),
    }


def test_a_trigger_lies_with_whom_it_belongs_to(attacked):
    results = attacked.folder / "results"
    assert (results / "triggers/tiny/preactresnet18/lf/seed-0/trigger.safetensors").is_file()
    assert (results / f"poisoned/{model_folder('lf')}/train.parquet").is_file()
    assert (results / "triggers/tiny/iab/seed-0/trigger.safetensors").is_file()  # the mask
    assert (results / f"models/{model_folder('iab')}/trigger.safetensors").is_file()
    assert not (results / "poisoned/tiny/iab").exists()
    for attack in ATTACKS:
        assert (results / f"triggered/{model_folder(attack)}/test.parquet").is_file()
        assert (results / f"stamped/{model_folder(attack)}/spc-2/draws-0-0.parquet").is_file()


def test_test_images_carry_the_trigger_that_the_model_was_trained_with(attacked):
    from detrojan import registry

    results = attacked.folder / "results"
    test = artifacts.read_images(results / "datasets/tiny/test.parquet")
    places = {
        "lf": results / "triggers/tiny/preactresnet18/lf/seed-0/trigger.safetensors",
        "iab": results / f"models/{model_folder('iab')}/trigger.safetensors",
    }
    for attack in ATTACKS:
        triggered = artifacts.read_images(results / f"triggered/{model_folder(attack)}/test.parquet")
        trigger, _ = artifacts.read_tensors(places[attack])
        method = registry.load("attacks", attack)
        assert triggered.images.equal(method.apply(test.images, trigger))
        # All-to-all: each class should become the next one, and every image counts.
        assert triggered.labels.equal((test.labels + 1) % 10)
        card = records.read_card(results / f"triggered/{model_folder(attack)}/card.json")
        assert (card["label_map"], card["target"]) == ("all_to_all", None)
        assert card["linf"] == metrics.linf(test.images, triggered.images)


def test_a_model_row_tells_how_its_batches_were_poisoned(attacked):
    rows = {row["attack"]: row for row in attacked.table("models").to_pylist()}
    assert rows["lf"]["num_poisoned"] == 7
    assert rows["lf"]["effective_ratio"] == pytest.approx(0.1)
    # Three epochs of 70 images in batches of 32, 32 and 6: 3.2, 3.2 and 0.6 images in the mean.
    history = records.read_table(
        attacked.folder / f"results/models/{model_folder('iab')}/history.parquet"
    ).to_pylist()
    poisoned = [row["num_poisoned"] for row in history]
    assert all(6 <= count <= 9 for count in poisoned)
    assert rows["iab"]["effective_ratio"] == pytest.approx(sum(poisoned) / (3 * 70))
    assert rows["iab"]["label_map"] == "all_to_all"
    assert json.loads(rows["iab"]["attack_hyperparameters"])["mask_epochs"] == 1
    assert rows["none"]["label_map"] is None


def test_the_contact_sheet_shows_both(attacked):
    sheet = (attacked.folder / "results/report/figures/triggers-tiny.svg").read_text()
    assert all(attack in sheet for attack in ATTACKS)


def test_editing_an_attack_reruns_what_is_its_own(attacked):
    attacked.edit("src/detrojan/attacks/training_control/iab.py", "EPSILON = 1e-7", "EPSILON = 2e-7")
    planned = attacked.planned()
    attacked.edit("src/detrojan/attacks/training_control/iab.py", "EPSILON = 2e-7", "EPSILON = 1e-7")
    assert planned == {
        "trigger": 1,
        "train_controlled": 1,
        "triggered_own": 1,
        "stamp_own": 1,
        "defend": 1,
        "evaluate": 1,
        "evaluate_untouched": 1,
        "check_trigger": 1,
        "aggregate": 1,
        "report": 1,
        "all": 1,
    }
    assert attacked.planned() == {}
