"""The logger plugin ``detrojan``: what it makes of Snakemake's log records."""

import io
import logging
import os
from types import SimpleNamespace

import pytest
from rich.console import Console
from snakemake.settings.enums import Quietness
from snakemake_interface_logger_plugins.common import LogEvent

from detrojan.commands import plan as plan_of
from detrojan.study import files
from detrojan.workflow import job_costs
from snakemake_logger_plugin_detrojan import START_S, JobOutput, LogHandler, clean, expect, last_lines
from snakemake_logger_plugin_detrojan.progress import Progress, Stage, duration, num_cells
from tests.unit.test_schema import minimal

SHARD = {"attack": "sig", "defense": "ft", "spc": "2", "draws": "0-2"}


@pytest.fixture
def run():
    """Return a function that feeds records to a new handler and returns the text that it shows."""

    def feed(*records, **settings):
        defaults = {
            "stdout": False,
            "nocolor": True,
            "quiet": None,
            "dryrun": False,
            "verbose": False,
            "debug_dag": False,
        }
        handler = LogHandler(SimpleNamespace(**defaults | settings), None)
        handler.console = Console(file=io.StringIO(), width=100)
        for record in records:
            handler.handle(record)
        handler.close()
        handler.close()  # Snakemake does once, Python's logging on exit again
        return handler.console.file.getvalue()

    return feed


def record(message="", event=None, level=logging.INFO, at=0.0, **fields):
    made = logging.makeLogRecord({"msg": message, "levelno": level, **fields})
    made.created = at
    if event is not None:
        made.event = event
    return made


def plan(**jobs):
    return record(event=LogEvent.RUN_INFO, stats=jobs | {"all": 1, "total": sum(jobs.values()) + 1})


def start(job, rule, wildcards=SHARD, at=0.0, reason=""):
    fields = {"jobid": job, "rule_name": rule, "wildcards": wildcards, "reason": reason}
    return record(event=LogEvent.JOB_INFO, at=at, **fields)


def finish(job, at=0.0):
    return record(event=LogEvent.JOB_FINISHED, job_id=job, at=at)


def fail(job, rule, log):
    fields = {"jobid": job, "rule_name": rule, "log": [str(log)]}
    return record(event=LogEvent.JOB_ERROR, level=logging.ERROR, **fields)


def test_cells_of_a_job():
    assert num_cells("evaluate", {"draws": "0-2"}) == 3
    assert num_cells("evaluate_untouched", {}) == 1
    assert num_cells("detrojan_evaluate", {"draws": "0-2"}) == 3
    assert num_cells("detrojan_evaluate_untouched", {}) == 1
    assert num_cells("own_evaluate", {}) == 0  # no rule of ours
    assert num_cells("defend", {"draws": "0-2"}) == 0  # only what is evaluated is done
    assert num_cells("train", {}) == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (95, "95 s"), (240, "4 min"), (3600 + 1200, "1 h 20 min"), (3 * 86400 + 14400, "3 d 4 h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_stages_count_both_ways_to_evaluate_as_one():
    progress = Progress()
    progress.plan({"evaluate_untouched": 1, "defend": 2, "evaluate": 2, "all": 1, "total": 6})
    progress.start(1, "evaluate_untouched", {}, 0.0)
    progress.finish(1, 2.0)
    progress.start(2, "defend", SHARD, 2.0)
    assert progress.stages() == [Stage("evaluate", 1, 0, 3), Stage("defend", 0, 1, 2)]
    assert progress.line(3.0) == (
        "1/5 jobs | evaluate 1/3  defend 0/2 | now defend sig/ft/spc-2 | 1 cell done | … left"
    )


def test_time_left():
    progress = Progress()
    progress.plan({"train": 3, "defend": 4, "report": 1})
    assert progress.left(0.0) == "… left"
    for job in (1, 2):  # two at a time, 100 s each
        progress.start(job, "train", {}, 0.0)
    for job in (1, 2):
        progress.finish(job, 100.0)
    assert progress.left(100.0) == "at least 50 s left"  # one training of 100 s; nobody knows about defending
    progress.start(3, "train", {}, 100.0)
    progress.start(4, "defend", SHARD, 100.0)
    progress.finish(4, 140.0)
    # 100 - 50 s of training and 3 x 40 s of defending, by (200 + 40 + 50) / 150 jobs at the same time
    assert progress.left(150.0) == f"about {round(170 / (290 / 150))} s left"


def test_time_left_before_a_job_has_finished_goes_by_the_table_of_costs():
    progress = Progress()
    progress.plan({"train": 2, "defend": 4, "report": 1})
    progress.expect({"train": 30.0, "defend": 10.0, "report": 5.0})
    assert progress.left(0.0) == "about 105 s left by the table of costs"
    progress.start(1, "train", {}, 0.0)
    assert progress.left(20.0) == "about 85 s left by the table of costs"
    # Longer than expected: what is left is the other jobs.
    assert progress.left(60.0) == "about 75 s left by the table of costs"
    progress.finish(1, 60.0)
    progress.start(2, "defend", SHARD, 60.0)
    progress.finish(2, 64.0)
    # A second training of 60 s, three of 4 s, and 5 s that hardly matter.
    assert progress.left(64.0) == "about 77 s left"


def test_a_line_names_the_jobs_that_run():
    progress = Progress()
    progress.plan({"train": 5})
    assert progress.running() == ""
    for job, attack in enumerate(("none", "badnets", "sig", "lf", "iab")):
        progress.start(job, "train", {"dataset": "digits", "attack": attack, "seed": "0"}, 0.0)
    assert progress.running() == "now train none, train badnets, train sig, 2 more"


def test_costs_are_those_of_the_study_that_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    progress = Progress()
    progress.plan({"dataset": 1, "train": 1})
    expect(progress)  # of another workflow, which keeps no study of ours
    assert progress.left(0.0) == "… left"
    study = minimal()
    files.keep(study, tmp_path / "results")
    expect(progress)
    seconds = plan_of.seconds_a_job(files.load_study(study), job_costs.default())
    costs = job_costs.default().of(files.load_study(study))
    assert seconds["dataset"] == costs.row("dataset", {"dataset": "digits"}).expected_s
    total = duration(seconds["dataset"] + seconds["train"] + 2 * START_S)
    assert progress.left(0.0) == f"about {total} left by the table of costs"


def test_a_job_that_is_tried_again_has_not_failed():
    progress = Progress()
    progress.plan({"train": 1})
    progress.start(1, "train", {}, 0.0)
    assert progress.fail(1, "train") == {}
    assert progress.end(1.0) == "Failed: 1 train. 0 of 1 jobs done in 1 s, 0 cells done."
    progress.start(1, "train", {}, 1.0)
    progress.finish(1, 5.0)
    assert progress.end(5.0) == "Done: 1 job in 5 s, 0 cells done."


def test_a_run_that_ends_well(run):
    text = run(
        record("Assuming unrestricted shared filesystem usage."),
        record("Building DAG of jobs..."),
        plan(evaluate=1),
        record("Select jobs to execute..."),
        start(1, "evaluate"),
        record("Removing temporary output weights.", quietness=Quietness.RULES),
        finish(1),
        record("Complete log(s): run.log"),
    )
    assert text.startswith("Building DAG of jobs...\nComplete log(s): run.log\nDone: 1 job in ")
    assert text.endswith("3 cells done.\n")
    assert text.count("\n") == 3


def test_a_failed_job_shows_its_wildcards_and_the_end_of_its_log(run, tmp_path):
    log = tmp_path / "train.log"
    noise = [f"INFO epoch {epoch}" for epoch in range(30)]
    log.write_text("\n".join([*noise, "2026 ERROR detrojan.workflow.job: rule train: lr is too high"]))
    text = run(
        plan(train=1),
        start(1, "train", {"attack": "sig", "ratio": "0.1"}),
        record("RuleException:\nCalledProcessError in file x", LogEvent.ERROR, 40, exception="RuleException"),
        fail(1, "train", log),
        record("Exiting because a job execution failed. Look above", level=logging.ERROR),
        record("WorkflowError:\nAt least one job did not complete successfully.", LogEvent.ERROR, 40),
    )
    assert "✗ train failed: attack=sig, ratio=0.1\n" in text
    assert "    2026 ERROR detrojan.workflow.job: rule train: lr is too high\n" in text
    assert "epoch" not in text
    assert "CalledProcessError" not in text
    assert text.rstrip().splitlines()[-1].startswith("Failed: 1 train. 0 of 1 jobs done")


def test_last_lines(tmp_path):
    log = tmp_path / "job.log"
    assert last_lines(log) == ["(no log: No such file or directory)"]
    log.write_text("")
    assert last_lines(log) == ["(empty)"]
    log.write_text("\n".join(f"line {number}" for number in range(100)))
    assert last_lines(log) == [f"line {number}" for number in range(85, 100)]
    log.write_text("\n".join(["before", "now ERROR a bug", *(f"line {number}" for number in range(100))]))
    assert last_lines(log) == ["now ERROR a bug", *(f"line {number}" for number in range(86, 100))]


def test_a_mistake_in_the_study_is_shown_without_where_it_was_read(run):
    message = (
        'StudyError in file "/clone/Snakefile", line 12:\n'
        "the study file has a mistake:\n  grid.spc: missing\n"
        '  File "/clone/Snakefile", line 12, in <module>\n  File "/clone/config.py", line 3, in load_study'
    )
    text = run(record(message, LogEvent.ERROR, logging.ERROR, exception="StudyError"))
    assert text == "the study file has a mistake:\n  grid.spc: missing\n"


def test_other_errors_keep_their_kind_and_place():
    assert clean('NameError in file "S", line 1:\nname x\n  File "S", line 1, in <module>', "NameError") == (
        'NameError in file "S", line 1:\nname x'
    )
    bug = 'Traceback (most recent call last):\n  File "x", line 1, in y\nKeyError: 2'
    assert clean(bug, "KeyError") == bug


def test_warnings_and_nothing_to_be_done_are_shown(run):
    nothing = "Nothing to be done (all requested files are present and up to date)."
    assert run(record(nothing)) == nothing + "\n"
    assert run(plan(train=1), record("careful", level=logging.WARNING)).startswith("careful\n")


def test_a_dry_run_counts_jobs_and_cells_and_says_why(run):
    text = run(
        plan(train=1, evaluate=2),
        start(1, "train", {}, reason="Params have changed since last execution: code"),
        start(2, "evaluate", reason="Missing output files: a, b; Input files updated by another job: c"),
        start(3, "evaluate", SHARD | {"draws": "3-4"}, reason="Missing output files: d"),
        plan(train=1, evaluate=2),
        dryrun=True,
    )
    rows = [line.rstrip().split(maxsplit=3) for line in text.splitlines()]
    assert rows[1] == ["train", "1", "params", "have changed since last execution (1)"]
    assert rows[2] == ["evaluate", "2", "5", "missing output files (2)"]
    assert text.endswith("A dry run: nothing was done.\n")


def test_quiet_leaves_errors(run, tmp_path):
    events = [record("Building DAG of jobs..."), plan(train=1), start(1, "train", {}), finish(1)]
    assert run(*events, quiet={Quietness.RULES, Quietness.PROGRESS}) == ""
    assert "✗ train failed" in run(*events, fail(1, "train", tmp_path / "no.log"), quiet={Quietness.ALL})


def test_an_interrupted_run_has_stopped_and_not_failed(run, tmp_path):
    text = run(
        plan(train=1),
        start(1, "train", {}),
        record("Terminating processes on user request, this might take some time."),
        fail(1, "train", tmp_path / "no.log"),
    )
    assert "failed" not in text
    assert "Stopped: 0 of 1 jobs done" in text


def test_what_jobs_write_is_handed_on_line_by_line(capfd):
    lines = []
    output = JobOutput(lines.append)
    os.write(2, b"WARNING: diverged\nhalf a ")
    os.write(2, b"line\n")
    output.stop()
    os.write(2, b"after\n")
    assert lines == ["WARNING: diverged", "half a line"]
    assert capfd.readouterr().err == "after\n"


def test_the_region_shows_stages_and_gives_the_terminal_back(run, monkeypatch):
    monkeypatch.setattr(Console, "is_terminal", True)
    text = run(plan(train=2), start(1, "train", {}), finish(1), record("careful", level=logging.WARNING))
    assert "train" in text
    assert "1/2" in text
    assert "careful" in text
    assert "Stopped: 1 of 2 jobs done" in text
