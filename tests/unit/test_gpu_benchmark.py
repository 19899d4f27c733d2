"""What benchmarks/gpu.py promises of itself: time is kept, rows are kept, and what is wrong is called so."""

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch

import detrojan
import scenes
from detrojan import registry
from detrojan.workflow.job_costs import Costs
from gpu_parts import bench, loop, prices, record, runs, study, summary
from gpu_parts.budget import Budget, OutOfTimeError

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
# What a GPU machine need not have.
ABSENT = ("snakemake", "scipy", "sklearn", "matplotlib", "altair", "jinja2", "rich")


def test_a_part_ends_when_its_share_is_over():
    minutes = Budget(1.0, time.monotonic())
    with minutes.until(0.2):
        started = time.monotonic()
        with pytest.raises(OutOfTimeError), minutes.limited():
            time.sleep(5)
        assert time.monotonic() - started < 1
        with pytest.raises(OutOfTimeError), minutes.limited():
            pytest.fail("no time is left for it")
    assert minutes.left > 0.3
    with minutes.limited(0.1):
        minutes.let_finish()
        time.sleep(0.15)
    with minutes.limited(0.1):
        pass
    time.sleep(0.15)  # the limit ended with its block


def test_no_handler_takes_the_end_for_an_error():
    assert not issubclass(OutOfTimeError, Exception)


def test_rows_are_there_as_soon_as_they_are_added(tmp_path):
    rows = record.Record(tmp_path)
    rows.add("loop", {"network": "net", "share": 0.5, "took": None, "top": [["kernel", 0.25]]})
    rows.leave_out("study", "iab", "no time was left")
    rows.write()
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept["parts"] == rows.parts
    assert kept["left_out"] == {"study": [["iab", "no time was left"]]}
    long = pd.read_parquet(tmp_path / "gpu.parquet").set_index("name")
    assert long.loc["share", "value"] == 0.5
    assert long.loc["network", "text"] == "net"
    assert json.loads(long.loc["top", "text"]) == [["kernel", 0.25]]
    assert long.loc["took", ["value", "text"]].isna().all()


def test_what_is_left_out_is_told_by_reason(tmp_path):
    rows = record.Record(tmp_path)
    for name in "abcde":
        rows.leave_out("runs", name, "no time was left")
    rows.leave_out("runs", "f", "broken")
    assert rows.missing() == ["runs: a, b, c and 2 more: no time was left", "runs: f: broken"]


def check(tmp_path, seconds=60.0, networks=("one", "two", "three")):
    minutes = Budget(seconds, time.monotonic())
    return bench.Bench(CPU, False, minutes, record.Record(tmp_path), None, {name: {} for name in networks})


def test_the_first_trials_have_each_method_and_each_network_once(tmp_path):
    trials = list(runs._in_turns(check(tmp_path)))
    methods = {(kind, name) for kind in ("attacks", "defenses") for name in registry.names(kind)}
    assert len(set(trials)) == len(trials) == 3 * len(methods)
    first = trials[: len(methods)]
    assert {(trial.kind, trial.name) for trial in first} == methods
    assert {trial.architecture for trial in first} == {"one", "two", "three"}


def broken(error):
    def work(trial):
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (runs.NotApplicableError("no such layer"), "not_applicable"),
        (runs.DivergedError("loss"), "diverged"),
        (RuntimeError("called a synchronizing CUDA operation"), "failed"),
        (runs.WrongError("tensor a lies on cpu"), "failed"),
    ],
)
def test_what_goes_wrong_in_a_trial_is_its_row(tmp_path, error, status):
    row = runs._row(check(tmp_path), runs.Trial("defenses", "ft", "one"), broken(error))
    assert row["status"] == status
    assert str(error) in row["problem"]


def test_an_operator_that_is_not_deterministic_is_named(tmp_path):
    def work(trial):
        warnings.warn("something else", stacklevel=1)
        warnings.warn("some_backward_cuda does not have a deterministic implementation, but", stacklevel=1)
        return {"digest": "d"}

    row = runs._row(check(tmp_path), runs.Trial("defenses", "ft", "one"), work)
    assert (row["status"], row["not_deterministic"]) == ("ok", "some_backward_cuda")


def test_tensors_elsewhere_or_not_finite_are_wrong():
    with pytest.raises(runs.WrongError, match="tensor a lies on meta"):
        runs._check_tensors({"a": torch.zeros(1, device="meta")}, CPU)
    with pytest.raises(runs.WrongError, match="not finite"):
        runs._check_tensors({"a": torch.tensor([1.0, float("nan")])}, CPU)
    runs._check_tensors({"a": torch.ones(1), "count": torch.tensor(3)}, CPU)


def test_a_digest_tells_values_names_and_places_apart():
    digests = [
        runs._digest(tensors)
        for tensors in (
            {"a": torch.tensor([1.0, 2.0])},
            {"a": torch.tensor([2.0, 1.0])},
            {"b": torch.tensor([1.0, 2.0])},
            {"a": torch.tensor([1.0, 2.0 + 1e-6])},
            {"a": torch.tensor([1, 2])},
        )
    ]
    assert len(set(digests)) == len(digests)
    assert runs._digest({"a": torch.tensor([1.0, 2.0])}) == digests[0]


@pytest.mark.parametrize("name", ["badnets", "wanet"])
def test_a_step_on_the_cpu_is_no_step_away_from_itself_and_a_wrong_one_is(name, monkeypatch):
    attack = registry.load("attacks", name, smoke=True)
    batch = scenes.Images().patterned("train", 2)
    trigger = attack.learn_trigger(batch, rng=runs.streams.stream("trigger"))
    arguments = (attack, trigger, batch, "preactresnet18", {"width": 2}, CPU)
    assert runs._distance(*arguments) == {"from_cpu": 0.0}
    calls, fit = [], runs._fit

    def doubled(*given, **options):
        calls.append(1)
        own = fit(*given, **options)
        if len(calls) == 2:  # on the device: a step once more
            fit(*given, **options)
        return own

    monkeypatch.setattr(runs, "_fit", doubled)
    with pytest.raises(runs.WrongError, match="from the CPU's"):
        runs._distance(*arguments)


def test_a_ratio_that_a_clean_label_attack_can_poison(tmp_path):
    work = study.Work.__new__(study.Work)
    work.bench = check(tmp_path)
    images = scenes.Images().patterned("train", 20)
    splits = study.Splits(images, images, images)
    work.splits = {"ten": splits, "rare": study.Splits(images[images.labels != 0], images, images)}
    assert study._model(work, "ten", "badnets").ratio == 0.1
    assert study._model(work, "ten", "sig").ratio == 0.1
    assert study._model(work, "rare", "badnets").ratio == 0.1
    assert study._model(work, "rare", "sig") is None
    assert "no other may be poisoned" in work.bench.record.missing()[0]
    assert splits.most_spc == 20


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The whole check, cut down, where only what it asks for can be imported."""
    folder = tmp_path_factory.mktemp("gpu") / "into"
    program = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({ABSENT})); sys.path.insert(0, 'benchmarks'); "
        "runpy.run_path('benchmarks/gpu.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", program, "--tiny", "--into", str(folder)]
    environment = {**os.environ, "PYTHONPATH": "src"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_a_tiny_check_tries_every_method(tiny):
    rows = json.loads((tiny[0] / "gpu.json").read_text())["parts"][runs.PART]
    methods = {(kind, name) for kind in ("attacks", "defenses") for name in registry.names(kind)}
    assert {(row["kind"], row["name"]) for row in rows} == methods
    assert {row["status"] for row in rows} <= {"ok", "not_applicable"}
    assert {row["same_bits"] for row in rows} <= {True, None}


def test_a_tiny_check_leaves_tables_that_our_own_readers_take(tiny):
    folder, _ = tiny
    parts = json.loads((folder / "gpu.json").read_text())["parts"]
    assert parts[loop.PART][0]["loop_images_per_second"] > 0
    models, cells = detrojan.read_models(folder), detrojan.read_cells(folder)
    assert {"none", "badnets"} <= set(models["attack"])
    assert (models["epochs"] >= 1).all()
    assert len(cells) == len(models) + len(parts[study.PART]) + len(parts.get(prices.PART, []))
    assert set(cells["defense"]) > {"none", "ft"}
    rows = Costs.load(folder / prices.TABLE).rows.values()
    assert {row.source.split(",")[0] for row in rows} == {"measured"}
    assert {row.key.rule for row in rows} == {"defend", "train"}


def test_a_tiny_check_says_how_it_goes_and_what_it_found(tiny):
    folder, said = tiny
    text = (folder / "summary.txt").read_text()
    assert said.endswith(text)
    progress = said[: -len(text)].strip().splitlines()
    assert [line for line in progress if "rows in" in line] == progress[:2] + progress[-2:]
    assert len(text.splitlines()) <= 60
    assert "It runs: " in text
    assert max(map(len, text.splitlines())) <= 160


def test_a_summary_of_nothing_says_so(tmp_path):
    rows = record.Record(tmp_path)
    rows.add("machine", {"device": "GPU", "torch": "2", "seconds": 1.0, "minutes": 8, "git_commit": "c0ffee"})
    assert "loop: nothing" in summary.summary(rows)
