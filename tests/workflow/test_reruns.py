"""Only what changed reruns: jobs are counted after each kind of change to a finished study."""

import copy
import os
import shutil

from .conftest import STUDY

# What follows any new metrics.
TABLES = {"aggregate": 1, "report": 1, "all": 1}
METHOD = "src/detrojan/defenses/clean_data/ft.py"


def changed(**grid):
    study = copy.deepcopy(STUDY)
    study["grid"] |= grid
    return study


def test_a_finished_study_has_nothing_to_do(workshop):
    assert workshop.planned() == {}


def test_a_fresh_checkout_reruns_nothing(workshop):
    for folder in ("src", "rules", "scripts"):
        for path in (workshop.code / folder).rglob("*"):
            os.utime(path)
    os.utime(workshop.code / "Snakefile")
    assert workshop.planned() == {}


def test_comments_rerun_nothing(workshop):
    workshop.write(STUDY, comment="# only a comment\n")
    workshop.edit(METHOD, "class FT", "# only a comment\n\n\nclass FT")
    workshop.edit(METHOD, "Train all weights on;", "Train on all the weights:")
    assert workshop.planned() == {}


def test_an_edited_defense_reruns_exactly_its_shards(workshop):
    workshop.edit(METHOD, "images = clean.everything", "images = clean.train")
    expected = {"defend": 2, "evaluate": 2} | TABLES
    assert workshop.planned() == expected
    before = workshop.table("cells")
    output = workshop.snakemake()
    assert "9 of 9 steps" in output or f"{sum(expected.values())} of {sum(expected.values())} steps" in output
    after = workshop.table("cells")
    assert before.num_rows == after.num_rows
    differs = {
        row["defense"] for row, old in zip(after.to_pylist(), before.to_pylist(), strict=True) if row != old
    }
    assert differs == {"ft"}
    assert workshop.planned() == {}


def test_an_edited_attack_reruns_what_stands_on_it(workshop):
    workshop.edit("src/detrojan/attacks/data_poisoning/badnets.py", "= 255", "= 254")
    planned = workshop.planned()
    assert (
        planned
        == {
            "trigger": 1,
            "poison": 1,
            "triggered": 1,
            "stamp": 1,
            "train": 1,
            "defend": 3,
            "evaluate": 3,
            "evaluate_untouched": 1,
            "check_trigger": 1,
        }
        | TABLES
    )


def test_an_edited_shared_module_reruns_its_users(workshop):
    workshop.edit("src/detrojan/learning/metrics.py", "side, sigma = 11, 1.5", "side, sigma = 11, 1.6")
    planned = workshop.planned()
    # metrics.py serves evaluation and the cards of poisoned sets, which the models stand on.
    assert planned["poison"] == 1
    assert planned["evaluate_untouched"] == 2
    assert "dataset" not in planned
    assert "sample" not in planned


def test_a_setting_of_a_defense_reruns_its_shards(workshop):
    study = copy.deepcopy(STUDY)
    study["defenses"]["grad_prune"]["max_rounds"] = 1
    workshop.write(study)
    assert workshop.planned() == {"defend": 2, "evaluate": 2} | TABLES


def test_a_new_defense_runs_only_its_shards(workshop):
    workshop.write(changed(defenses=["none", "ft", "clp", "grad_prune", "fp"]))
    assert workshop.planned() == {"defend": 2, "evaluate": 2} | TABLES


def test_a_new_file_is_a_new_defense(workshop):
    source = workshop.code / METHOD
    shutil.copy(source, source.with_name("ft_again.py"))
    assert workshop.planned() == {}
    workshop.write(changed(defenses=["none", "ft", "clp", "grad_prune", "ft_again"]))
    assert workshop.planned() == {"defend": 2, "evaluate": 2} | TABLES


def test_a_new_range_of_draws_runs_only_its_shards(workshop):
    workshop.write(changed(draws=["0-1", "2-4"]))
    # The clean model's Grad-Prune has a shard too; CLP has none, for no draw changes what it does.
    assert workshop.planned() == {"sample": 1, "stamp": 1, "defend": 4, "evaluate": 4} | TABLES


def test_a_new_spc_runs_only_its_shards(workshop):
    workshop.write(changed(spc=[2, 3]))
    assert workshop.planned() == {"sample": 1, "stamp": 1, "defend": 4, "evaluate": 4} | TABLES


def test_a_new_seed_runs_only_its_models(workshop):
    workshop.write(changed(seeds=[0, 1]))
    planned = workshop.planned()
    assert planned["train"] == 2
    assert planned["defend"] == 6
    assert "sample" not in planned  # the defender's images are those of the first seed


def test_one_cell_can_be_rerun(workshop):
    shard = "tiny/preactresnet18/badnets/ratio-0.1/seed-0/ft/survey/spc-2/draws-0-1"
    path = f"results/defended/{shard}"
    assert workshop.planned("-R", path) == {"defend": 1, "evaluate": 1} | TABLES
    before = workshop.table("cells")
    workshop.snakemake("--until", "aggregate", "-R", path)
    assert workshop.table("cells").equals(before)
