"""What a run hands to its jobs: the study and the code of its beginning, whatever is edited since."""

import types
from pathlib import Path

import yaml

from detrojan.study import files
from detrojan.workflow import graph, handover
from tests.unit.test_schema import minimal


def give(study):
    """Hand a study over; return the file that jobs are told to read."""
    workflow = types.SimpleNamespace(
        config_settings=types.SimpleNamespace(configfiles=[Path("study.yaml")]),
        execution_settings=types.SimpleNamespace(retries=3),
    )
    handover.give(workflow, study, {"digits": "0123"}, {"digits": 10})
    (path,) = workflow.config_settings.configfiles
    return path


def test_jobs_get_the_study_and_the_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = give(minimal())
    assert path.is_absolute()
    config = yaml.safe_load(path.read_text())
    planned, images, classes = handover.take(config)
    assert handover.retries(config) == 3
    assert config == minimal()
    assert (images, classes) == ({"digits": "0123"}, {"digits": 10})
    assert planned == graph.all_code()
    assert planned["defend/ft"] == graph.code_digest("defend", {"defense": "ft"})
    files.load_study(config)
    assert handover.given(tmp_path) == planned
    assert handover.given(tmp_path / "elsewhere") == {}


def test_a_later_run_leaves_what_an_earlier_one_has_handed_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = give(minimal())
    text = first.read_text()
    assert give(minimal(seeds=[1])) != first
    assert first.read_text() == text
    assert give(minimal()) == first


def test_the_run_itself_was_handed_nothing():
    config = minimal()
    assert handover.take(config) == ({}, {}, {})
    assert handover.retries(config) is None
    assert config == minimal()
