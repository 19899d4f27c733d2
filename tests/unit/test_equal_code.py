"""The record of codes that give the same numbers: what follows from it, and what is refused."""

import re

import pytest

from detrojan.workflow import equal_code, graph
from detrojan.workflow.equal_code import Proof, Record

A, B, C, D = (letter * 16 for letter in "abcd")
FT = "defend/ft"


def proof(code, equals, key=FT, **changed):
    rule, _, methods = key.partition("/")
    values = {"date": "2026-01-02", "study": "config/smoke.yaml", "jobs": 2, "files": 8, "commit": "c0ffee"}
    values |= {"equals_commit": "beef", "versions": "python=3.11.7", "device": "cpu"}
    values |= {"rule": rule, "methods": methods, "code": code, "equals": equals}
    return equal_code.made(values | changed)


@pytest.fixture
def table(tmp_path):
    """Return a function that writes a record and returns its path."""

    def write(*proofs):
        path = tmp_path / "equal_code.csv"
        Record(path=path).write(proofs)
        return path

    return write


def record(*proofs):
    return Record(enumerate(proofs, 2))


def test_a_chain_has_one_oldest_code_in_whatever_order_its_rows_are():
    for chain in ([(B, A), (C, B), (D, C)], [(D, C), (B, A), (C, B)]):
        found = record(*(proof(*pair) for pair in chain))
        assert {found.oldest(FT, code) for code in (A, B, C, D)} == {A}


def test_what_is_not_recorded_is_its_own_oldest():
    assert record().oldest(FT, B) == B
    assert record(proof(B, A)).oldest(FT, C) == C


def test_a_proof_holds_for_its_rule_and_methods_alone():
    found = record(proof(B, A))
    assert found.oldest("defend/fp", B) == B
    assert found.oldest("evaluate", B) == B
    found = record(proof(B, A, "evaluate"))
    assert found.oldest("evaluate", B) == A


def test_two_ways_to_one_oldest_code_are_fine():
    """Two branches were proved, and what they were merged to against either."""
    found = record(proof(B, A), proof(C, A), proof(D, B), proof(D, C))
    assert found.oldest(FT, D) == A


def test_a_long_chain_is_followed():
    codes = [f"{number:016x}" for number in range(3000)]
    found = record(*(proof(*pair) for pair in zip(codes[:0:-1], codes[-2::-1], strict=True)))
    assert found.oldest(FT, codes[-1]) == codes[0]


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([(A, A)], f"line 2: {A} of {FT} gives the numbers of itself"),
        ([(A, B), (B, A)], "gives the numbers of itself, through"),
        ([(A, B), (B, C), (C, A)], "gives the numbers of itself, through"),
        ([(C, A), (C, B)], f"line 3: {C} of {FT} gives the numbers of {B} here, and of {A} elsewhere"),
        (
            [(B, A), (D, C), (D, B)],
            f"line 4: {D} of {FT} gives the numbers of {A} here, and of {C} elsewhere",
        ),
    ],
)
def test_a_circle_and_two_oldest_codes_are_refused_in_one_line(pairs, said):
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        record(*(proof(*pair) for pair in pairs))
    assert "\n" not in str(refused.value)
    assert "delete one of the rows" in str(refused.value)


def test_what_connects_two_codes_is_told():
    ab, bc, ad = proof(B, A), proof(C, B), proof(D, A)
    found = record(ab, bc, ad)
    assert found.between(FT, C, A) == [bc, ab]
    assert found.between(FT, A, C) == [bc, ab]
    assert found.between(FT, C, B) == [bc]
    assert found.between(FT, D, C) == [ad, bc, ab]
    assert found.between(FT, C, C) == []


def test_proofs_are_added_to_those_that_are_there(table):
    path = table(proof(B, A, study="one, and another"))
    Record.load(path).write([proof(C, B)])
    assert list(Record.load(path).proofs.values()) == [proof(B, A, study="one, and another"), proof(C, B)]
    with pytest.raises(ValueError, match="gives the numbers of itself"):
        Record.load(path).write([proof(A, C)])
    assert len(Record.load(path).proofs) == 2


def test_without_a_file_nothing_is_recorded(tmp_path):
    assert Record.load(tmp_path / "none.csv").proofs == {}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (B, "<<<<<<< ours", "line 3: code should be a digest of 16 digits, found '<<<<<<< ours'"),
        (f"defend,ft,{B}", "<<<<<<< ours\n", "line 3: 1 values where there should be 12"),
        ("2026-01-02", "last week", "line 3: date should be YYYY-MM-DD, found 'last week'"),
        (",2,8,", ",0,8,", "line 3: jobs should be a whole number, at least 1, found '0'"),
        (",2,8,", ",2,,", "line 3: files should be a whole number, at least 1, found ''"),
    ],
)
def test_a_mangled_line_is_refused_in_one_line_that_names_it(table, old, new, said):
    path = table(proof(C, A, "defend/fp"), proof(B, A))
    lines = path.read_text().split("\n")
    assert old in lines[2]
    lines[2] = lines[2].replace(old, new)
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=re.escape(f"{path}, {said}")) as refused:
        Record.load(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "rule,methods\n", "\xff"])
def test_a_file_that_is_no_record_is_refused(tmp_path, text):
    path = tmp_path / "equal_code.csv"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"the columns should be rule,methods,code|no table of text"):
        Record.load(path)


def test_the_record_that_comes_with_the_code_is_whole_and_names_rules_that_there_are():
    for row in equal_code.record().proofs.values():
        assert isinstance(row, Proof)
        assert row.rule in graph.RULES
        assert len(row.methods.split("/")) == max(1, len(graph.RULES[row.rule].methods))


def test_digests_know_nothing_of_the_record(monkeypatch):
    before = graph.all_code()
    monkeypatch.setattr(equal_code, "record", lambda: record(proof(before[FT], A)))
    assert graph.all_code() == before
    assert graph.oldest_code(FT, before[FT]) == A
