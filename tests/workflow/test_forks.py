"""On one machine jobs are forks of one process, and nobody can tell by what they leave."""

from detrojan.workflow.fork_server import SWITCH


def test_forked_jobs_make_the_tables_of_jobs_that_start_anew(workshop, finished, monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    workshop.snakemake("-R", "sample", "defend")
    for name in ("cells", "models", "summary"):
        assert workshop.table(name).equals(finished.table(name)), name


def test_a_failing_job_fails_with_its_reason(workshop):
    workshop.edit("scripts/sample.py", "with job.run", "raise RuntimeError('planted')\nwith job.run")
    output = workshop.snakemake("-R", "sample", "--until", "sample", check=False)
    assert workshop.returncode == 1
    assert "RuntimeError: planted" in output
