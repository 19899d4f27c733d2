"""Tables of several sites made one: shared rows, conflicts, the gate anew, and the study of it all."""

import copy
import shutil

import pytest
import yaml

from detrojan.analysis import derived
from detrojan.analysis.statistics import collect
from detrojan.cells import Draws
from detrojan.commands import merge
from detrojan.storage import records
from detrojan.study import files, grid
from detrojan.workflow import equal_code
from detrojan.workflow.equal_code import Proof, Record
from tests.command import exit_code
from tests.unit.test_schema import minimal
from tests.unit.test_show import cell, model

STUDY = minimal(
    architectures=["preactresnet18"], attacks=["badnets", "sig"], ratios=[0.05], defenses=["ft", "fp"]
)
UNTOUCHED = {"threat_model": "none", "spc": 0}


ALL_TABLES = derived.TABLES


@pytest.fixture(autouse=True)
def _few_tables(monkeypatch):
    """Ranks and consistency take a second, and all tests but one look at rows alone."""
    monkeypatch.setattr(derived, "TABLES", {"summary": ALL_TABLES["summary"]})


def untouched(attack, **measures):
    return cell(attack, "none", **UNTOUCHED, **measures)


def rows(attack, *, asr=0.95, acc=0.9):
    """Return the cells and models of a site that ran this attack: untouched and FT, and the clean model."""
    cells = [
        untouched("none", acc=0.92),
        cell("none", "ft", acc=0.91),
        untouched(attack, acc=acc, asr=asr, ra=0.1, attack_took=True),
        cell(attack, "ft", 0, acc=0.8, asr=0.2, ra=0.7, attack_took=True),
        cell(attack, "ft", 1, acc=0.8, asr=0.3, ra=0.6, attack_took=True),
    ]
    clean = model("none", acc=0.92)
    attacked = model(attack, acc=acc, asr=asr, ra=0.1, acc_loss=0.02, attack_took=True)
    return cells, [clean, attacked]


@pytest.fixture
def site(tmp_path):
    """Return a function that writes a site's results and returns their folder."""

    def write(name, cells, models, study=STUDY, **include):
        study = copy.deepcopy(study)
        if include:
            study["grid"]["include"] = [include]
        folder = tmp_path / name / "results"
        records.write_rows(cells, folder / "tables/cells.parquet", collect.CELLS)
        records.write_rows(models, folder / "tables/models.parquet", collect.MODELS)
        files.keep(study, folder)
        return folder

    return write


@pytest.fixture
def two(site):
    """Two sites, an attack each, which share the clean model."""
    return [site("a", *rows("badnets"), attack="badnets"), site("b", *rows("sig"), attack="sig")]


def merged(folders, *options):
    into = folders[0].parents[1] / "merged"
    code = exit_code("merge", *folders, "--into", into, *options)
    return into, code


def table(folder, name="cells", schema=collect.CELLS):
    return records.read_table(folder / "tables" / f"{name}.parquet", schema)


def place(row):
    return row["attack"], row["defense"], row["draw"]


def models(folder):
    return {row["attack"]: row for row in table(folder, "models", collect.MODELS).to_pylist()}


# --- rows ------------------------------------------------------------------------------------------


def test_what_both_sites_have_is_there_once(two, capsys):
    into, code = merged(two)
    assert code == 0
    found = [place(row) for row in table(into).to_pylist()]
    one = [(attack, "ft", draw) for attack in ("badnets", "sig") for draw in (0, 1)]
    controls = [("badnets", "none", 0), ("none", "ft", 0), ("none", "none", 0), ("sig", "none", 0)]
    assert found == sorted(one + controls)
    assert list(models(into)) == ["badnets", "none", "sig"]
    out = capsys.readouterr().out
    assert "8 cells of 3 models, merged from 2 sites, which share 2 cells and 1 model." in out
    assert "differ" not in out


def test_the_order_of_sites_changes_nothing(two, tmp_path):
    into, _ = merged(two)
    forwards = table(into)
    shutil.rmtree(into)
    into, _ = merged(two[::-1])
    assert table(into).equals(forwards)


def test_the_other_tables_are_those_of_the_merged_cells(two, monkeypatch):
    monkeypatch.setattr(derived, "TABLES", ALL_TABLES)
    into, _ = merged(two)
    given = {"cells": table(into), "models": table(into, "models", collect.MODELS)}
    for name, made in derived.make(given).items():
        assert table(into, name, ALL_TABLES[name].schema).equals(made), name
    found = table(into, "summary", ALL_TABLES["summary"].schema)
    (ft,) = (r for r in found.to_pylist() if (r["attack"], r["defense"]) == ("sig", "ft"))
    assert (ft["num_cells"], ft["asr_mean"]) == (2, pytest.approx(0.25))


def test_show_shows_it(two, capsys):
    into, _ = merged(two)
    assert exit_code("show", "--results", into) == 0
    out = capsys.readouterr().out
    assert "badnets, ratio 0.05" in out
    assert "sig, ratio 0.05" in out


def test_cost_and_origin_may_differ_and_the_first_site_is_kept(site):
    cells, trained = rows("badnets")
    elsewhere = {"seconds": 9.0, "peak_memory_bytes": 5, "device": "H100"}
    elsewhere |= {"versions": "{}", "git_commit": "x"}
    other = [row | elsewhere for row in cells], [row | elsewhere for row in trained]
    into, code = merged([site("a", cells, trained), site("b", *other)])
    assert code == 0
    assert set(table(into)["device"].to_pylist()) == {"cpu"}


# --- conflicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "code"), [("defend/ft", 0), ("defend/fp", 1)])
def test_rows_of_codes_that_give_the_same_numbers_are_one(two, site, monkeypatch, key, code):
    """Only where that is recorded of the method that made them."""
    cells, trained = rows("sig")
    cells[1] = cell("none", "ft", acc=0.91, code="beef")
    rule, _, methods = key.partition("/")
    values = dict.fromkeys(Proof._fields, "") | {"rule": rule, "methods": methods}
    proof = equal_code.made(values | {"code": "beef", "equals": "c0de"})
    monkeypatch.setattr(equal_code, "record", lambda: Record([(2, proof)]))
    assert merged([two[0], site("c", cells, trained, attack="sig")])[1] == code


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("acc", 0.7, "acc 0.8 in {a}, 0.7 in {b}"),
        ("asr", None, "asr 0.2 in {a}, None in {b}"),
        ("ra", 0.75, "ra 0.7 in {a}, 0.75 in {b}"),
        ("status", "diverged", "status ok in {a}, diverged in {b}"),
        ("num_test", 11, "num_test 10 in {a}, 11 in {b}"),
        ("code", "beef", "code c0de in {a}, beef in {b}"),
        ("chosen", '{"epoch": 3}', 'chosen {{}} in {a}, {{"epoch": 3}} in {b}'),
        ("hyperparameters", '{"lr": 0.1}', 'hyperparameters {{}} in {a}, {{"lr": 0.1}} in {b}'),
    ],
)
def test_another_result_is_a_conflict(site, capsys, column, value, said):
    cells, trained = rows("badnets")
    other = [row | {column: value} if row["asr"] == 0.2 else row for row in cells]
    folders = [site("a", cells, trained), site("b", other, trained)]
    into, code = merged(folders)
    assert code == 1
    assert not into.exists()
    err = capsys.readouterr().err
    assert "detrojan: 1 row differs between sites" in err
    assert "digits/net/badnets/ratio-0.05/seed-0/ft/survey/spc-2/draw-0: " in err
    assert said.format(a=folders[0], b=folders[1]) in err

    into, code = merged(folders, "--prefer", folders[1])
    assert code == 0
    (row,) = (r for r in table(into).to_pylist() if place(r) == ("badnets", "ft", 0))
    assert row[column] == value
    assert "1 row differed; those of the preferred site were taken." in capsys.readouterr().out


def test_models_conflict_too_and_only_a_few_conflicts_are_listed(site, capsys):
    cells, trained = rows("badnets")
    other = [row | {"acc": row["acc"] - 0.1} for row in cells], [row | {"train_loss": 0.3} for row in trained]
    folders = [site("a", cells, trained), site("b", *other)]
    into, code = merged(folders)
    assert code == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("detrojan: 7 rows differ between sites; --prefer SITE says")
    assert f"digits/net/none/ratio-0/seed-0: train_loss 0.1 in {folders[0]}, 0.3 in" in lines[1]
    assert lines[-1] == "  and 2 more"
    assert len(lines) == 7

    for prefer, acc in ((folders[0], 0.92), (folders[1], pytest.approx(0.82))):
        into, _ = merged(folders, "--prefer", prefer)
        assert {place(r): r["acc"] for r in table(into).to_pylist()}[("none", "none", 0)] == acc
        assert models(into)["badnets"]["train_loss"] == (0.1 if prefer == folders[0] else 0.3)


def test_cells_of_a_model_that_the_other_side_trained_otherwise_are_pointed_out(site, capsys):
    cells, trained = rows("badnets")
    other = [row | {"defense": "fp"} if row["defense"] == "ft" else row for row in cells]
    retrained = [row | {"train_loss": 0.3} if row["attack"] == "badnets" else row for row in trained]
    folders = [site("a", cells, trained), site("b", other, retrained)]
    merged(folders, "--prefer", folders[0])
    assert "2 cells repaired a model that the preferred site has trained" in capsys.readouterr().out
    merged(folders, "--prefer", folders[1])
    assert "2 cells repaired a model" in capsys.readouterr().out


def test_the_preferred_of_three_settles_only_what_it_has(site, capsys):
    cells, trained = rows("badnets")
    other = [row | {"acc": 0.5} if row["defense"] == "ft" and row["draw"] else row for row in cells]
    folders = [site("a", *rows("sig")), site("b", cells, trained), site("c", other, trained)]
    assert merged(folders, "--prefer", folders[0])[1] == 1
    assert "1 row" in capsys.readouterr().err
    assert merged(folders, "--prefer", folders[2])[1] == 0


# --- the gate --------------------------------------------------------------------------------------


def test_a_clean_model_that_a_site_lacked_changes_the_verdict(site):
    cells, trained = rows("badnets", acc=0.7)
    # Without a clean model the ASR alone decides: the site says that the attack took.
    lacking = [r for r in cells if r["attack"] != "none"], [trained[1] | {"acc_loss": None}]
    into, code = merged([site("a", *lacking), site("b", *rows("sig"))])
    assert code == 0
    row = models(into)["badnets"]
    assert row["attack_took"] is False
    assert row["acc_loss"] == pytest.approx(0.22)
    assert row["gate_reason"].startswith("ACC 22.0 points below")
    flags = {(r["attack"], r["defense"]): r["attack_took"] for r in table(into).to_pylist()}
    assert flags[("badnets", "ft")] is False
    assert flags[("sig", "ft")] is True
    assert flags[("none", "ft")] is None


def test_the_verdict_is_no_conflict(site):
    cells, trained = rows("badnets")
    other = [row | {"attack_took": False} if row["attack"] == "badnets" else row for row in cells]
    judged = [row | {"attack_took": False, "gate_reason": "x", "acc_loss": 1.0} for row in trained]
    into, code = merged([site("a", other, judged), site("b", cells, trained)])
    assert code == 0
    assert models(into)["badnets"]["attack_took"] is True
    assert models(into)["badnets"]["gate_reason"] is None


# --- the study -------------------------------------------------------------------------------------


def written(folder):
    text = (folder / "study.yaml").read_text()
    return text.splitlines()[0], files.load_study(yaml.safe_load(text))


def with_grid(**changes):
    study = copy.deepcopy(STUDY)
    study["grid"] |= changes
    return study


def test_slices_become_the_whole_study_again(two):
    head, study = written(merged(two)[0])
    assert head == f"# Merged from {two[0]}, {two[1]}: their grids as one."
    assert set(grid.shards(study)) == set(grid.shards(files.load_study(STUDY)))


def test_a_site_that_left_nothing_out_decides(site):
    slice_ = site("a", *rows("badnets"), attack="badnets")
    whole = site("b", *rows("sig"), study=with_grid(exclude=[{"attack": "sig", "defense": "fp"}]))
    _, study = written(merged([slice_, whole])[0])
    assert study.grid.include == []
    assert study.grid.exclude == []  # the first one excludes nothing


def test_what_all_exclude_stays_excluded(site):
    both = with_grid(exclude=[{"attack": "sig", "ratio": ">0.05"}, {"defense": "fp"}])
    one = with_grid(exclude=[{"attack": "sig", "ratio": "> 0.05"}])
    folders = [site("a", *rows("badnets"), study=both), site("b", *rows("sig"), study=one)]
    _, study = written(merged(folders)[0])
    assert [f.conditions for f in study.grid.exclude] == [{"attack": "sig", "ratio": "> 0.05"}]


def test_lists_are_united_and_draws_stay_apart(site):
    one = with_grid(attacks=["badnets"], spc=[2], draws=["0-1", "4-7"], seeds=[0])
    other = with_grid(attacks=["sig"], spc=[10, 2], draws=["0-5", "9"], seeds=[1], defenses=["clp"])
    other["grid"]["controls"] = False
    folders = [site("a", *rows("badnets"), study=one), site("b", *rows("sig"), study=other)]
    _, study = written(merged(folders)[0])
    assert study.grid.attacks == ["badnets", "sig"]
    assert study.grid.spc == [2, 10]
    assert study.grid.seeds == [0, 1]
    assert study.grid.defenses == ["ft", "fp", "clp"]
    assert study.grid.draws == [Draws(0, 1), Draws(2, 3), Draws(4, 7), Draws(9, 9)]


def test_studies_that_differ_in_more_than_the_grid_are_named(site, capsys):
    other = {**with_grid(), "training": {"epochs": 7}, "gate": {"min_asr": 0.5}}
    folders = [site("a", *rows("badnets")), site("b", *rows("sig"), study=other)]
    head, study = written(merged(folders)[0])
    a, b = folders
    assert head == f"# Of {a} alone: in {a}, {b} the studies differ in training, gate."
    assert study == files.load_study(STUDY)
    assert "differ in training, gate" in capsys.readouterr().out


def test_where_images_lie_is_no_difference():
    def study(path, side=32):
        images = {"source": "image_folder", "path": path, "image_size": side}
        return files.load_study({**STUDY, "datasets": {"digits": images}})

    assert merge.differences([study("/here"), study("/there")]) == []
    assert merge.differences([study("/here"), study("/there", 64)]) == ["datasets"]


# --- what can't be meant ---------------------------------------------------------------------------


def test_bad_input_is_one_line(two, capsys):
    def refused(folders, *options):
        assert exit_code("merge", *map(str, folders), *map(str, options)) == 1
        err = capsys.readouterr().err
        assert err.startswith("detrojan: ")
        return err

    into = two[0].parents[1] / "merged"
    assert "two or more sites" in refused(two[:1], "--into", into)
    assert "each once" in refused([two[0], two[0]], "--into", into)
    assert "a site's own results" in refused(two, "--into", two[0])
    (into / "metrics").mkdir(parents=True)
    assert "a site's own results" in refused(two, "--into", into)
    shutil.rmtree(into)
    assert f"--prefer {into}: none of the sites" in refused(two, "--into", into, "--prefer", into)
    (two[1] / "tables/models.parquet").unlink()
    assert "models.parquet: no such Parquet table" in refused(two, "--into", into)
    (two[1] / "study.yaml").unlink()
    assert "study.yaml is missing" in refused(two, "--into", into)
    assert not into.exists()
