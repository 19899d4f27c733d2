"""What benchmarks/kills.py promises of itself: it kills, it goes on, and it sees what a kill has spoilt."""

import json
import subprocess
import sys

import pytest

import kills

# Stands in for a study: two files, one after the other. WELL: whether it notices that the first is broken.
STUDY = """
import json, pathlib, sys, time
folder = pathlib.Path("results/models")
folder.mkdir(parents=True, exist_ok=True)
first, last = folder / "card.json", folder / "last.json"
if not first.exists() or (WELL and first.read_text() != '{"acc": 1}'):
    first.write_text('{"acc": 0}')
    time.sleep(0.4)
    first.write_text('{"acc": 1}')
time.sleep(0.2)
last.write_text("{}")
"""


@pytest.fixture
def study(monkeypatch):
    """A function that puts a script in the place of the study, and so do the kills come sooner."""
    monkeypatch.setattr(kills, "EARLIEST", 0.0)

    def put(script):
        def run(folder):
            folder.mkdir(exist_ok=True)
            return subprocess.Popen([sys.executable, "-S", "-c", script], cwd=folder, start_new_session=True)

        monkeypatch.setattr(kills, "run", run)

    return put


def test_a_study_that_notices_what_is_half_made_ends_equal(study, tmp_path):
    study(STUDY.replace("WELL", "True"))
    outcome = kills.killed(kills.A_STUDY + 1, 0, tmp_path)
    assert outcome.differences == []
    assert outcome.kills.total() >= 2
    assert outcome.ends >= 2
    assert set(outcome.kills) <= {"driver", "machine"}
    assert outcome.files == 2 * outcome.ends


def test_what_a_kill_has_spoilt_is_seen(study, tmp_path, monkeypatch):
    study(STUDY.replace("WELL", "False"))
    # Killed before the first file is right, it takes what lies there for right.
    (tmp_path / "killed-0/results/models").mkdir(parents=True)
    (tmp_path / "killed-0/results/models/card.json").write_text(json.dumps({"acc": 0}))
    monkeypatch.setattr(kills, "EARLIEST", 60.0)
    outcome = kills.killed(1, 0, tmp_path)
    assert outcome.differences == ["models/card.json: acc: 1 became 0"]


def test_a_study_that_fails_by_itself_is_no_kill(study, tmp_path):
    study("raise SystemExit(3)")
    with pytest.raises(ValueError, match=r"the study failed with exit code 3: see .*whole/log"):
        kills.killed(1, 0, tmp_path)
