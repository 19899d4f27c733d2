"""The tables of the report: values and verdicts, and what becomes of them in CSV and LaTeX."""

import csv
import io
import re

import pytest

from detrojan.analysis.report import listings, views
from detrojan.analysis.report.listings import Block, Column, Listing
from tests.unit import cases, pages
from tests.unit import tables as made


@pytest.fixture(scope="module")
def tables():
    return pages.random_study(draws=2)


def rows_of(listing, spc=None):
    (block,) = [block for block in listing.blocks if block.spc == spc]
    return {row["defense"]: row for row in block.rows}


def test_the_ranking_joins_ranks_and_means_at_each_budget(tables):
    listing = listings.ranking(tables, "asr")
    assert [block.spc for block in listing.blocks] == [None, 2, 10]
    ranks = {(r["spc"], r["defense"]): r for r in tables.ranks.to_pylist() if r["measure"] == "asr"}
    means = {(r["spc"], r["defense"]): r for r in tables.consistency.to_pylist()}
    for spc in (None, 10):
        rows = rows_of(listing, spc)
        for defense in ("ft", "fp", "clp", "anp"):
            assert rows[defense]["mean_rank"] == ranks[spc, defense]["mean_rank"]
            assert rows[defense]["ra_grid_low"] == means[spc, defense]["ra_grid_low"]
        names = list(rows)
        known = [rows[name]["mean_rank"] for name in names[:4]]
        assert known == sorted(known)
        assert names[4:] == ["grad_prune", "untouched"]  # neither is ranked


def test_a_method_that_knows_the_trigger_is_an_upper_bound_and_has_no_rank(tables):
    row = rows_of(listings.ranking(tables, "der"))["grad_prune"]
    assert (row["badge"], row["mean_rank"]) == ("upper bound", None)
    assert row["der_mean"] is not None
    assert rows_of(listings.ranking(tables, "der"))["clp"]["badge"] == "no data"


def test_notes_tell_of_what_ranks_rest_on(tables):
    (note,) = {" ".join(block.notes) for block in listings.ranking(tables, "der").blocks if block.spc == 2}
    row = next(r for r in tables.ranks.to_pylist() if r["measure"] == "der" and r["spc"] == 2)
    assert f"Ranked: 4 defenses, all of them in {row['num_shared_all']} settings." in note
    assert "None of them surely repairs anything, so nobody leads." in note
    assert "Single seed" not in note  # there are two


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (cases.too_little, "Too few settings, or samples alone, to call one better"),
        (cases.nothing_works, "None of them surely repairs anything, so nobody leads."),
        (cases.one_seed, "ibau leads: on this grid"),
    ],
)
def test_notes_say_no_more_than_the_first_sentence(case, said):
    notes = " ".join(listings.ranking(case(), "der").blocks[0].notes)
    assert said in notes
    assert ("(Holm, 5 %)" in notes) == (case is cases.one_seed)


def test_no_share_changes_by_more_than_all_of_it():
    rows = listings.ranking(cases.too_little(), "der").blocks[0].rows
    assert min(row["asr_change_low"] for row in rows if row["asr_change_low"] is not None) >= -1
    of_ft = next(row for row in rows if row["defense"] == "ft")
    assert of_ft["asr_change"] == pytest.approx(-of_ft["asr_reduction_mean"])
    assert of_ft["asr_change_low"] == pytest.approx(-of_ft["asr_reduction_grid_high"])
    before, after = (100 * of_ft[f"asr{part}_mean"] for part in ("_before", ""))
    assert of_ft["asr_from_to"] == f"{before:.1f} → {after:.1f}"


@pytest.mark.parametrize(
    ("measure", "difference", "p", "expected"),
    [
        ("der", 0.1, 0.01, "better"),
        ("der", -0.1, 0.01, "worse"),
        ("asr", -0.1, 0.01, "better"),  # less attack success
        ("asr", 0.1, 0.01, "worse"),
        ("acc", 0.1, 0.05, ""),
        ("acc", 0.1, None, ""),
    ],
)
def test_a_verdict_takes_a_small_adjusted_p(measure, difference, p, expected):
    row = {"difference": difference, "p_grid": 0.001, "p_grid_holm": p, "p_beyond_holm": 1.0}
    assert listings.verdict(row, measure, "grid") == expected
    assert listings.verdict(row, measure, "beyond") == ""


@pytest.mark.parametrize(
    ("basis", "over", "said"),
    [
        ("bound_draws", "attack", ["One seed a setting", "drawn at random"]),
        ("draws", None, ["of these models", "Too few data sets"]),
        (None, "attack", ["No intervals on this grid", "drawn at random"]),
        ("seeds_draws", "attack", ["drawn at random"]),
    ],
)
def test_what_intervals_rest_on_is_said(basis, over, said):
    notes = listings.on_scopes([{"grid_basis": basis, "beyond_over": over}])
    assert len(notes) == len(said)
    assert all(words in note for words, note in zip(said, notes, strict=True))


def test_comparisons_stand_beside_each_other(tables):
    rows = rows_of(listings.comparisons(tables, "acc"), 10)
    table = {
        (r["baseline"], r["defense"]): r
        for r in tables.comparisons.to_pylist()
        if (r["measure"], r["spc"]) == ("acc", 10)
    }
    for baseline in ("ft", "fp"):
        for part in ("difference", "improvement_grid_high", "difference_beyond_low", "num_pairs"):
            assert rows["anp"][f"{baseline}_{part}"] == table[baseline, "anp"][part]
    assert rows["ft"]["fp_difference"] == table["fp", "ft"]["difference"]
    assert "ft_difference" not in rows["ft"]


def test_without_baselines_the_comparisons_say_so():
    tables = pages.tables_of(pages.of_rows(made.untouched(), made.cell("anp")))
    (block,) = listings.comparisons(tables, "der").blocks
    assert block.rows == []
    assert block.notes[0].startswith("No pairs: neither fine-tuning nor fine-pruning")


def test_every_cell_is_counted_once_among_outcomes_and_reasons(tables):
    outcomes = rows_of(listings.outcomes(tables))
    assert sum(row["total"] for row in outcomes.values()) == len(tables.cells)
    assert all(row["total"] == row["ok"] + row.get("diverged", 0) for row in outcomes.values())
    (block,) = listings.reasons(tables).blocks
    diverged = sum(status == "diverged" for status in tables.cells["status"].to_pylist())
    assert sum(row["num_cells"] for row in block.rows) == diverged


def test_the_heat_map_as_a_table_has_clean_models_for_accuracy_alone(tables):
    heads = {m: [c.head for c in listings.heatmap(tables, m).columns] for m in ("acc", "asr")}
    assert heads["acc"] == ["defense", "badnets", "blended", "sig", "no attack"]
    assert heads["asr"] == ["defense", "badnets", "blended", "sig"]


# --- files -----------------------------------------------------------------------------------------


def test_csv_has_the_values_of_the_tables(tables):
    rows = list(csv.DictReader(io.StringIO(listings.csv_text(listings.ranking(tables, "der")))))
    means = {(views.spc_text(r["spc"]), r["defense"]): r for r in tables.consistency.to_pylist()}
    for row in rows:
        name = "none" if row["defense"] == "untouched" else row["defense"]
        assert float(row["der_mean"]) == means[row["spc"], name]["der_mean"]
        assert float(row["asr_mean"]) == means[row["spc"], name]["asr_mean"]
    unranked = [row for row in rows if row["defense"] == "grad_prune"]
    assert {row["mean_rank"] for row in unranked} == {""}


def test_latex_is_a_table_of_booktabs():
    columns = [
        Column("defense", "defense"),
        Column("acc", "ACC, %", views.share, "low", "high"),
        Column("empty", "RA, %", views.share),
    ]
    rows = [{"defense": "ft_sam", "acc": 0.5, "low": 0.25, "high": 0.75}, {"defense": r"a&b\c", "acc": None}]
    blocks = [Block(None, rows, []), Block(2, rows[:1], [])]
    assert listings.latex(Listing("x", "A caption", columns, blocks)) == (
        "% A caption. Needs \\usepackage{booktabs}.\n"
        "\\begin{tabular}{lr}\n"
        "\\toprule\n"
        "defense & ACC, \\% \\\\\n"
        "\\midrule\n"
        "\\multicolumn{2}{l}{SPC pooled} \\\\\n"
        "ft\\_sam & 50.0 [25.0, 75.0] \\\\\n"
        "a\\&b\\textbackslash{}c & -- \\\\\n"
        "\\addlinespace\n"
        "\\multicolumn{2}{l}{SPC 2} \\\\\n"
        "ft\\_sam & 50.0 [25.0, 75.0] \\\\\n"
        "\\bottomrule\n"
        "\\end{tabular}\n"
    )


def test_no_latex_breaks_off_at_a_name_from_outside(tables):
    for listing in listings.of_tables(tables):
        _, *lines = listings.latex(listing).splitlines()
        for line in lines:
            assert not re.search(
                r"(?<!\\)[%#_$](?!\\infty|[<>]\$|\s|$)", line.replace("$<$", "").replace("$>$", "")
            ), line


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (listings.points, -0.0312, "-3.1"),
        (listings.points, -0.0002, "+0.0"),
        (listings.whole, 0.004, "<1"),
        (listings.whole, 0.999, ">99"),
        (listings.whole, 1.0, "100"),
        (listings.whole, 0.0, "0"),
        (listings.count, 12345, "12,345"),
    ],
)
def test_values_are_written_for_readers(write, value, text):
    assert write(value) == text


@pytest.mark.parametrize(
    ("apart", "rank", "said"),
    [
        (True, 2.0, "ft leads: on this grid it can be told from all others"),
        (False, 2.0, "fp, ft lead together"),
        (None, 2.0, "fp, ft lead together"),
        (True, 1.0, "fp, ft lead together"),  # equal ranks are a tie
    ],
)
def test_who_leads(apart, rank, said):
    first = {"defense": "ft", "mean_rank": 1.0, "leader_apart_grid": None}
    second = {"defense": "fp", "mean_rank": rank, "leader_apart_grid": apart}
    assert said in listings.leading([first, second])
