"""Why a result is what it is, told from small folders that are made by hand."""

import json
import re
import subprocess
import sys

import pyarrow as pa
import pytest
import torch

from detrojan import registry, rng
from detrojan.analysis.statistics import collect
from detrojan.cells import CELL_AXES, Draws, Model, Shard
from detrojan.commands import why
from detrojan.datasets.base import RawImages, Source
from detrojan.settings import NO_AUGMENTATION, Optimization
from detrojan.stages import classifier, defend, ingest, sampling
from detrojan.storage import artifacts, columns, provenance, records
from detrojan.study import files as study_files
from detrojan.workflow import equal_code, graph
from detrojan.workflow.attempts import Diary
from detrojan.workflow.equal_code import Record
from detrojan.workflow.site import Site, parse_axes
from tests.command import exit_code

MODEL = Model("digits", "preactresnet18", "badnets", 0.1, 0)
CLEAN = MODEL._replace(attack="none", ratio=0.0)
SHARD = Shard(MODEL, "ft", 10, Draws(0, 2))
ONE = ["dataset=digits", "architecture=preactresnet18", "attack=badnets", "ratio=0.1", "seed=0"]
CELL = [*ONE, "defense=ft", "spc=10", "draw=1"]
STUDY = {
    "pool": "held_out",
    "datasets": {"digits": {"source": "digits", "image_size": 32, "held_out": 0.1}},
    "architectures": {"preactresnet18": {"width": 8}},
    "training": {"epochs": 8},
    "defenses": {"ft": {"epochs": 20}},
    "grid": {
        "datasets": ["digits"],
        "architectures": ["preactresnet18"],
        "attacks": ["none", "badnets"],
        "ratios": [0.1],
        "defenses": ["none", "ft", "clp", "grad_prune"],
        "spc": [2, 10],
        "draws": ["0-2"],
        "controls": False,
    },
}
VERSIONS = json.dumps({"python": "3.11.7", "torch": "2.13.0"})


def settings(kind, name, **changed):
    return registry.declared(kind, name).settings(**changed).model_dump(mode="json")


def row(draw=0, shard=SHARD, **changed):
    """Return a row of a shard's metrics."""
    values = columns.cell_key(shard, draw) | {"sources": "{}", "deviates": False}
    values |= {"steps": 60, "images_a_step": 20.0, "passes": 60.0}
    values |= {"status": "ok", "reason": None, "chosen": '{"pruned": [1, 2]}', "device": "cpu"}
    values |= {"hyperparameters": json.dumps(settings("defenses", "ft", epochs=20))}
    values |= {"seconds": 3.5, "peak_memory_bytes": 10**9, "forward_passes": 7, "backward_passes": 6}
    values |= {"code": "0123456789abcdef", "versions": VERSIONS, "git_commit": "c0ffee"}
    return values | {"num_test": 360, "num_triggered": 324, "acc": 0.97, "asr": 0.25, "ra": 0.5} | changed


def card(**changed):
    """Return a model's card."""
    values = {"architecture_settings": settings("models", "preactresnet18", width=8)}
    values |= {"optimization": Optimization(epochs=8).model_dump(), "code": "fedcba9876543210"}
    values |= {"train_loss": 0.5, "train_accuracy": 0.9, "num_train": 1293, "num_parameters": 175_000}
    values |= {"seconds": 30.0, "device": "cpu", "versions": VERSIONS, "git_commit": "c0ffee"}
    return values | {"peak_memory_bytes": 1} | changed


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A study of which nothing has been run yet, in the working directory."""
    monkeypatch.chdir(tmp_path)
    site = Site(tmp_path / "results")
    study_files.keep(STUDY, site.results)
    return Site(site.results.relative_to(tmp_path))


def write_metrics(site, *rows, shard=SHARD):
    records.write_rows(list(rows), site.at(graph.metrics(shard)), columns.METRICS)


def write_cells(site, *rows):
    cells = [row | {"attack_took": True, "threat_model": "clean_data"} for row in rows]
    records.write_table(pa.Table.from_pylist(cells, collect.CELLS), site.table("cells"), collect.CELLS)


def explain(site, *what):
    return why.explain(site, [str(word) for word in what])


def told(site, *what):
    return "\n".join(why.lines(explain(site, *what)))


def result(site, *what):
    (only,) = explain(site, *what)["results"]
    return only


# --- what is named ---------------------------------------------------------------------------------


def test_values_are_of_their_kind():
    given = parse_axes(["ratio=0.10", "seed=1", "spc=2", "draw=03", "defense=ft"])
    assert given == {"ratio": 0.1, "seed": 1, "spc": 2, "draw": 3, "defense": "ft"}


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["defence=ft"], "did you mean 'defense'"),
        (["zzz=1"], "there are dataset, architecture"),
        (["spc"], "should be KEY=VALUE"),
        (["spc="], "should be KEY=VALUE"),
        (["spc=ten"], "spc should be a whole number"),
        (["ratio=much"], "ratio should be a number"),
        (["spc=2", "spc=10"], "spc is given twice"),
        (
            ["draw=0-4"],
            "'draw=0-4' can mean several cells, and this needs exactly one: write one value, as draw=0",
        ),
        (["defense=ft,fp"], "'defense=ft,fp' can mean several cells.* as defense=ft"),
        (["spc=>=10"], "'spc=>=10' can mean several cells.* as spc=10"),
    ],
)
def test_what_is_no_key_or_value_is_refused(texts, said):
    with pytest.raises(ValueError, match=said):
        parse_axes(texts)


def test_several_cells_are_told_by_what_they_differ_in(site):
    with pytest.raises(ValueError, match="match; name one more") as error:
        explain(site, "defense=ft", "attack=badnets", "seed=0")
    said = str(error.value)
    assert said.startswith("6 cells match")
    assert "spc: 2, 10" in said
    assert "draw: 0, 1, 2" in said
    assert "attack" not in said
    assert "architecture" not in said


def test_several_models_are_told_by_what_they_differ_in(site):
    with pytest.raises(ValueError, match=r"2 models match.* attack: badnets, none; ratio: 0, 0\.1"):
        explain(site, "dataset=digits")


def test_an_unknown_cell_is_told_by_what_there_is(site):
    with pytest.raises(ValueError, match=r"no cell has defense=anp.* there are clp, ft, grad_prune, none"):
        explain(site, "defense=anp")
    # All of it occurs, but a method without data has no SPC.
    with pytest.raises(ValueError, match=r"no cell has all of defense=clp spc=10.*spc=0 draw=0"):
        explain(site, "defense=clp", "spc=10")
    with pytest.raises(ValueError, match="spc and draw belong to a defense"):
        explain(site, "attack=badnets", "spc=10")


def test_without_results_nothing_is_named(tmp_path):
    with pytest.raises(ValueError, match="neither a study file nor tables"):
        explain(Site(tmp_path / "results"), "defense=ft")


def test_a_study_that_today_s_code_refuses_is_one_line(site):
    study_files.keep(STUDY | {"gates": 1, "pools": 2}, site.results)
    with pytest.raises(ValueError, match=r"study.yaml, by today's code: .*gates.*; .*pools") as error:
        explain(site, "defense=ft")
    assert "\n" not in str(error.value)


def test_a_broken_table_is_one_line(site):
    write_cells(site, row())
    site.table("cells").write_bytes(site.table("cells").read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"cells.parquet: not a whole Parquet table"):
        explain(site, "defense=ft")


SHARD_PATH = "digits/preactresnet18/badnets/ratio-0.1/seed-0/ft/survey/spc-10/draws-0-2"
MODEL_PATH = "digits/preactresnet18/badnets/ratio-0.1/seed-0"
SHARD_AXES = MODEL._asdict() | {"defense": "ft", "protocol": "survey", "spc": 10, "draws": Draws(0, 2)}
TRIGGER_AXES = {"dataset": "digits", "attack": "badnets", "seed": 0}
LEARNED_AXES = TRIGGER_AXES | {"attack": "lf", "architecture": "preactresnet18"}
SAMPLE_AXES = {"dataset": "digits", "spc": 2, "draws": Draws(0, 2)}


@pytest.mark.parametrize(
    ("path", "axes"),
    [
        (f"metrics/{SHARD_PATH}/metrics.parquet", SHARD_AXES),
        (f"metrics/{SHARD_PATH}", SHARD_AXES),
        (f"defended/{SHARD_PATH}/draw-1.safetensors", SHARD_AXES),
        (f"models/{MODEL_PATH}/model.safetensors", MODEL._asdict()),
        ("triggers/digits/badnets/seed-0", TRIGGER_AXES),
        ("triggers/digits/preactresnet18/lf/seed-0", LEARNED_AXES),
        ("poisoned/digits/badnets/ratio-0.1/seed-0/card.json", TRIGGER_AXES | {"ratio": 0.1}),
        (f"poisoned/{MODEL_PATH}", MODEL._asdict()),
        (f"triggered/{MODEL_PATH}/test.parquet", MODEL._asdict()),
        ("stamped/digits/badnets/seed-0/spc-2/draws-0-2.parquet", TRIGGER_AXES | SAMPLE_AXES),
        ("samples/digits/spc-2/draws-0-2.parquet", SAMPLE_AXES),
        ("datasets/digits", {"dataset": "digits"}),
    ],
)
def test_a_path_names_its_axes(site, path, axes):
    folder, found = why.parse_path(site.results / path, site.results)
    assert folder == path.split("/")[0]
    assert found == axes


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (
            "results/models/digits/preactresnet18",
            "names no artifact: it should go on as results/models/{dataset}",
        ),
        ("results/metrics/digits/a/b/ratio-x/seed-0/ft/survey/spc-1/draws-0-0", "names no artifact"),
        ("results/tables/cells.parquet", "is no artifact: name one below datasets, samples"),
        ("elsewhere/models", "is not below results"),
    ],
)
def test_a_path_that_names_nothing_is_refused(site, path, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        why.parse_path(site.results.parent / path, site.results)


# --- how far a cell is -----------------------------------------------------------------------------


def test_a_cell_that_waits_its_turn(site):
    assert result(site, *CELL) == {
        "draw": 1,
        "state": "planned, not started",
    }
    # Planned in a shard: its paths are the shard's.
    assert "results/samples/digits/spc-10/draws-0-2.parquet" in told(site, *CELL)


def begin(rule, axes, log="logs/some.log"):
    diary = Diary(rule, axes, log)
    diary.start(mem_mb=None, runtime_min=None)
    return diary


def test_a_cell_that_runs_or_has_failed(site):
    diary = begin("defend", SHARD_AXES, "logs/shards/x.log")
    asked = CELL
    assert result(site, *asked)["state"] == "running: rule defend, see logs/shards/x.log"
    diary.end("failed", "ValueError: it broke")
    facts = explain(site, *asked)
    assert facts["results"][0]["state"] == "failed: rule defend, see logs/shards/x.log"
    (attempt,) = facts["attempts"]
    assert (attempt["rule"], attempt["state"], attempt["reason"]) == (
        "defend",
        "failed",
        "ValueError: it broke",
    )
    # Another draw range, SPC or model is not concerned.
    assert result(site, *ONE, "defense=ft", "spc=2", "draw=1")["state"] == "planned, not started"


@pytest.mark.parametrize(
    ("rule", "axes"),
    [
        ("train", MODEL._asdict()),
        ("dataset", {"dataset": "digits"}),
        ("trigger", {"dataset": "digits", "attack": "badnets", "seed": 0}),
        ("sample", {"dataset": "digits", "spc": 10, "draws": Draws(0, 2)}),
        ("triggered", {"dataset": "digits", "attack": "badnets", "seed": 0}),
        ("poison", {"dataset": "digits", "attack": "badnets", "ratio": 0.1, "seed": 0}),
    ],
)
def test_what_a_cell_waits_for_has_failed(site, rule, axes):
    begin(rule, axes).end("failed", "ValueError: it broke")
    state = result(site, *CELL)["state"]
    assert state == f"failed: rule {rule}, see logs/some.log"


@pytest.mark.parametrize(
    ("rule", "axes"),
    [
        ("train", CLEAN._asdict()),
        ("sample", {"dataset": "digits", "spc": 2, "draws": Draws(0, 2)}),
        ("defend", SHARD_AXES | {"defense": "fp"}),
        ("stamp", {"dataset": "digits", "attack": "badnets", "seed": 0, "spc": 10, "draws": Draws(0, 2)}),
        ("aggregate", {}),
    ],
)
def test_what_a_cell_does_not_need_is_none_of_its_business(site, rule, axes):
    begin(rule, axes).end("failed", "ValueError: it broke")
    facts = explain(site, *CELL)
    assert facts["results"][0]["state"] == "planned, not started"
    assert facts["attempts"] == []


def test_a_row_of_an_earlier_study_is_found_by_its_whole_key(site):
    other = SHARD._replace(draws=Draws(5, 6))
    write_metrics(site, row(5), row(6), shard=other)
    assert result(site, *ONE, "defense=ft", "spc=10", "draw=6")["status"] == "ok"
    with pytest.raises(ValueError, match="no cell has draw=7"):
        explain(site, *ONE, "defense=ft", "spc=10", "draw=7")


# --- what is told of it ----------------------------------------------------------------------------


@pytest.fixture
def done(site):
    """The same study with one shard that has been run, and an altered study file after that."""
    write_metrics(site, row(0), row(1, acc=0.875), row(2, status="diverged", reason="a NaN", acc=None))
    records.write_card(card(), site.at(graph.model_card(MODEL)))
    trigger = {"hyperparameters": {"side": 4}, "history": [], "findings": {}, "weakness": None}
    records.write_card(trigger, site.at("results/triggers/digits/badnets/seed-0/card.json"))
    return site


def test_the_row(done):
    found = result(done, *CELL)
    assert found["row_in"] == graph.metrics(SHARD)
    assert (found["acc"], found["asr"], found["chosen"]) == (0.875, 0.25, {"pruned": [1, 2]})
    assert found["in_tables"] == "not yet"
    text = told(done, *CELL)
    assert re.search(r"^  acc +0.875$", text, re.M)
    assert re.search(r"^  chosen +pruned=\[1, 2\]$", text, re.M)


def test_the_tables_may_be_older_than_the_row(done):
    write_cells(done, row(0), row(1, acc=0.5), row(2))
    assert result(done, *ONE, "defense=ft", "spc=10", "draw=0")["in_tables"] == "yes"
    found = result(done, *CELL)
    assert found["in_tables"].startswith("with other values")
    assert found["acc"] == 0.875
    assert found["attack_took"] is True


def test_a_cell_without_measures_tells_its_reason(done):
    found = result(done, *ONE, "defense=ft", "spc=10", "draw=2")
    assert (found["status"], found["reason"], found["acc"]) == ("diverged", "a NaN", None)


def test_a_shard_is_a_line_a_draw(done):
    text = told(done, done.at(graph.metrics(SHARD)))
    lines = [line.split() for line in text.splitlines()]
    assert ["0", "ok", "0.97", "0.25", "0.5", "3.5"] in lines
    assert ["1", "ok", "0.875", "0.25", "0.5", "3.5"] in lines
    assert ["2", "diverged", "–", "0.25", "0.5", "3.5"] in lines
    assert "a NaN" in text


def test_a_row_that_is_only_in_the_tables(site):
    # A cell that was given up, as `close` leaves it; and tables that were copied without their shards.
    nothing = {"code": "", "versions": "", "git_commit": "", "device": "", "hyperparameters": "{}"}
    write_cells(
        site, row(0, status="timed_out", reason="three times", acc=None, asr=None, ra=None, **nothing), row(1)
    )
    facts = explain(site, *ONE, "defense=ft", "spc=10", "draw=0")
    assert facts["results"][0]["status"] == "timed_out"
    assert facts["code"] == {}
    assert "defense" not in facts["settings"]
    assert result(site, *CELL)["row_in"] == "results/tables/cells.parquet"


def test_settings_with_the_defaults_and_what_the_study_says_now(done):
    study = STUDY | {"defenses": {"ft": {"epochs": 5}}}
    study_files.keep(study, done.results)
    facts = explain(done, *CELL)
    ft = facts["settings"]["defense"]
    default = settings("defenses", "ft")["epochs"]
    assert ft["values"]["epochs"] == 20
    assert ft["defaults"] == {"epochs": default}
    assert ft["study_now"] == {"epochs": 5}
    assert facts["settings"]["architecture"]["defaults"] == {"width": 64}
    assert facts["settings"]["training"]["values"]["epochs"] == 8
    assert facts["settings"]["training"]["study_now"] == {}
    assert facts["settings"]["attack"]["values"] == {"side": 4}
    text = told(done, *CELL)
    assert f"epochs=20 [{default}]" in text
    assert "the study file now: epochs=5" in text
    assert "side=4 [3]" in text


def test_settings_follow_the_overrides_of_the_study(done):
    only_large = [
        {"when": {"spc": "> 5"}, "set": {"epochs": 20}},
        {"when": {"attack": "sig"}, "set": {"epochs": 3}},
    ]
    study_files.keep(STUDY | {"defenses": {"ft": {"epochs": 1, "overrides": only_large}}}, done.results)
    assert explain(done, *CELL)["settings"]["defense"]["study_now"] == {}


def test_code_of_today_and_of_then(done):
    code = explain(done, *CELL)["code"]
    assert set(code) == {"train", "defend"}
    assert code["defend"]["digest"] == "0123456789abcdef"
    assert not code["defend"]["same"]
    write_metrics(done, row(1, code=code["defend"]["today"]))
    records.write_card(card(code=code["train"]["today"]), done.at(graph.model_card(MODEL)))
    facts = explain(done, *CELL)
    assert facts["code"]["defend"]["same"]
    assert facts["code"]["train"]["same"]
    text = told(done, *CELL)
    assert text.count("the same as today's") == 2
    assert "git commit                c0ffee (today: " in text


@pytest.mark.parametrize(("method", "same"), [("ft", True), ("fp", False)])
def test_code_that_is_recorded_to_give_the_numbers_of_todays(done, monkeypatch, method, same):
    today = explain(done, *CELL)["code"]["defend"]["today"]
    proof = dict.fromkeys(equal_code.Proof._fields, "") | {"rule": "defend", "methods": method}
    proof |= {"code": today, "equals": "0123456789abcdef", "date": "2026-01-02", "study": "config/smoke.yaml"}
    found = Record([(2, equal_code.made(proof))])
    monkeypatch.setattr(equal_code, "record", lambda: found)
    code = explain(done, *CELL)["code"]
    assert code["defend"]["same"] is same
    assert code["defend"]["recorded"] == ([proof] if same else [])
    assert not code["train"]["same"]
    text = " ".join(told(done, *CELL).split())
    said = (
        f"0123456789abcdef, which gives the numbers of today's, {today} "
        "(recorded 2026-01-02, on config/smoke.yaml)"
    )
    assert (said in text) is same


@pytest.mark.parametrize("attack", ["none", *registry.names("attacks")])
def test_code_of_a_model_covers_the_methods_that_its_job_runs(site, attack):
    """The code of an attack that poisons a training set beforehand runs in other jobs than the training."""
    controlled = attack != "none" and registry.threat_model("attacks", attack) == "training_control"
    rule, methods = "train", [registry.path("models", "preactresnet18")]
    if controlled:
        rule, methods = "train_controlled", [*methods, registry.path("attacks", attack)]
    always = (registry.CHECKOUT / "scripts" / f"{rule}.py", registry.PACKAGE / "learning" / "determinism.py")
    model = MODEL._replace(attack=attack, ratio=0.0 if attack == "none" else 0.1)
    study_files.keep(STUDY | {"grid": STUDY["grid"] | {"attacks": [attack]}}, site.results)
    for digest, same in ((provenance.code_digest(*always, *methods), True), ("0123456789abcdef", False)):
        records.write_card(card(code=digest), site.at(graph.model_card(model)))
        code = explain(site, *(f"{axis}={value}" for axis, value in model._asdict().items()))["code"]
        assert code[rule]["same"] is same


def test_digests_of_data_and_files(done, toy_images):
    images = toy_images()
    artifacts.write_images(images, done.at("results/datasets/digits/train.parquet"))
    model = done.at(f"results/models/{MODEL_PATH}/model.safetensors")
    model.write_bytes(b"abc")
    facts = explain(done, *CELL)
    assert facts["source_digest"] == images.info.digest
    files = {file["path"]: file for file in facts["files"]}
    # The SHA-256 of "abc", from the standard that defines it.
    assert files[str(model)]["sha256"] == "ba7816bf8f01"
    assert not files["results/samples/digits/spc-10/draws-0-2.parquet"]["there"]
    assert "ba7816bf8f01  results/models/" in told(done, *CELL)


def test_logs_that_are_there_and_that_are_not(done):
    log = done.at(f"logs/shards/{SHARD_PATH}.log")
    log.parent.mkdir(parents=True)
    log.write_text("x")
    logs = {log["path"]: log["there"] for log in explain(done, *CELL)["logs"]}
    assert logs[f"logs/shards/{SHARD_PATH}.log"]
    assert not logs[f"logs/train/{MODEL_PATH}.log"]


def test_a_model_and_a_trigger(done):
    facts = explain(done, *ONE)
    assert facts["what"] == "model"
    assert facts["results"][0]["state"] == "done"
    assert facts["results"][0]["train_accuracy"] == 0.9
    assert explain(done, *ONE) == explain(done, done.results / "models" / MODEL_PATH / "model.safetensors")
    assert result(done, "attack=none")["state"] == "planned, not started"
    trigger = explain(done, done.results / "triggers/digits/badnets/seed-0/trigger.safetensors")
    assert trigger["settings"]["attack"]["values"] == {"side": 4}


def test_lf_stands_on_the_clean_model(site):
    study = STUDY | {"grid": STUDY["grid"] | {"attacks": ["lf"]}}
    study_files.keep(study, site.results)
    for model, width in ((CLEAN, 8), (MODEL._replace(attack="lf"), 16)):
        made = card(architecture_settings={"width": width})
        records.write_card(made, site.at(graph.model_card(model)))
    facts = explain(site, "attack=lf", "defense=clp")
    assert facts["settings"]["architecture, clean model"]["values"] == {"width": 8}
    assert facts["settings"]["architecture"]["values"] == {"width": 16}
    assert {"train", "train, clean model"} <= set(facts["code"])
    begin("train", CLEAN._asdict()).end("failed", "x")
    assert result(site, "attack=lf", "defense=clp")["state"].startswith("failed: rule train")


def test_lines_fit_and_json_has_the_same(done, capsys):
    asked = [*ONE, "defense=ft", "spc=10", "draw=2"]
    assert exit_code("why", *asked) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= why.WIDTH for line in out.splitlines() if "/" not in line)
    assert "\x1b" not in out
    assert exit_code("why", "--json", *asked) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == explain(done, *asked)
    assert facts["axes"] == dict(zip(CELL_AXES, [*MODEL, "ft", 10, 2], strict=True))


def test_bad_input_is_one_line(site, capsys):
    assert exit_code("why", "defense=ft") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("detrojan: 12 cells match")


def test_the_commands_need_no_torch():
    # It takes seconds to import, and a login node may have none.
    code = "import sys, detrojan.commands.why, detrojan.commands.reproduce; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the random streams are those that are used ------------------------------------------------------


@pytest.fixture
def used(monkeypatch):
    """The names of the streams that are made from here on, in order, without those made from another."""
    names, stream = [], rng.stream

    def recorded(*name):
        if isinstance(name[0], str):
            names.append(name)
        return stream(*name)

    monkeypatch.setattr(rng, "stream", recorded)
    return names


def named(steps, rule, draw=None, **values):
    """Return the streams that a step names, with each label in place of ``LABEL``."""
    (step,) = (step for step in steps if step.rule == rule)
    labels = range(values.pop("labels", 1))
    return {
        tuple(label if word == "LABEL" else word for word in stream)
        for stream in graph.streams(step, draw)
        for label in labels
    }


def test_streams_of_the_defender(used, toy_images, toy_model):
    pool, shard = toy_images(count=48), Shard(MODEL._replace(dataset="toy"), "ft", 5, Draws(3, 3))
    used.clear()
    steps = list(graph.steps(graph.shard_job(shard)))
    samples = sampling.draw_samples(pool, "toy", 5, [3])
    assert set(used) == named(steps, "sample", 3, labels=4)
    used.clear()

    class Nothing:
        min_spc = 1

        def __call__(self, model, clean, *, rng):
            raise defend.DivergedError("nothing is done")

        def model_dump(self):
            return {}

    defend.run_shard(Nothing(), toy_model, samples, shard, None, code="")
    assert set(used) == named(steps, "defend", 3)


def test_streams_of_the_data_set_and_of_training(used, tmp_path, monkeypatch):
    class Made(Source):
        def read(self, split, side):
            rng = torch.Generator().manual_seed(len(split))  # no image twice
            pixels = torch.randint(256, (12, side, side, 3), dtype=torch.uint8, generator=rng).numpy()
            return RawImages(pixels, torch.arange(12).numpy() % 3, ("a", "b", "c"))

    limits = dict.fromkeys(("classes", "per_class", "mean", "std"))
    images, _, _ = ingest.build(
        Made(), name="digits", side=16, held_out=0.5, augmentation=NO_AUGMENTATION, **limits
    )
    assert set(used) == named([graph.job("dataset", {"dataset": "digits"})], "dataset", labels=3)
    used.clear()
    classifier.train(
        images,
        MODEL,
        architecture={"width": 4},
        optimization={"epochs": 1, "batch_size": 4},
        code="",
        folder=tmp_path,
        device=torch.device("cpu"),
    )
    assert set(used) == named(graph.steps(graph.model_job(MODEL)), "train")


def test_streams_that_scripts_name():
    scripts = registry.CHECKOUT / "scripts"
    steps = list(graph.steps(graph.job("poison", MODEL._asdict())))
    assert named(steps, "poison") == {("poison", "digits", 0)}
    assert 'rng.stream("poison", cell.dataset, cell.seed)' in (scripts / "poison.py").read_text()
    assert named(steps, "trigger") == {("trigger", "digits", "badnets", 0)}
    assert 'rng.stream("trigger", *cell.axes.values())' in (scripts / "trigger.py").read_text()
    learned = graph.steps(graph.job_in("triggers", MODEL._replace(attack="lf")._asdict()))
    assert named(learned, "trigger_against_model") == {("trigger", "digits", "preactresnet18", "lf", 0)}
    controlled = graph.steps(graph.model_job(MODEL._replace(attack="wanet")))
    assert ("poisoner", *MODEL._replace(attack="wanet")) in named(controlled, "train_controlled")
