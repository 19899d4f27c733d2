"""Where no cluster can be started, the tests that need one say why. No cluster is started here."""

import os

import pytest

from tests.cluster import conftest


@pytest.fixture
def able(tmp_path, monkeypatch):
    """A machine on which a cluster can be started, by all appearances; return its folder of programs."""
    for program in conftest.PROGRAMS:
        (tmp_path / program).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(conftest, "DAEMONS", str(tmp_path))
    monkeypatch.setattr(conftest, "CONFIGURATION", tmp_path / "slurm.conf")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return tmp_path


def test_nothing_stands_in_the_way(able):
    assert conftest.obstacle() is None
    conftest.CONFIGURATION.write_text((conftest.HERE / "slurm-up").read_text())  # has the mark
    assert conftest.obstacle() is None


def test_missing_programs_are_named_with_their_packages(able):
    (able / "slurmdbd").unlink()
    reason = conftest.obstacle()
    assert "not installed: slurmdbd (" in reason
    assert "mariadb-server" in reason


def test_another_user_is_told(able, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "root" in conftest.obstacle()


def test_another_cluster_is_left_alone(able):
    conftest.CONFIGURATION.write_text("ClusterName=site\n")
    assert f"{conftest.CONFIGURATION} belongs to another cluster" in conftest.obstacle()
