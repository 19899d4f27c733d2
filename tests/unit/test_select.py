"""What conditions select, what is printed for Snakemake, and what a wrong condition says."""

from pathlib import Path

import pytest
import yaml

from detrojan.cells import NO_METHOD, Draws, Model, Shard, untouched
from detrojan.study import conditions, files
from detrojan.workflow import graph
from detrojan.workflow.attempts import Diary
from tests.command import exit_code
from tests.unit.test_schema import minimal

CLEAN = Model("digits", "preactresnet18", NO_METHOD, 0.0, 0)
BADNETS = CLEAN._replace(attack="badnets", ratio=0.05)
FT = Shard(BADNETS, "ft", 10, Draws(2, 4))
RAW = minimal(
    attacks=["badnets", "sig"],
    ratios=[0.05, 0.1],
    defenses=["ft", "fp", "clp"],
    spc=[2, 10],
    draws=["0-1", "2-4"],
)
# 5 models (clean, two attacks at two ratios) with an untouched shard, CLP's, and 2 × 2 of FT and of FP.
NUM_SHARDS = 5 * (1 + 1 + 2 * 2 * 2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory where the study was begun."""
    files.keep(RAW, tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def selected(*texts):
    return conditions.shards(files.load_study(RAW), conditions.parse(texts))


def printed(capsys, *arguments):
    assert exit_code("select", *arguments) == 0
    return capsys.readouterr().out.splitlines()


def refused(capsys, *arguments):
    assert exit_code("select", *arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def make(path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).touch()


# --- conditions ------------------------------------------------------------------------------------


def test_without_conditions_it_is_the_whole_study():
    assert len(selected()) == NUM_SHARDS


@pytest.mark.parametrize(
    ("texts", "number"),
    [
        (["defense=ft"], 5 * 4),
        (["defense=ft,clp"], 5 * 5),
        (["attack=badnets"], 2 * 10),
        (["attack=badnets", "defense=ft", "ratio=0.1", "spc=2", "draw=3"], 1),
        (["ratio=>0.05"], 2 * 10),
        (["ratio=5e-2"], 2 * 10),
        (["ratio=>=0.05", "ratio=<0.1"], 2 * 10),  # both must be met
        (["spc=<5"], 5 * 4),  # a data-free method's SPC is no small one
        (["draw=1"], 5 * 2 * 2),  # the shards 0-0, of CLP and untouched models, hold no draw 1
        (["draw=0"], 5 * (2 * 2 + 2)),
        (["draw=>=4"], 5 * 2 * 2),
        (["draw=1,2"], 5 * 2 * 2 * 2),
        (["draw=2-9"], 5 * 2 * 2),
        (["draw=1-2"], 5 * 2 * 2 * 2),
        (["spc=0-5"], 5 * (2 + 2 * 2)),  # a range lists its numbers, 0 too
    ],
)
def test_number_of_shards(texts, number):
    assert len(selected(*texts)) == number


def test_a_draw_names_the_shard_that_holds_it():
    one = ["attack=badnets", "ratio=0.05", "defense=ft", "spc=10"]
    assert selected(*one, "draw=3") == [FT]
    assert selected(*one, "draw=1") == [FT._replace(draws=Draws(0, 1))]


def test_a_row_of_the_table_can_be_named_as_it_stands_there():
    rows = ["dataset=digits", "architecture=preactresnet18", "seed=0", "draw=0", "spc=0"]
    assert selected(*rows, "attack=none", "ratio=0.0", "defense=none") == [untouched(CLEAN)]
    (clp,) = selected(*rows, "attack=badnets", "ratio=0.05", "defense=clp")
    assert clp == Shard(BADNETS, "clp", 0, Draws(0, 0))


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("defence=ft", "'defence=ft': unknown key 'defence'; did you mean 'defense'?"),
        ("ft", "'ft' should be KEY=VALUE"),
        ("defense=", "'defense=' should be KEY=VALUE"),
        (
            "ratio=high",
            "'ratio=high': ratio should be a number, several with commas between, or a comparison",
        ),
        ("draw=4-0", "'draw=4-0': draw should be a whole number or a range, as 0-4, several with commas"),
        ("defense=ftt", "no cell of the study has defense=ftt; there are clp, fp, ft, none"),
        ("ratio=0.2,0.3", "no cell of the study has ratio=0.2,0.3; there are 0, 0.05, 0.1"),
        ("draw=9", "no cell of the study has draw=9; there are 0-0, 0-1, 2-4"),
        ("spc=> 10", "no cell of the study has spc=> 10; there are 0, 2, 10"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(condition, said, folder, capsys):
    err = refused(capsys, "attack=badnets", condition)
    assert said in err
    assert err.count("\n") == 1


def test_conditions_that_exclude_each_other(folder, capsys):
    assert "nothing meets all" in refused(capsys, "defense=clp", "spc=2")
    assert "nothing meets all" in refused(capsys, "draw=<=2", "draw=>=3")


# --- what is printed -------------------------------------------------------------------------------


def test_paths_of_a_stage(folder, capsys):
    one = ["attack=badnets", "ratio=0.05", "draw=3", "spc=10", "defense=ft"]
    shard = "digits/preactresnet18/badnets/ratio-0.05/seed-0/ft/survey/spc-10/draws-2-4"
    assert printed(capsys, *one) == [f"results/defended/{shard}"]
    assert printed(capsys, *one, "--stage", "evaluate") == [f"results/metrics/{shard}/metrics.parquet"]
    assert printed(capsys, *one, "--stage", "train") == [graph.model_card(BADNETS)]


def test_untouched_models_are_evaluated_only(folder, capsys):
    assert printed(capsys, "defense=none", "attack=none") == [graph.metrics(untouched(CLEAN))]


def test_a_model_is_printed_once(folder, capsys):
    cards = printed(capsys, "--stage", "train", "attack=badnets,none")
    assert sorted(cards) == sorted(
        graph.model_card(model) for model in (CLEAN, BADNETS, BADNETS._replace(ratio=0.1))
    )


def test_results_elsewhere_give_paths_of_their_own_working_directory(folder, capsys, monkeypatch):
    make(graph.metrics(FT))
    monkeypatch.chdir("/")
    there = ["--results", str(folder / "results"), "defense=ft", "attack=badnets", "spc=10", "ratio=0.05"]
    assert printed(capsys, *there) == [graph.defended(FT._replace(draws=Draws(0, 1))), graph.defended(FT)]
    assert printed(capsys, *there, "--missing") == [graph.defended(FT._replace(draws=Draws(0, 1)))]


def test_missing_looks_for_metrics_and_cards(folder, capsys):
    make(graph.metrics(FT))
    make(graph.model_card(CLEAN))
    assert len(printed(capsys, "--missing")) == NUM_SHARDS - 1
    assert graph.defended(FT) not in printed(capsys, "--missing")
    assert len(printed(capsys, "--missing", "--stage", "train")) == 4
    one = ["attack=badnets", "ratio=0.05", "draw=3", "spc=10", "defense=ft"]
    assert "none of the 1 selected is missing" in refused(capsys, "--missing", *one)


def test_failed_is_what_died_and_does_not_run(folder, capsys):
    def begin(rule, axes):
        diary = Diary(rule, axes, f"logs/{rule}.log")
        diary.start(mem_mb=None, runtime_min=None)
        return diary

    axes = BADNETS._asdict() | {"defense": "ft", "protocol": "survey", "spc": 10}
    begin("defend", axes | {"draws": FT.draws}).end("failed", "ValueError: no")
    begin("evaluate", axes | {"draws": Draws(0, 1)}).end("stopped", "told to stop by SIGTERM")
    begin("defend", axes | {"spc": 2, "draws": FT.draws})  # runs: it is this process
    begin("evaluate_untouched", CLEAN._asdict()).end("failed", "OSError: no")
    begin("train", BADNETS._replace(ratio=0.1)._asdict()).end("failed", "ValueError: no")
    # Of the same axes as a model, but of another rule; and a job that ended well.
    begin("triggered_own", BADNETS._asdict()).end("failed", "ValueError: no")
    begin("train", BADNETS._asdict()).done()

    failed = printed(capsys, "--failed")
    others = [graph.defended(FT._replace(draws=Draws(0, 1))), graph.metrics(untouched(CLEAN))]
    assert sorted(failed) == sorted([graph.defended(FT), *others])
    assert printed(capsys, "--failed", "draw=3") == [graph.defended(FT)]
    cards = printed(capsys, "--failed", "--stage", "train")
    assert cards == [graph.model_card(BADNETS._replace(ratio=0.1))]
    make(graph.metrics(FT))  # of an earlier run
    assert graph.defended(FT) not in printed(capsys, "--failed", "--missing")
    assert "none of the 5 selected is missing and has died" in refused(
        capsys, "--failed", "--missing", "defense=clp"
    )


# --- the study -------------------------------------------------------------------------------------


def test_study_files_are_merged_as_snakemake_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(RAW))
    (tmp_path / "two.yaml").write_text("grid: {defenses: [ft, fp, nad], spc: [3]}\n")
    both = ["--configfile", "one.yaml", "--configfile", "two.yaml"]
    assert len(printed(capsys, *both)) == 5 * (1 + 3 * 2)
    assert len(printed(capsys, "defense=nad", "draw=0", *both)) == 5
    assert len(printed(capsys, "defense=clp", "--configfile", "one.yaml")) == 5


def test_a_study_that_is_not_there_or_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "study.yaml is missing" in refused(capsys, "defense=ft")
    (tmp_path / "one.yaml").write_text("pool: [")
    assert "one.yaml" in refused(capsys, "--configfile", "one.yaml")
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(RAW))
    # Snakemake takes several files after one --configfile, and here the second one is no condition.
    assert "'two.yaml' should be KEY=VALUE" in refused(capsys, "--configfile", "one.yaml", "two.yaml")
    assert "two.yaml: No such file or directory\n" in refused(capsys, "--configfile", "two.yaml")
