"""``detrojan tune`` and what a study with ``tuned`` makes of its file."""

import json
import subprocess
import sys

import pytest
import yaml

from detrojan.analysis.statistics import collect
from detrojan.commands import tune
from detrojan.storage import records
from detrojan.study import feasibility, files, grid, schema, trials
from detrojan.study.files import load_study
from detrojan.study.tuned import NO_FILE, made, text
from tests.command import exit_code
from tests.unit.test_schema import minimal, mistakes
from tests.unit.test_tuning import cells, trial

SEARCH = schema.shipped_file("defenses", "ft").search
BEST = {"badnets": (0.6, 0.7, 0.9), "blended": (0.5, 0.8, 0.6), "sig": (0.5, 0.8, 0.6)}


def settled(row, number, **more):
    """Return a row as a job leaves it: with the settings of its trial, and whose they are."""
    _, drawn = schema.trial(row["defense"], number)
    said = dict.fromkeys(drawn, "trial") | dict.fromkeys(more, "study") | {"batch_size": "survey"}
    values = {**drawn, **more, "batch_size": 256}
    row |= {"dataset": "digits", "spc": 2, "code": "c0de"}
    return row | {"hyperparameters": json.dumps(values), "sources": json.dumps(said)}


def rows(defense="ft", best=BEST, **more):
    """Return the rows of three trials of a defense, with these DER by attack."""
    return [
        settled(trial(number, der, attack, defense=defense), number, **more)
        for attack, own in best.items()
        for number, der in enumerate(own)
    ]


def finished(folder, found, **datasets):
    """Write what ``detrojan tune`` reads of finished trials on the digits."""
    study = minimal(protocols=["trials"], seeds=[100], draws=["100-101"])
    study["datasets"]["digits"] |= datasets
    (folder / "tables").mkdir(parents=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    records.write_table(cells(*found), folder / "tables/cells.parquet", collect.CELLS)
    return folder


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """The file of choices for both baselines, as a path."""
    folder = tmp_path_factory.mktemp("tuned")
    found = [*rows(), *rows("fp", dict.fromkeys(BEST, (0.9, 0.5, 0.5)), epochs=3)]
    lines = tune.main([finished(folder / "results", found)], 24, folder / "choices.json")
    return folder / "choices.json", lines


def study(path, **more):
    return {**minimal(protocols=["survey", "tuned"]), "tuned": str(path), **more}


def of(attack, defense="ft", **more):
    return {"dataset": "digits", "attack": attack, "spc": 2, "defense": defense, "protocol": "tuned", **more}


# --- the file --------------------------------------------------------------------------------------


def test_the_file_has_a_choice_for_each_family_left_out_with_its_history(chosen):
    content = json.loads(chosen[0].read_text())
    ft = {choice["left_out"]: choice for choice in content["choices"] if choice["defense"] == "ft"}
    # All: 0.53, 0.77, 0.7. Blended and SIG, one family, choose trial 1; BadNets alone trial 2.
    assert {left: choice["trial"] for left, choice in ft.items()} == {"none": 1, "badnets": 1, "blended": 2}
    assert ft["badnets"]["settings"] == {}
    assert ft["blended"]["settings"] == schema.trial("ft", 2)[1]
    assert ft["badnets"]["der"] == [0.5, 0.8, 0.6]
    assert ft["badnets"]["cells"] == 2
    assert ft["badnets"]["numbers"] == [0, 1, 2]
    assert ft["badnets"]["code"] == ["c0de"]
    on = content["datasets"]["digits"]
    assert (on["num_classes"], on["image_size"], on["attacks"]) == (10, 16, ["badnets", "blended", "sig"])
    assert on["studied"] == {"fp": {"epochs": 3}}
    keys = [(c["defense"], c["dataset"], c["spc"], c["left_out"]) for c in content["choices"]]
    assert keys == sorted(keys)


def test_the_command_says_what_it_chose(chosen):
    assert chosen[1] == [
        "fp on digits, SPC 2: trial-00 of 3, DER 90.0 %",
        "  its study set epochs=3, which the protocol tuned does not",
        "ft on digits, SPC 2: trial-01 of 3, DER 76.7 %",
        f"{chosen[0]}: 6 choices, digest {json.loads(chosen[0].read_text())['digest']}",
    ]


def test_fewer_trials_are_a_smaller_search(tmp_path):
    results, out = finished(tmp_path / "results", rows()), tmp_path / "choices.json"
    assert exit_code("tune", "--results", results, "--trials", 1, "--out", out) == 0
    assert {choice["trial"] for choice in json.loads(out.read_text())["choices"]} == {0}


def test_studies_are_read_together_but_count_no_cell_twice(tmp_path):
    first = finished(tmp_path / "first", rows())
    second = finished(tmp_path / "second", rows("fp"))
    out = tmp_path / "choices.json"
    assert tune.main([first, second], 24, out)[-1].startswith(f"{out}: 6 choices")
    with pytest.raises(ValueError, match=r"two studies have the same trial of the same cell, .* defense=ft"):
        tune.main([first, first], 24, out)
    other = finished(tmp_path / "other", rows("clp"), image_size=32)
    with pytest.raises(ValueError, match="its digits is another data set than in the studies before"):
        tune.main([first, other], 24, out)


def test_a_trial_has_one_setting(tmp_path):
    found = rows()
    found[2]["hyperparameters"] = found[2]["hyperparameters"].replace('"lr": ', '"lr": 1')
    folder = finished(tmp_path / "results", found)
    with pytest.raises(ValueError, match=r"trial-02 of ft ran with lr .* edited between two studies"):
        tune.main([folder], 24, tmp_path / "choices.json")


def test_a_study_without_trials_chooses_nothing(tmp_path, capsys):
    failed = [row | {"attack_took": False} for row in rows()]
    folder, out = finished(tmp_path / "results", failed), tmp_path / "choices.json"
    assert exit_code("tune", "--results", folder, "--out", out) == 1
    assert "no trials to choose from" in capsys.readouterr().err
    assert not out.exists()


def test_choosing_imports_no_torch():
    code = "import sys; from detrojan.commands import tune; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- a study with it -------------------------------------------------------------------------------


def test_a_cell_has_what_attacks_of_other_families_chose(chosen):
    tuned = load_study(study(chosen[0]))
    drawn = schema.trial("ft", 2)[1]
    survey = tuned.method("defenses", "ft", of("sig") | {"protocol": "survey"})
    assert tuned.method("defenses", "ft", of("sig")) == survey | drawn
    paper = tuned.method("defenses", "ft", of("badnets") | {"protocol": "paper"})
    assert tuned.method("defenses", "ft", of("badnets")) == paper
    # Nobody like WaNet or a stranger was in the trials: nobody is left out. Nor for a clean model.
    for attack in ("wanet", "stripes", "none"):
        assert tuned.choice("ft", of(attack)).left_out == "none"
    # The same on other networks and models.
    assert tuned.choice("ft", of("sig", architecture="vgg19_bn", ratio=0.01, seed=7)).trial == 2


def test_the_row_says_which_trial_it_was(chosen):
    tuned = load_study(study(chosen[0]))
    said = tuned.sources("ft", of("sig"))
    assert {said[name] for name in SEARCH} == {"tuned: trial-02"}
    assert said["batch_size"] == "survey"
    assert tuned.sources("ft", of("badnets"))["lr"] == "tuned: trial-01"
    assert not tuned.deviates("ft", of("sig"))
    other = load_study(study(chosen[0], defenses={"ft": {"lr": 0.5}}))
    assert other.sources("ft", of("sig"))["lr"] == "study"
    assert other.deviates("ft", of("sig"))


def test_another_choice_changes_the_settings_of_its_cells_alone(chosen, tmp_path):
    """The settings of a cell are a param of its job, which is what runs it again."""
    content = json.loads(chosen[0].read_text())
    for choice in content["choices"]:
        if choice["defense"] == "ft" and choice["left_out"] == "badnets":
            choice |= {"trial": 2, "settings": schema.trial("ft", 2)[1]}
    path = tmp_path / "other.json"
    path.write_text(text(made(content["datasets"], content["choices"])))
    studies = []
    for name in (chosen[0], path):
        raw = study(name)
        raw["grid"] |= {"attacks": ["badnets", "sig"]}
        studies.append(load_study(raw))
    changed = {
        (shard.defense, shard.model.attack, shard.protocol)
        for shard in grid.shards(studies[0])
        if shard.defense != "none"
        and len({str(one.method("defenses", shard.defense, shard.axes)) for one in studies}) > 1
    }
    assert changed == {("ft", "badnets", "tuned")}


def test_the_kept_study_needs_no_file(chosen, tmp_path):
    raw = study(chosen[0])
    files.with_choices(raw, load_study(raw))
    files.keep(raw, tmp_path)
    again = load_study(files.kept(tmp_path))
    assert again.tuned == load_study(study(chosen[0])).tuned
    assert schema.Study.model_validate_json(json.dumps(raw)).tuned == again.tuned


def test_another_name_for_the_same_data_set(chosen):
    raw = study(chosen[0])
    raw["datasets"] = {"figures": raw["datasets"]["digits"]}
    raw["grid"]["datasets"] = ["figures"]
    assert "has no data set figures; it has digits" in mistakes(raw)[0]
    named = load_study(raw | {"tuned_as": {"figures": "digits"}})
    assert named.choice("ft", of("sig") | {"dataset": "figures"}).trial == 2
    [line] = mistakes(raw | {"tuned_as": {"figures": "digits", "figure": "digits"}})
    assert line.startswith("tuned_as.figure: unknown name 'figure'")


def test_what_a_file_lacks_is_refused(chosen):
    raw = study(chosen[0])
    [line] = mistakes(minimal(protocols=["tuned"]))
    assert line == f"grid.protocols: {NO_FILE}"
    raw["grid"] |= {"defenses": ["ft", "fp", "nad"], "spc": [2]}
    [line] = mistakes(raw)
    assert line.startswith("tuned: it has no choice for nad on digits at SPC 2; `detrojan tune` reads")
    raw["datasets"]["digits"] |= {"image_size": 32}
    assert mistakes(raw)[0].startswith("tuned: its digits has images of 16 pixels, digits of 32")
    excluded = study(chosen[0])
    excluded["grid"] |= {
        "defenses": ["ft", "fp", "nad"],
        "exclude": [{"defense": "nad", "protocol": "tuned"}],
    }
    load_study(excluded)


def test_a_data_set_of_other_classes_is_refused(chosen):
    raw = study(chosen[0])
    feasibility.check(load_study(raw))
    raw["datasets"]["digits"]["classes"] = [0, 1, 2]
    with pytest.raises(files.StudyError, match="tuned: its digits has 10 classes, digits has 3"):
        feasibility.check(load_study(raw))


def test_trials_and_their_seeds_are_not_measured(chosen):
    raw = study(chosen[0])
    raw["grid"]["protocols"] = ["tuned", "trial-03"]
    [line] = mistakes(raw)
    assert line == "grid.protocols: tuned is chosen by trials, so trial-03 can't run beside it"
    raw = study(chosen[0])
    raw["grid"] |= {"seeds": [0, 100], "draws": ["0-1", "100-101"]}
    assert [line.split(":")[0] for line in mistakes(raw)] == ["grid.seeds", "grid.draws"]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda text: text.replace('"trial": 2', '"trial": 1'), "changed since `detrojan tune` wrote it"),
        (lambda text: text.replace('"cells"', '"cell"', 1), "choices.0.cell"),
        (lambda text: text[:100], "choices.json"),
    ],
)
def test_an_edited_file_is_refused(chosen, tmp_path, edit, said):
    path = tmp_path / "choices.json"
    path.write_text(edit(chosen[0].read_text()))
    found = mistakes(study(path))
    assert said in found[0]
    assert found[0].startswith("tuned: ")


def test_a_file_that_is_missing_is_named(tmp_path):
    found = mistakes(study(tmp_path / "none.json"))
    assert found == [f"tuned: {tmp_path / 'none.json'} is missing: `detrojan tune` writes such a file"]


def test_names_of_trials_are_protocols_of_paths():
    from detrojan.workflow import graph

    path = "metrics/d/a/b/ratio-0.1/seed-100/ft/trial-07/spc-2/draws-100-101/metrics.parquet"
    folder, axes = graph.parse(path)
    assert (folder, axes["protocol"]) == ("metrics", trials.name(7))
