"""Other people's tables: what a mapping may say, what a table must have, what becomes of its rows."""

import math
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from detrojan.analysis.others import external
from detrojan.analysis.statistics.collect import CELLS
from detrojan.analysis.tables import pairs
from detrojan.analysis.tables.consistency import make as consistency
from detrojan.analysis.tables.ranks import make as rank
from detrojan.storage import records

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "config" / "external" / "backdoorbench.yaml"
PAGE = (ROOT / "docs" / "compare.md").read_text()
LEADERBOARD = ROOT.parent / "shared" / "data" / "leaderboard.csv"

MAPPING = {
    "source": "Theirs",
    "citation": "Somebody, 2020",
    "columns": {
        "dataset": "data",
        "architecture": "net",
        "attack": "attack",
        "ratio": "rate",
        "defense": "defense",
        "acc": "CA",
        "asr": "ASR",
        "ra": "RA",
    },
    "constants": {"seed": 0, "spc": 0, "draw": 0},
    "rename": {"attack": {"badnet": "badnets", "clean": "none"}, "defense": {"nothing": "none"}},
    "missing": {"": "not run", -1: "failed"},
    "scale": "fraction",
    "budget": "some images",
    "threat_models": {"abl": "training_data"},
}
TABLE = """\
data,net,attack,rate,defense,CA,ASR,RA
gtsrb,preactresnet18,badnet,0.1,nothing,0.9,0.95,0.05
gtsrb,preactresnet18,badnet,0.1,ft,0.88,0.15,0.7
gtsrb,preactresnet18,badnet,0.1,abl,0.5,0.1,0.4
gtsrb,preactresnet18,badnet,0.1,fp,-1.0,-1,-1
gtsrb,preactresnet18,badnet,0.05,nothing,0.92,0.5,0.4
gtsrb,preactresnet18,badnet,0.05,ft,0.9,0.1,0.8
gtsrb,preactresnet18,lira,0.1,nothing,,,
gtsrb,preactresnet18,lira,0.1,ft,0.8,0.2,0.6
gtsrb,preactresnet18,lira,0.1,fp,0.7,,-1
"""


@pytest.fixture
def files(tmp_path):
    """Write a mapping and a table, changed as asked; return both as read."""

    def write(table=TABLE, /, **changes):
        mapping = {**MAPPING, **changes}
        (tmp_path / "mapping.yaml").write_text(yaml.safe_dump(mapping))
        (tmp_path / "table.csv").write_text(table)
        return external.read_table(tmp_path / "table.csv"), external.load_mapping(tmp_path / "mapping.yaml")

    return write


def mistakes_in_mapping(tmp_path, changes=(), *, without=()):
    raw = {key: value for key, value in {**MAPPING, **dict(changes)}.items() if key not in without}
    (tmp_path / "mapping.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(external.MappingError) as error:
        external.load_mapping(tmp_path / "mapping.yaml")
    assert str(error.value).startswith("the mapping has ")
    return error.value.mistakes


def mistakes_in_table(files, table, **changes):
    with pytest.raises(external.TableError) as error:
        external.cells(*files(table, **changes))
    assert str(error.value).startswith("the table has ")
    return error.value.mistakes


def by_key(cells):
    return {(row["attack"], row["ratio"], row["defense"]): row for row in cells.to_pylist()}


# --- rows ------------------------------------------------------------------------------------------


def test_rows_become_cells(files):
    cells = external.cells(*files())
    assert cells.schema == CELLS
    assert len(cells) == 9
    row = by_key(cells)["badnets", 0.1, "ft"]
    assert (row["acc"], row["asr"], row["ra"]) == (0.88, 0.15, 0.7)
    assert (row["status"], row["reason"], row["attack_took"]) == ("ok", None, True)
    assert (row["seed"], row["spc"], row["draw"], row["threat_model"]) == (0, 0, 0, "clean_data")
    assert row["acc_drop"] == pytest.approx(0.02)
    assert row["asr_reduction"] == pytest.approx(0.8)
    assert row["der"] == pytest.approx((0.8 - 0.02 + 1) / 2)
    # A cost of 0 would win every comparison of costs.
    assert math.isnan(row["seconds"])
    assert row["forward_passes"] == 0


def test_every_row_has_an_outcome(files):
    rows = by_key(external.cells(*files()))
    failed = rows["badnets", 0.1, "fp"]
    assert (failed["status"], failed["reason"], failed["acc"], failed["der"]) == (
        "missing",
        "failed",
        None,
        None,
    )
    assert rows["lira", 0.1, "none"]["reason"] == "not run"
    partly = rows["lira", 0.1, "fp"]
    assert (partly["status"], partly["acc"], partly["asr"]) == ("ok", 0.7, None)
    assert partly["reason"] == "without ASR and RA: not run; failed"


def test_gate_is_the_untouched_rows(files):
    rows = by_key(external.cells(*files()))
    assert rows["badnets", 0.1, "abl"]["attack_took"] is True
    assert rows["badnets", 0.05, "ft"]["attack_took"] is False
    assert rows["lira", 0.1, "ft"]["attack_took"] is None  # nobody published the untouched model
    assert rows["lira", 0.1, "ft"]["acc_drop"] is None
    rows = by_key(external.cells(*files(gate={"min_asr": 0.5})))
    assert rows["badnets", 0.05, "ft"]["attack_took"] is True


def test_clean_models_count_for_the_gate_and_have_no_asr(files):
    # ACC 0.9 of the attacked model is 9.9 points below: within the gate's ten; then 0.1 more.
    for clean_acc, took in ((0.999, True), (1.0, True), (1.0001, False)):
        acc = 0.9 - max(0, clean_acc - 1)
        table = TABLE.replace("0.1,nothing,0.9,", f"0.1,nothing,{acc},")
        table += f"gtsrb,preactresnet18,clean,,nothing,{min(1, clean_acc)},0.01,0.9\n"
        table += "gtsrb,preactresnet18,clean,0.1,ft,0.95,,\n"
        rows = by_key(external.cells(*files(table)))
        assert rows["badnets", 0.1, "ft"]["attack_took"] is took
        clean, tuned = rows["none", 0.0, "none"], rows["none", 0.0, "ft"]
        assert (clean["attack_took"], clean["asr"], clean["ra"]) == (None, None, None)
        assert (tuned["status"], tuned["reason"]) == ("ok", None)  # it has no ASR to miss


def test_percent(files):
    lines = [line.split(",") for line in TABLE.splitlines()]
    for line in lines[1:]:
        line[5:] = [f"{100 * float(text):g}" if text and float(text) >= 0 else text for text in line[5:]]
    table = "\n".join(map(",".join, lines))
    # A sum of floats may exceed 100 by a rounding error.
    table += "\ngtsrb,preactresnet18,badnet,0.1,nad,100.00000000001,0,0\n"
    rows = by_key(external.cells(*files(table, scale="percent")))
    assert rows["badnets", 0.1, "ft"]["acc"] == pytest.approx(0.88)
    assert rows["badnets", 0.1, "fp"]["status"] == "missing"  # markers are not scaled
    assert rows["badnets", 0.1, "nad"]["acc"] == 1.0


def test_a_table_may_lack_ra_and_hold_one_attack_alone(files):
    columns = {key: value for key, value in MAPPING["columns"].items() if key not in ("ra", "attack")}
    constants = {**MAPPING["constants"], "attack": "wanet"}
    table = "\n".join(TABLE.splitlines()[:5])
    rows = by_key(external.cells(*files(table, columns=columns, constants=constants)))
    row = rows["wanet", 0.1, "ft"]
    assert (row["status"], row["reason"], row["ra"]) == ("ok", None, None)


def test_columns_of_seeds_and_budgets(files):
    table = "data,net,attack,rate,defense,CA,ASR,RA,seed,n,try\n"
    table += "g,n,badnet,10%,nothing,0.9,0.9,0,3,0,0\n"
    table += "g,n,badnet,10%,nothing,0.9,0.7,0,4,50,2\n"  # an untouched model has neither budget nor draw
    table += "g,n,badnet,10%,ft,0.9,0.1,0,3,10,1\n"
    changes = {
        "columns": {**MAPPING["columns"], "seed": "seed", "spc": "n", "draw": "try"},
        "constants": {},
        "rename": {**MAPPING["rename"], "ratio": {"10%": 0.1}},
    }
    rows = external.cells(*files(table, **changes)).to_pylist()
    keys = [(row["ratio"], row["seed"], row["defense"], row["spc"], row["draw"]) for row in rows]
    assert keys == [(0.1, 3, "ft", 10, 1), (0.1, 3, "none", 0, 0), (0.1, 4, "none", 0, 0)]
    assert [row["attack_took"] for row in rows] == [True, True, False]


@pytest.mark.parametrize("suffix", [".tsv", ".parquet"])
def test_other_kinds_of_tables(files, tmp_path, suffix):
    table, mapping = files()
    path = tmp_path / f"table{suffix}"
    if suffix == ".tsv":
        path.write_text(TABLE.replace(",", "\t"))
    else:
        frame = pd.read_csv(tmp_path / "table.csv")  # numbers, and NaN for what is blank
        pq.write_table(pa.Table.from_pandas(frame), path)
    cells = external.cells(external.read_table(path), mapping)
    pd.testing.assert_frame_equal(cells.to_pandas(), external.cells(table, mapping).to_pandas())


def test_notes_count_what_a_reader_must_know(files):
    table, mapping = files()
    notes = external.notes(external.cells(table, mapping), mapping)
    assert notes[:4] == [
        "9 rows: 7 with values, 2 without.",
        "3 attacked models: the attack took in 1, not in 1; of 1 the untouched model is missing.",
        "Rows that lack some of their measures: 1; their reason says which.",
        (
            "Rows with values of a model whose untouched row is missing: 2; they have no relative measures "
            "and are in no ranking."
        ),
    ]
    assert "Not ours, under the table's own names: attack lira." in notes
    assert "Shown and marked, but not ranked (training_data): abl." in notes
    assert notes[-1] == "The defender holds some images."


# --- mistakes in a mapping -------------------------------------------------------------------------


def test_networks_that_a_study_may_name_are_ours(files):
    table, mapping = files()
    cells = external.cells(table, mapping)

    def notes_of(name):
        place = cells.column_names.index("architecture")
        named = pa.array([name] * len(cells), pa.string())
        return " ".join(external.notes(cells.set_column(place, cells.field(place), named), mapping))

    assert "architecture vit_q_16" in notes_of("vit_q_16")
    assert "architecture" not in notes_of("vit_b_16")


def test_mistakes_of_a_mapping_are_listed_together(tmp_path):
    columns = {**MAPPING["columns"], "atack": "attack", "seed": "seed"}
    del columns["attack"], columns["asr"]
    found = mistakes_in_mapping(
        tmp_path,
        {
            "columns": columns,
            "scale": "percentage",
            "threat_models": {"abl": "training"},
            "gate": {"min_asr": 80},
            "settings": {"epoch": 5, "overrides": [{"when": {"data": "x"}, "set": {"lr": -1}}]},
        },
        without=["budget"],
    )
    assert found == [
        "columns.asr: missing: column of ASR",
        "columns.atack: unknown key 'atack'; did you mean 'attack'?",
        "scale: should be 'fraction' or 'percent', found 'percentage'",
        "budget: missing: what the defender holds, in words",
        (
            "threat_models.abl: should be 'data_free', 'clean_data', 'known_trigger' or 'training_data', "
            "found 'training'"
        ),
        "gate.min_asr: should be less than or equal to 1, found 80",
        "settings.overrides[0].when.data: unknown key 'data'; did you mean 'dataset'?",
        "columns.attack: missing: column of the attack; without one, give constants.attack",
        "constants.seed: columns.seed is given too: keep one of them",
        "settings.epoch: unknown key 'epoch'; did you mean 'epochs'?",
        "settings.overrides[0].set.lr: should be greater than 0, found -1",
    ]


@pytest.mark.parametrize("text", ["[1, 2]", "", "a: [", "\xe9"])
def test_what_is_no_mapping(tmp_path, text):
    path = tmp_path / "mapping.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"mapping\.yaml(, line 1)?: "):
        external.load_mapping(path)


def test_shipped_mapping():
    mapping = external.load_mapping(SHIPPED)
    # The last override that matches wins; names are those after renaming.
    at = {"dataset": "tiny_imagenet", "architecture": "preactresnet18", "attack": "badnets", "ratio": 0.1}
    setting = mapping.setting({**at, "defense": "clp"})
    assert (setting.epochs, setting.defense, setting.architecture) == (200, {"u": 5}, {"width": 64})
    assert mapping.setting({**at, "defense": "ft", "attack": "wanet"}).schedule == "constant"


@pytest.mark.parametrize(
    "kind", [external.TableMapping, external.Columns, external.Renames, external.TheirSetting]
)
def test_every_key_is_explained(kind):
    for name in kind.model_fields:
        assert f"`{name}`" in PAGE, name


# --- mistakes in a table ---------------------------------------------------------------------------


def test_missing_columns(files):
    columns = {**MAPPING["columns"], "acc": "ca", "ra": "robust"}
    assert mistakes_in_table(files, TABLE, columns=columns) == [
        "columns.acc: unknown column 'ca'; there are data, net, attack, rate, defense, CA, ASR, RA",
        "columns.ra: unknown column 'robust'; there are data, net, attack, rate, defense, CA, ASR, RA",
    ]


def test_values_that_are_no_shares(files):
    table = (
        TABLE.replace("0.88,", "88,")
        .replace("0.8,0.2,0.6", "n/a,-0.2,1e-3")
        .replace("0.5,0.1,0.4", "inf,0,0")
    )
    assert mistakes_in_table(files, table) == [
        (
            "column 'CA' (acc): row 8 ('n/a') is no number: if that stands for a missing value, add it to "
            "missing, which has '', '-1'"
        ),
        (
            "column 'CA' (acc): rows 2, 3 ('88', 'inf') are outside 0 to 1, the range of scale: fraction "
            "(is it in percent?); a number that stands for a missing value belongs into missing"
        ),
        (
            "column 'ASR' (asr): row 8 ('-0.2') is outside 0 to 1, the range of scale: fraction; "
            "a number that stands for a missing value belongs into missing"
        ),
    ]


def test_fractions_taken_for_percent(files):
    assert mistakes_in_table(files, TABLE, scale="percent") == [
        "scale: in percent no measure exceeds 0.95 %: if they are fractions, say so, scale: fraction"
    ]


def test_keys(files):
    table = TABLE + "gtsrb,preactresnet18,badnet,0.1,ft,0.1,0.1,0.1\n,preactresnet18,badnet,x,fst,1,0,0\n"
    table += "gtsrb,preactresnet18,badnet,10,unheard,1,0,0\n"
    assert mistakes_in_table(files, table) == [
        "column 'data' (dataset): row 11 is blank: every row needs a name there",
        "column 'rate' (ratio): row 11 ('x') is no number",
        (
            "ratio: row 12 (10.0) is not between 0 and 1, as the poisoned share of all training images: "
            "write others as texts in rename.ratio, such as '10': 0.1"
        ),
        (
            "1 cells have two rows or more, such as rows 2, 10 (dataset=gtsrb, architecture=preactresnet18, "
            "attack=badnets, ratio=0.1, seed=0, defense=ft, protocol=survey, spc=0, draw=0): remove the "
            "repeats, or name the column that tells them apart, columns.seed, spc or draw; of the untouched "
            "model there is one row a seed, whatever its spc and draw"
        ),
        (
            "defense 'unheard' is none of ours: threat_models.unheard should say what it is given "
            "(clean_data, data_free, known_trigger or training_data), or rename.defense what we call it"
        ),
    ]


def test_blank_ratio_of_an_attacked_model(files):
    table = TABLE.replace("badnet,0.1,ft", "badnet,,ft")
    assert mistakes_in_table(files, table) == ["ratio: row 2 is blank: only a clean model has none"]


def test_no_untouched_model(files):
    rename = {"attack": MAPPING["rename"]["attack"]}
    threat_models = {**MAPPING["threat_models"], "nothing": "clean_data"}
    assert mistakes_in_table(files, TABLE, rename=rename, threat_models=threat_models) == [
        (
            "no row of an untouched model, which every defense is compared with: rename.defense says "
            "which name is 'none'; there are abl, fp, ft, nothing"
        )
    ]


def test_seeds_are_whole_numbers(files):
    columns = {**MAPPING["columns"], "seed": "data"}
    found = mistakes_in_table(files, TABLE, columns=columns, constants={"spc": 0, "draw": 0})
    assert found[0] == "column 'data' (seed): rows 1, 2, 3 and 6 more ('gtsrb') are no whole number"


def test_no_rows(files):
    assert mistakes_in_table(files, TABLE.splitlines()[0]) == ["it has no rows"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "No such file"),
        ("empty.csv", b"", "no whole table"),
        ("torn.parquet", b"PAR1", "no whole table"),
        ("latin.csv", b"a\xe9,b\n", "no whole table"),
        ("short.csv", b"a,b,c\n1,2,3\n1,2", r"short\.csv, line 3: 2 cells, where the head has 3"),
        ("within.csv", b"a,b\n1,0.91\n2,0.9", r"cut short in its last line, whose last value '0\.9'"),
        ("quoted.csv", b'a,b\n1,2\n1,"2', "line 3: no whole table"),
        ("long.csv", b"a,b\n1,2,3\n", "line 2: 3 cells, where the head has 2"),
        ("twice.csv", b"a,b,a\n1,2,3\n", "two columns are named 'a'"),
        ("line.csv", "a,b\n1,2\n1,x\u2028y\n".encode(), "row 2, column 'b': a character .*, U\\+2028"),
        ("bell.csv", b"a,b\n\x07,2\n", "row 1, column 'a': a character .*, U\\+0007"),
        ("head.csv", "a,b\u202e\n1,2\n".encode(), "the head, column 'b.u202e': a character"),
        ("table.xlsx", b"", r"tables are \.csv, \.tsv or \.parquet, not \.xlsx"),
    ],
)
def test_unreadable_tables(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        external.read_table(tmp_path / name)


# --- the leaderboard -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def leaderboard():
    if not LEADERBOARD.exists():
        pytest.skip("the leaderboard is not here")
    return external.cells(external.read_table(LEADERBOARD), external.load_mapping(SHIPPED))


def test_leaderboard_rows_are_all_there(leaderboard):
    frame = leaderboard.to_pandas()
    assert frame["status"].value_counts().to_dict() == {"missing": 10118, "ok": 5242}
    reasons = frame["reason"].value_counts().to_dict()
    assert reasons == {"no value published": 9959, "-1 in place of a value": 159}
    models = frame[frame["defense"] == "none"]
    assert models["attack_took"].map({True: "took", False: "failed"}).fillna(
        "unknown"
    ).value_counts().to_dict() == {
        "took": 344,
        "unknown": 326,
        "failed": 290,
    }


def test_leaderboard_cells_by_hand(leaderboard):
    rows = {
        tuple(row[axis] for axis in ("dataset", "architecture", "attack", "ratio", "defense")): row
        for row in leaderboard.to_pylist()
    }
    # 0,gtsrb,preactresnet18,badnet,no defense,0.001,0.9859857482185274,0.1268894192521877,0.8454254865646362
    row = rows["gtsrb", "preactresnet18", "badnets", 0.001, "none"]
    assert (row["acc"], row["asr"], row["ra"]) == (0.9859857482185274, 0.1268894192521877, 0.8454254865646362)
    assert row["attack_took"] is False
    # cifar10 at 10 %: badnet 0.9132 / 0.950333 / 0.046667, and after fine-tuning 0.8996 / 0.014778 / 0.893889
    row = rows["cifar10", "preactresnet18", "badnets", 0.1, "ft"]
    assert (row["acc"], row["attack_took"]) == (pytest.approx(0.8996, abs=1e-4), True)
    assert row["der"] == pytest.approx((0.950333 - 0.014778 - (0.9132 - 0.8996) + 1) / 2, abs=1e-4)


@pytest.fixture(scope="module")
def ranks(leaderboard):
    found = rank(leaderboard, pairs.make(leaderboard)).to_pandas()
    return found[found["spc"].isna()]


def test_leaderboard_is_ranked(ranks):
    for _, group in ranks.groupby("measure"):
        assert set(group[group["ranked"]]["defense"]) == {"bnp", "clp", "ft", "ibau", "nad", "nc"}
        assert group["mean_rank"].dropna().between(1, 6).all()
        assert group["mean_rank"].sum() == pytest.approx(6 * 7 / 2)
        assert group["single_seed"].all()
        assert (group["num_shared_all"] == 112).all()
    (fp,) = ranks[(ranks["measure"] == "der") & ~ranks["ranked"]].to_dict("records")
    assert fp["why_not"].startswith("planned in 43 of 247 settings")


def test_the_leaderboards_lead_is_a_tie(leaderboard, ranks):
    of_der = ranks[ranks["measure"] == "der"].set_index("defense")
    expected = {"ibau": 2.53, "nc": 2.59, "ft": 3.27, "nad": 3.46, "clp": 4.35, "bnp": 4.81}
    assert of_der["mean_rank"].dropna().to_dict() == pytest.approx(expected, abs=0.005)
    assert of_der.loc["nc", "leader_apart_grid"] is False
    found = pairs.make(leaderboard).to_pandas()
    found = found[(found["measure"] == "der") & found["spc"].isna()]
    assert not found["apart_beyond"].any()
    assert found["p_beyond_holm"].min() == pytest.approx(0.135, abs=0.001)


def test_the_page_has_the_leaderboards_numbers(leaderboard, ranks):
    of_der = ranks[ranks["measure"] == "der"].set_index("defense")["mean_rank"]
    found = consistency(leaderboard).to_pandas()
    found = found[found["spc"].isna() & (found["defense"] != "none")].sort_values("der_mean", ascending=False)
    rows = []
    for row in found.to_dict("records"):
        name = row["defense"]
        beats = f"{100 * row['share_beats_baselines']:.0f}" if name not in ("ft", "fp") else "–"
        texts = [
            f"`{name}`",
            row["threat_model"],
            f"{row['num_settings']}",
            f"{row['der_mean']:.3f}",
            *(
                f"{row[f'der_{scope}_low']:.3f}–{row[f'der_{scope}_high']:.3f}"
                for scope in ("grid", "beyond")
            ),
            f"{row['der_worst_tenth']:.3f}",
            f"{100 * row['share_harmful']:.0f}",
            beats,
            f"{of_der[name]:.1f}" if name in of_der.dropna() else "–",
        ]
        rows.append(f"| {' | '.join(texts)} |")
    assert "\n".join(rows) in PAGE


def test_leaderboard_is_written_as_a_table_of_ours(leaderboard, tmp_path):
    records.write_table(leaderboard, tmp_path / "cells.parquet", CELLS)
    assert records.read_table(tmp_path / "cells.parquet", CELLS).num_rows == 15360


def test_a_table_whose_last_line_has_no_end_is_read_with_a_word(tmp_path, caplog):
    (tmp_path / "table.csv").write_text("a,b\n1,2\n\n3,4")
    assert external.read_table(tmp_path / "table.csv").to_dict("list") == {"a": ["1", "3"], "b": ["2", "4"]}
    assert "its last line has no end" in caplog.text
