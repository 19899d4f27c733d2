"""The terminal table: numbers, failures, notes, and how it behaves without a terminal."""

import io
import json
import re
import sys

import pyarrow as pa
import pytest
from rich.console import Console

from detrojan.analysis import derived
from detrojan.analysis.report import views
from detrojan.analysis.statistics import collect
from detrojan.commands import show
from detrojan.storage import records
from tests.command import exit_code
from tests.unit import cases, pages
from tests.unit import tables as made

ORIGIN = {"code": "c0de", "versions": json.dumps({"torch": "2.13.0"}), "git_commit": "abc"}


def cell(attack, defense, draw=0, *, threat_model="clean_data", spc=2, status="ok", reason=None, **measures):
    return (
        dict.fromkeys(collect.CELLS.names)
        | {"dataset": "digits", "architecture": "net", "attack": attack, "seed": 0, "draw": draw}
        | {"ratio": 0.0 if attack == "none" else 0.05, "defense": defense, "threat_model": threat_model}
        | {"protocol": "none" if defense == "none" else "survey"}
        | {"sources": "{}", "deviates": False, "steps": 10}
        | {"spc": spc, "status": status, "reason": reason, "chosen": "{}", "hyperparameters": "{}"}
        | {"seconds": 2.0, "peak_memory_bytes": 1, "forward_passes": 1, "backward_passes": 1, "device": "cpu"}
        | {"num_test": 10, "num_triggered": 9}
        | ORIGIN
        | measures
    )


def model(attack, **measures):
    return (
        dict.fromkeys(collect.MODELS.names)
        | {"dataset": "digits", "architecture": "net", "attack": attack, "seed": 0, "num_train": 100}
        | {"ratio": 0.0 if attack == "none" else 0.05, "num_poisoned": 5, "effective_ratio": 0.05}
        | {"num_parameters": 7, "architecture_settings": "{}", "optimization": "{}", "epochs": 1}
        | {"train_loss": 0.1, "train_accuracy": 0.9, "seconds": 3.0, "images_per_second": 9.0}
        | {"peak_memory_bytes": 1, "device": "cpu"}
        | ORIGIN
        | measures
    )


@pytest.fixture
def tables():
    untouched = {"threat_model": "none", "spc": 0}
    failed = {"attack_took": False}
    cells = [
        cell("none", "none", acc=0.99, **untouched),
        cell("none", "gp", status="not_applicable", reason="no attack, no trigger"),
        cell("sig", "ft", 0, acc=0.9, asr=0.1, ra=0.8, **failed),
        cell("sig", "ft", 1, acc=0.8, asr=0.1, ra=0.6, **failed),
        cell("sig", "none", acc=0.98, asr=0.25, ra=0.7, **untouched, **failed),
        cell("wanet", "none", acc=0.97, asr=0.95, ra=0.1, attack_took=True, **untouched),
    ]
    models = [
        model("none", acc=0.99),
        model("sig", acc=0.98, asr=0.25, ra=0.7, gate_reason="ASR 25.0 % is below 80 %", **failed),
        model("wanet", acc=0.97, asr=0.95, ra=0.1, attack_took=True, trigger_weakness="a faint warp"),
    ]
    cells = pa.Table.from_pylist(cells, collect.CELLS)
    return cells, pa.Table.from_pylist(models, collect.MODELS), derived.make({"cells": cells})["summary"]


@pytest.fixture
def folder(tables, tmp_path):
    for (name, schema), table in zip(show.TABLES.items(), tables, strict=True):
        records.write_table(table, tmp_path / "tables" / f"{name}.parquet", schema)
    return tmp_path


def shown(tables, folder, width=140):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    show.show(*tables, folder, console)
    return console.file.getvalue()


def test_groups_and_numbers(tables, tmp_path):
    lines = [line.split() for line in shown(tables, tmp_path).splitlines()]
    titles = [line for line in lines if line[:1] == ["digits"] and line[1] == "·"]
    assert [" ".join(title[4:]) for title in titles[:3]] == [
        "no attack",
        "wanet, ratio 0.05",
        "sig, ratio 0.05 · attack failed the gate",
    ]
    sig = lines.index(titles[2])
    assert " ".join(lines[sig + 1]) == "seed 0: ASR 25.0 % is below 80 %"
    assert lines[sig + 3] == ["untouched", "–", "98.0", "25.0", "70.0", "1/1", "2.0"]
    # Student's t with one degree of freedom: 12.706; the standard error of 0.9 and 0.8 is 0.05. The
    # upper end is clipped at 1, the lower one is not; of RA both are.
    ft = "ft clean_data 2 – 85.0 [21.5, 100.0] 10.0 70.0 [0.0, 100.0] 2/2 2.0"
    assert " ".join(lines[sig + 4]) == ft


def test_undefined_is_a_dash_and_failures_have_reasons(tables, tmp_path):
    text = shown(tables, tmp_path)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "untouched – 99.0 – – 1/1 2.0" in lines
    assert "gp clean_data 2 – – – – 0/1 –" in lines
    assert "1 of 6 cells have no result:" in text
    assert "1 × not_applicable: gp on digits · net · no attack: no attack, no trigger" in text


def test_notes_tell_intervals_failed_attacks_weak_triggers_and_paths(tables, folder):
    text = shown(tables, folder)
    assert text.count("95 %") == 1
    assert "[low, high] is the 95 % interval" in text
    assert "verdict: net, the ASR removed minus the ACC lost" in text
    assert "over draws of one model" in text
    assert "a low ASR is no defense's merit" in text
    assert "digits · wanet (1 model): a faint warp" in text
    assert f"{folder}/tables/summary.parquet" in text
    assert "not made yet" in text
    records.write_text("page", folder / "report" / "index.html")
    assert "not made yet" not in shown(tables, folder)


def test_what_intervals_are_over():
    def note(*over):
        return views.interval_note(pa.table({"interval_over": pa.array(over, pa.string())}))

    assert "one cell" in note(None)
    assert "over models." in note("models", None)
    assert "two or more" in note("models", "draws")
    assert "over models and draws." in note("models_draws", "models")
    assert "over models and draws where there are two or more models, else" in note("models_draws", "draws")


def test_shares_have_no_negative_zero():
    assert [views.share(value) for value in (-0.0004, -0.004, None)] == ["0.0", "-0.4", "–"]


def test_a_narrow_terminal_drops_columns_and_says_so(tables, tmp_path):
    text = shown(tables, tmp_path, width=45)
    assert "is given" not in text.splitlines()[1]
    assert "ASR %" in text.splitlines()[1]
    assert "narrow: without is given" in text
    assert max(map(len, text.split("Every number")[0].splitlines())) <= 45


def test_the_command_without_a_terminal(folder, capsys):
    assert exit_code("show", "--results", folder) == 0
    out = capsys.readouterr().out
    assert "untouched" in out
    assert "\x1b" not in out


def test_it_begins_as_the_report_does(tmp_path, capsys):
    tables = cases.too_little()
    for name, table in {"cells": tables.cells, "models": tables.models, **tables.made}.items():
        records.write_table(table, tmp_path / "tables" / f"{name}.parquet", table.schema)
    (tmp_path / "tables/gate_sensitivity.parquet").unlink()
    assert exit_code("show", "--results", tmp_path) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("Results of 2 models, one seed each, which describe these models: ft: ASR 9")
    assert " repaired " in said


def test_each_protocol_is_shown_by_itself(tmp_path, capsys):
    rows = made.random_study(attacks=("badnets",), ratios=(0.1,), spc=(2,), draws=2).to_pylist()
    rows += [row | {"protocol": "paper"} for row in rows if row["protocol"] == "survey"]
    tables = pages.tables_of(pages.of_rows(*rows))
    for name, table in {"cells": tables.cells, "models": tables.models, **tables.made}.items():
        records.write_table(table, tmp_path / "tables" / f"{name}.parquet", table.schema)
    assert exit_code("show", "--results", tmp_path) == 0
    _, survey, paper = re.split("protocol (?:survey|paper) =+", capsys.readouterr().out)
    assert survey.split() == paper.split()
    assert "anp" in survey


def test_tuning_is_a_line_a_search():
    paths = dict.fromkeys(("trial-00", "trial-02"), ("badnets", "sig"))
    rows = [made.untouched(attack=attack) for attack in ("badnets", "sig")]
    rows += [made.cell("ft", attack=a, protocol=name) for name, attacks in paths.items() for a in attacks]
    tables = views.Tables(made.of_rows(*rows), None, derived.make({"cells": made.of_rows(*rows)}))
    # ASR 100 → 10, ACC 95 → 90.
    assert show.tuning(tables) == [
        "ft on x, SPC 10, 3 trials: DER % survey 92.5, paper –, tuned 92.5, oracle 92.5; stability 1.00",
    ]
    assert show.tuning(views.Tables(made.of_rows(*rows[:2]), None, {})) == []


def test_missing_tables_are_one_line(tmp_path, capsys):
    assert exit_code("show", "--results", tmp_path) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "cells.parquet" in captured.err


def test_a_log_that_knows_no_dot_gets_another_sign(folder, monkeypatch):
    log = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", log)
    assert exit_code("show", "--results", folder) == 0
    log.flush()
    assert b"digits ? net" in log.buffer.getvalue()
