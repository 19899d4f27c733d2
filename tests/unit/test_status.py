"""How far a study is: counts from files and records, the rate, and what the terminal shows."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
from rich.console import Console

from detrojan.cells import Draws, Model, Shard, untouched
from detrojan.commands import status
from detrojan.commands.status import Stage
from detrojan.storage import records
from detrojan.study import files, grid
from detrojan.workflow import attempts, graph
from detrojan.workflow.attempts import Diary
from tests.command import exit_code
from tests.unit.test_schema import minimal

CLEAN = Model("digits", "preactresnet18", "none", 0.0, 0)
BADNETS = CLEAN._replace(attack="badnets", ratio=0.05)
FT = Shard(BADNETS, "ft", 10, Draws(0, 2))
FT_PLACE = "digits/preactresnet18/badnets/ratio-0.05/seed-0/ft/survey/spc-10/draws-0-2"
AXES = BADNETS._asdict() | {"defense": "ft", "protocol": "survey", "spc": 10, "draws": FT.draws}
RAW = minimal(ratios=[0.05], defenses=["ft", "fp", "clp"], spc=[10], draws=["0-2", "3-9"])
# Two models with an untouched shard, CLP's, and 2 of FT and of FP each: 1 + 1 + 2 × (3 + 7) cells.
SHARDS, CELLS = 2 * 6, 2 * 22
NOW = 1_800_000_000.0
BEGAN = NOW - 7200


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The results of a study that began two hours ago; its working directory is the test's."""
    monkeypatch.chdir(tmp_path)
    begin(RAW, BEGAN)
    return Path("results")


def begin(raw, at):
    files.keep(raw, Path("results"))
    os.utime("results/study.yaml", (at, at))


def make(path, at):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).touch()
    os.utime(path, (at, at))


def shards():
    return list(grid.shards(files.load_study(RAW)))


def measure_all(at):
    for model in (CLEAN, BADNETS):
        make(graph.model_card(model), at)
    for shard in shards():
        make(graph.metrics(shard), at)


def write_cells(endings, at):
    Path("results/tables").mkdir(exist_ok=True)
    table = pa.table({"status": endings, "acc": [0.5] * len(endings)})
    records.write_table(table, graph.table("cells"), table.schema)
    os.utime(graph.table("cells"), (at, at))


def start(rule="defend", axes=AXES, log="logs/x.log"):
    diary = Diary(rule, axes, log)
    diary.start(mem_mb=None, runtime_min=None)
    return diary


def shown(found):
    console = Console(file=io.StringIO(), width=100, highlight=False)
    status.show(found, console)
    return console.file.getvalue()


# --- counts ----------------------------------------------------------------------------------------


def test_a_study_that_has_just_begun(results):
    found = status.look(results, NOW)
    assert found.models == Stage("models", 2, 0, 0, 0, 0)
    assert found.shards == Stage("shards", SHARDS, 0, 0, 0, 0)
    assert found.tables == Stage("tables, report", 2, 0, 0, 0, 0)
    assert (found.cells, found.finished, found.endings, found.jobs) == ((0, CELLS), 0, {}, [])
    assert not found.over


def test_what_is_done_is_what_is_there(results):
    make(graph.model_card(CLEAN), NOW)
    make(graph.metrics(FT), NOW)
    make(graph.metrics(untouched(BADNETS)), NOW)
    make(graph.metrics(FT._replace(draws=Draws(1, 1))), NOW)  # one that the study doesn't plan
    found = status.look(results, NOW)
    assert (found.models.done, found.shards.done, found.cells) == (1, 2, (3 + 1, CELLS))
    assert found.shards.waiting == SHARDS - 2


def test_running_and_dead_jobs_count_by_what_they_work_on(results):
    measure_all(NOW)
    start("train", BADNETS._asdict())
    start("defend")
    start("evaluate", AXES | {"draws": Draws(3, 9)}).end("failed", "OSError: no")
    start("evaluate_untouched", CLEAN._asdict()).end("stopped", "told to stop by SIGTERM")
    start("stamp", {"dataset": "digits", "attack": "badnets", "seed": 0, "spc": 10, "draws": "0-2"})
    start("defend", AXES | {"draws": Draws(5, 5)}).end("failed", "ValueError: not planned")
    found = status.look(results, NOW)
    assert found.models == Stage("models", 2, 1, 1, 0, 0)
    assert found.shards == Stage("shards", SHARDS, SHARDS - 3, 1, 2, 0)
    assert len(found.jobs) == 6
    assert "digits/badnets/seed-0/spc-10/draws-0-2" in {job.place for job in found.jobs}


def test_a_place_where_one_job_died_and_another_runs_is_running(results):
    start("evaluate").end("failed", "OSError: no")
    start("defend")
    for other in ("defend", "evaluate"):  # in whatever order they are found
        start(other, AXES | {"defense": "fp"})
    assert status.look(results, NOW).shards[2:5] == (0, 2, 0)


def test_rules_that_another_workflow_calls_by_a_prefix_count_as_ours(results):
    start("detrojan_train", BADNETS._asdict())
    start("detrojan_defend").end("failed", "OSError: no")
    start("my_evaluate_untouched", CLEAN._asdict())
    start("someone_elses", {})
    found = status.look(results, NOW)
    assert found.models == Stage("models", 2, 0, 1, 0, 0)
    assert found.shards == Stage("shards", SHARDS, 0, 1, 1, 0)
    assert {job.record.rule for job in found.jobs} == {
        "train",
        "defend",
        "evaluate_untouched",
        "someone_elses",
    }
    untouched_place = "digits/preactresnet18/none/ratio-0/seed-0/none/none/spc-0/draws-0-0"
    assert untouched_place in {job.place for job in found.jobs}


def test_tables_are_done_when_nothing_is_newer_and_nothing_is_left(results):
    measure_all(NOW - 100)
    write_cells(["ok"], NOW - 50)
    make("results/report/index.html", NOW - 40)
    assert status.look(results, NOW).tables.done == 2
    assert status.look(results, NOW).over

    make(graph.metrics(FT), NOW - 45)
    assert status.look(results, NOW).tables.done == 0  # and the report is older than what comes
    make(graph.metrics(FT), NOW - 100)
    make("results/report/index.html", NOW - 60)
    assert status.look(results, NOW).tables.done == 1
    Path(graph.metrics(FT)).unlink()
    assert status.look(results, NOW).tables.done == 0

    make(graph.metrics(FT), NOW - 100)
    start("aggregate", {}).end("failed", "ValueError: no")
    found = status.look(results, NOW)
    assert found.tables == Stage("tables, report", 2, 0, 0, 1, 0)
    assert not found.over


def test_what_close_gives_up_is_not_waited_for(results):
    begin(RAW | {"close": 2}, BEGAN)
    measure_all(NOW - 100)
    Path(graph.metrics(FT)).unlink()
    for _ in range(2):
        diary = Diary("defend", AXES, "logs/x.log")
        diary.start(mem_mb=None, runtime_min=None)
    killed = diary.path.read_text().replace(f'"pid": {os.getpid()}', f'"pid": {dead_process()}')
    diary.path.write_text(killed)
    write_cells(["ok", "out_of_memory"], NOW)
    make("results/report/index.html", NOW)
    found = status.look(results, NOW)
    assert found.shards == Stage("shards", SHARDS, SHARDS - 1, 0, 0, 1)
    assert found.tables.done == 2
    assert found.over
    assert "given up" in shown(found)
    begin(RAW, BEGAN)
    assert status.look(results, NOW).shards == Stage("shards", SHARDS, SHARDS - 1, 0, 1, 0)


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_rows_of_the_table_count_by_status(results):
    write_cells(["ok", "diverged", "ok", "timed_out"], NOW)
    found = status.look(results, NOW)
    assert found.endings == {"ok": 2, "diverged": 1, "timed_out": 1}
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(NOW))
    assert f"Table of cells, made {date}: 2 ok, 1 diverged, 1 timed_out." in shown(found)


# --- SLURM -----------------------------------------------------------------------------------------


@pytest.fixture
def slurm_job(results, monkeypatch):
    """A SLURM job on another machine that has said nothing of its end."""
    with monkeypatch.context() as there:
        there.setenv("SLURM_JOB_ID", "8123")
        there.setattr(attempts.socket, "gethostname", lambda: "node17")
        start()
    return monkeypatch


def test_slurm_tells_what_runs(results, slurm_job):
    slurm_job.setattr(status.shutil, "which", lambda name: f"/usr/bin/{name}")
    for state, counts in (("RUNNING", (1, 0)), ("TIMEOUT", (0, 1)), (None, (0, 1))):
        answer = {"8123": state} if state else {}
        slurm_job.setattr(attempts, "slurm_states", lambda records, answer=answer: answer)
        assert status.look(results, NOW).shards[3:5] == counts, state


def test_without_slurms_commands_its_silent_jobs_are_taken_to_run(results, slurm_job):
    slurm_job.setattr(attempts, "slurm_states", lambda records: {})
    slurm_job.setattr(status.shutil, "which", lambda name: None)
    found = status.look(results, NOW)
    assert found.shards.running == 1
    assert "on node17, SLURM job 8123" in shown(found)


# --- the rate --------------------------------------------------------------------------------------


def test_the_rate_is_that_of_the_last_hour(results):
    for number, shard in enumerate(shards()[:6]):
        make(graph.metrics(shard), NOW - (60 if number < 4 else 4000))
    found = status.look(results, NOW)
    assert (found.finished, found.since) == (4, NOW - 3600)
    rate = "4 finished in the last 1 h 0 min, 4 an hour; 6 left, at this rate 1 h 30 min."
    assert f"Shards: {rate}" in shown(found)


def test_the_rate_of_a_run_that_began_lately_is_that_of_the_run(results):
    begin(RAW, NOW - 600)
    make(graph.metrics(FT), NOW - 4000)
    make(graph.metrics(FT._replace(defense="fp")), NOW - 60)
    text = shown(status.look(results, NOW))
    assert "Shards: 1 finished in the last 10 min, 6 an hour; 10 left, at this rate 1 h 40 min." in text


def test_without_progress_there_is_no_estimate(results):
    assert "Shards: none was finished in the last 1 h 0 min, 12 left." in shown(status.look(results, NOW))
    measure_all(NOW - 5000)
    assert "Shards: none is left." in shown(status.look(results, NOW))


# --- what is shown ---------------------------------------------------------------------------------


def test_the_oldest_running_jobs_are_shown_and_the_others_counted(results, monkeypatch):
    for number in range(13):
        monkeypatch.setattr(attempts.time, "time", lambda number=number: NOW - 60 * (20 - number))
        start("defend", AXES | {"draws": Draws(number, number)})
    monkeypatch.setattr(attempts.processes, "is_at_work", lambda *_: True)
    lines = shown(status.look(results, NOW)).splitlines()
    at = lines.index("Running: 13 jobs")
    host = attempts.socket.gethostname()
    assert lines[at + 1] == f"  defend, for 20 min, on {host}"
    assert lines[at + 2] == f"    {FT_PLACE.replace('draws-0-2', 'draws-0-0')}"
    assert lines[at + 20].endswith("draws-9-9")
    assert lines[at + 21] == "  and 3 more"


def test_what_died_alike_is_one_entry(results):
    for draw in range(5):
        log = f"logs/shards/{draw}.log"
        for _ in range(2 if draw else 1):
            start("defend", AXES | {"draws": Draws(draw, draw)}, log).end("failed", "ValueError: too dark")
    start("train", BADNETS._asdict(), "logs/train/x.log").end("stopped", "told to stop by SIGTERM")
    lines = shown(status.look(results, NOW)).splitlines()
    at = lines.index("Died: 6 jobs")
    assert lines[at + 1 :] == [
        "  5 × defend, failed, 1 to 2 attempts",
        "    ValueError: too dark",
        f"    first: {FT_PLACE.replace('draws-0-2', 'draws-0-0')}",
        "    log: logs/shards/0.log",
        "  train, interrupted, 1 attempt",
        "    told to stop by SIGTERM",
        "    digits/preactresnet18/badnets/ratio-0.05/seed-0",
        "    log: logs/train/x.log",
        "  A run tries them again; if it finds nothing to do: -R $(detrojan select --failed)",
    ]
    assert "No job is running." in lines


def test_kinds_of_deaths_beyond_ten_are_counted(results):
    for draw in range(12):
        start("defend", AXES | {"draws": Draws(draw, draw)}).end("failed", f"ValueError: {draw:02}")
    text = shown(status.look(results, NOW))
    assert "ValueError: 09" in text
    assert "ValueError: 10" not in text
    assert "  and 2 jobs of 2 other kinds\n" in text


def test_lines_fit_without_a_terminal(results):
    start()
    start("evaluate", AXES | {"draws": Draws(3, 9)}).end("failed", "OSError: no" + "o" * 100)
    measure_all(NOW)
    write_cells(["ok", "diverged"], NOW)
    assert max(map(len, shown(status.look(results, NOW)).splitlines())) <= 100


# --- the command -----------------------------------------------------------------------------------


def test_the_command(results, capsys):
    start()
    assert exit_code("status") == 0
    out = capsys.readouterr().out
    assert FT_PLACE in out
    assert "\x1b" not in out


def test_it_watches_until_the_study_is_done(results, capsys, monkeypatch):
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        assert len(slept) < 3
        if len(slept) == 2:
            measure_all(NOW)
            write_cells(["ok"], NOW)
            make("results/report/index.html", NOW)

    monkeypatch.setattr(status.time, "sleep", sleep)
    assert exit_code("status", "--watch", "5") == 0
    assert slept == [5, 5]
    assert capsys.readouterr().out.count("The study in results") == 3


def test_an_interrupt_ends_the_watch(results, monkeypatch, capsys):
    def sleep(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", sleep)
    assert exit_code("status", "--watch", "5") == 0
    assert exit_code("status", "--watch", "0.1") == 2
    assert "at least 2 seconds" in capsys.readouterr().err


def test_bad_input_is_one_line(tmp_path, capsys, results):
    assert exit_code("status", "--results", tmp_path / "nothing") == 1
    assert "study.yaml is missing" in capsys.readouterr().err
    make(graph.table("cells"), NOW)
    assert exit_code("status") == 1
    captured = capsys.readouterr()
    assert "results/tables/cells.parquet: not a whole Parquet table" in captured.err
    assert captured.err.count("\n") == 1


def test_status_and_select_need_neither_torch_nor_pandas():
    program = (
        "import sys, detrojan.commands.status, detrojan.commands.select\n"
        "print([name for name in sys.modules if name in ('torch', 'pandas', 'sklearn', 'matplotlib')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_thirty_thousand_shards_are_looked_for_in_seconds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    many = RAW["grid"] | {"seeds": list(range(800)), "draws": [f"{draw}-{draw}" for draw in range(9)]}
    begin(RAW | {"grid": many}, BEGAN)
    start_time = time.perf_counter()
    found = status.look(Path("results"), NOW)
    assert found.shards.planned == 800 * 2 * (2 + 2 * 9)
    assert time.perf_counter() - start_time < 10
