"""What a report says first: a sentence for each kind of study, and what it rests on."""

import dataclasses

import pyarrow as pa
import pytest

from detrojan.analysis.report import headline
from tests.unit import cases, pages
from tests.unit import tables as made


def said(case):
    found = headline.of_tables(case())
    return found.first, " ".join(found.rest)


def with_column(table, name, change):
    """Return a table with other values in a column, each made from its row."""
    values = pa.array([change(row) for row in table.to_pylist()], table.schema.field(name).type)
    return table.set_column(table.column_names.index(name), table.schema.field(name), values)


def having(tables, **changed):
    return dataclasses.replace(tables, made={**tables.made, **changed})


def test_one_leads_and_its_numbers_come_first():
    first, rest = said(cases.winner)
    assert first.startswith("ibau leads on this grid (12 settings): ASR 97 → 5, ACC -")
    assert "minus that of nc, the next, is +1" in first
    assert (
        "It also holds for other data sets, architectures and attacks like these, against ft and nc" in rest
    )
    assert "best mean rank" not in first + rest


def test_a_lead_that_may_not_hold_elsewhere():
    first, rest = said(cases.winner_here)
    assert first.startswith("ibau leads on this grid")
    assert "Whether it holds elsewhere can't be said from 3 data sets, 1 architecture and 4 attacks" in rest
    assert "by data set its DER minus fine-tuning's is cifar10 +2" in rest
    assert "It also holds" not in rest


def test_who_can_not_be_told_apart_leads_together():
    first, rest = said(cases.tie)
    assert first.startswith("ibau (ASR 9")
    assert ") and nc (ASR 9" in first
    assert "lead on this grid (12 settings) and can't be told apart: mean ranks 1." in first
    assert "Each of them has a higher DER than fine-tuning on this grid (Holm, 5 %)." in rest


def test_three_or_more_lead_together_by_the_alphabet():
    tables = cases.winner()
    ranks = with_column(tables.ranks, "leader_apart_grid", lambda row: False)
    found = headline.of_tables(having(tables, ranks=ranks))
    assert found.first.startswith("All of them: anp, clp, fp, ft, ibau and nc lead together on this grid")
    # Fine-tuning is among them.
    assert not [sentence for sentence in found.rest if "than fine-tuning" in sentence]


def test_equal_ranks_are_a_tie_whatever_p_says():
    tables = cases.winner()
    ranks = with_column(tables.ranks, "mean_rank", lambda row: row["mean_rank"] and 2.0)
    assert "lead together" in headline.of_tables(having(tables, ranks=ranks)).first


def test_where_nothing_works_nobody_leads():
    first, rest = said(cases.nothing_works)
    assert first.startswith("No defense repaired anything (anp, fp and ft): the most that one changed net")
    assert first.endswith("The untouched model is as good.")
    for word in ("lead", "best"):
        assert word not in first + rest


def test_what_may_have_worked_is_not_said_to_do_nothing():
    tables = cases.winner()
    wide = with_column(tables.consistency, "net_grid_low", lambda row: -0.2)
    first = headline.of_tables(having(tables, consistency=wide)).first
    assert first.startswith("No defense surely repaired anything (anp, clp, fp, ft, ibau and nc)")
    assert "as good" not in first


def test_of_few_settings_numbers_are_all_there_is():
    first, rest = said(cases.too_little)
    assert first.startswith("Results of 2 models, one seed each, which describe these models: ft: ASR 9")
    assert "; mm_bd: ASR 9" in first
    assert "lead" not in first + rest
    assert "Too few data sets" in rest


def test_one_defense_has_nobody_to_be_ranked_with():
    tables = pages.tables_of(cases.cells({"ft": (0.5, 0.01)}))
    assert headline.of_tables(tables).first.startswith("Fewer than two defenses can be ranked: ft: ASR 9")


def test_with_one_seed_intervals_are_bounds():
    first, rest = said(cases.one_seed)
    assert first.startswith("ibau leads on this grid")
    assert "One seed a setting: intervals on this grid are upper bounds." in rest
    assert "Single seed:" in rest


def test_where_no_attack_took_it_says_what_may_help():
    first, rest = said(cases.failed_gate)
    assert first.startswith("No attack took: 0 of 2 models passed the gate. The nearest, ")
    assert "is below 80 %. What may help: more epochs, a larger ratio or a wider model; or another" in rest


def test_other_peoples_attacks_may_not_have_taken_either():
    cells = pages.of_rows(made.untouched(asr=0.4, attack_took=False), made.cell(attack_took=False))
    first = headline.of_tables(pages.without_models(cells)).first
    assert first == "No attack took: 0 of 1 model passed the gate. The nearest, badnets on x, has ASR 40.0 %."
    clean = pages.of_rows(made.untouched(attack="none"))
    assert headline.of_tables(pages.without_models(clean)).first.startswith("No model was attacked")


def test_other_peoples_results():
    first, rest = said(cases.leaderboard)
    assert "ibau (" in first
    assert "Not ranked: fp, planned in 4 of 12 settings, fewer than half of the 12 of another." in rest


def test_harm_and_failures_are_said():
    tables = cases.winner()
    harmful = with_column(tables.consistency, "share_harmful", lambda row: 0.12)
    failed = with_column(harmful, "share_failed", lambda row: 0.02 if row["defense"] == "nc" else 0.01)
    rest = headline.of_tables(having(tables, consistency=failed)).rest
    assert "ibau leaves 12 % of settings worse than untouched." in rest
    assert "Runs without a repaired model: nc 2 %." in rest


def test_what_a_lead_hangs_on_is_said():
    tables = cases.winner()
    others = {("dataset", "gtsrb"), ("attack", "lf")}
    leads = with_column(
        tables.leads,
        "leader",
        lambda row: "nc" if (row["axis"], row["level_left_out"]) in others else "ibau",
    )
    gates = with_column(
        tables.gate_sensitivity, "leads", lambda row: row["defense"] == "nc" and row["min_asr"] == 0.9
    )
    rest = headline.of_tables(having(tables, leads=leads, gate_sensitivity=gates)).rest
    assert "With a gate of ASR 90 % instead, nc would have the best mean rank." in rest
    said = "without data set gtsrb or attack lf nc would have the best mean rank."
    assert f"Left out one at a time, {said}" in rest


def test_models_near_the_limit_are_counted():
    tables = cases.winner()
    models = with_column(tables.models, "near_gate", lambda row: row["seed"] == 0 and row["attack"] == "lf")
    rest = headline.of_tables(dataclasses.replace(tables, models=models)).rest
    assert any(sentence.startswith("3 models within 3 points of the gate's limit") for sentence in rest)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"asr_before_mean": 0.95, "asr_mean": 0.364, "acc_drop_mean": 0.03}, "ASR 95 → 36, ACC -3.0"),
        ({"asr_before_mean": None, "asr_mean": None, "acc_drop_mean": -0.001}, "ACC +0.1"),
        ({"asr_before_mean": 0.9, "asr_mean": 0.9, "acc_drop_mean": None}, "ASR 90 → 90"),
        ({"asr_before_mean": None, "asr_mean": None, "acc_drop_mean": None}, "no ASR and no ACC known"),
    ],
)
def test_plain_numbers(row, text):
    assert headline.plain(row) == text
