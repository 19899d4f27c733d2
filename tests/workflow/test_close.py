"""A study is closed: what limits killed again and again becomes rows, in tables and report."""

from detrojan.cells import Draws, Model
from detrojan.storage.columns import OK, OUT_OF_MEMORY
from detrojan.workflow import attempts
from detrojan.workflow.attempts import Diary

MODEL = Model("tiny", "preactresnet18", "badnets", 0.1, 0)
SHARD = MODEL._asdict() | {"defense": "ft", "protocol": "survey", "spc": 2, "draws": Draws(0, 1)}


def killed(workshop, monkeypatch, rule, axes):
    """Leave the record of a job that was killed three times without a warning."""
    monkeypatch.setattr("socket.gethostname", lambda: "another machine")
    for attempt in range(3):
        diary = Diary(rule, axes, "logs/x.log", workshop.folder / attempts.FOLDER)
        diary.start(mem_mb=1000 * 2**attempt, runtime_min=None)
    monkeypatch.undo()


def rows(workshop):
    return {(row["attack"], row["defense"], row["draw"]): row for row in workshop.table("cells").to_pylist()}


def test_a_shard_then_its_model_are_given_up_and_come_back(workshop, monkeypatch):
    before = rows(workshop)
    killed(workshop, monkeypatch, "defend", SHARD)
    killed(workshop, monkeypatch, "check_trigger", MODEL._asdict())
    assert workshop.planned() == {}, "without the word nothing is given up"
    assert workshop.planned("--config", "close=5") == {}, "nor before it was killed so often"

    workshop.snakemake("--config", "close=true")
    closed = rows(workshop)
    assert set(closed) == set(before)
    given_up = {key for key, row in closed.items() if row != before[key]}
    assert given_up == {("badnets", "ft", 0), ("badnets", "ft", 1)}
    for key in given_up:
        row = closed[key]
        assert (row["status"], row["acc"], row["asr"]) == (OUT_OF_MEMORY, None, None)
        assert (
            row["reason"]
            == "defend was killed without a warning, as for memory, 3 times: 1000, 2000, 4000 MB"
        )
        assert row["attack_took"] == before[key]["attack_took"]
    judged = {row["attack"]: row for row in workshop.table("models").to_pylist()}
    assert judged["badnets"]["clean_asr"] is None, "a check that is given up leaves its columns empty"
    assert judged["badnets"]["attack_took"] is not None
    assert "without a warning" in (workshop.folder / "results/report/index.html").read_text()

    killed(workshop, monkeypatch, "train", MODEL._asdict())
    workshop.snakemake("--until", "aggregate", "--config", "close=true")
    closed = rows(workshop)
    assert set(closed) == set(before)
    assert {row["status"] for key, row in closed.items() if key[0] == "badnets"} == {OUT_OF_MEMORY}
    assert [row for key, row in closed.items() if key[0] == "none"] == [
        row for key, row in before.items() if key[0] == "none"
    ]
    assert workshop.table("models")["attack"].to_pylist() == ["none"]

    # A plain run takes back what was given up; here all of it is still there.
    workshop.snakemake("--until", "aggregate")
    assert rows(workshop) == before
    assert before["badnets", "ft", 0]["status"] == OK
