"""What jobs cost: which row holds, what is asked of schedulers, and what finished runs teach."""

import json
import subprocess
import sys

import pytest

from detrojan import registry
from detrojan.analysis.statistics import collect
from detrojan.cells import Draws
from detrojan.commands import costs
from detrojan.storage import provenance, records
from detrojan.storage.columns import NOT_APPLICABLE, OK
from detrojan.workflow import job_costs
from detrojan.workflow.job_costs import Costs, Estimate, Key, Row
from tests.command import exit_code

HEAD = ",".join(job_costs.COLUMNS[:-1])  # tables of earlier versions lack expected_s
GPU = "NVIDIA A100-SXM4-40GB"
SHARD = {"defense": "ft", "architecture": "net", "dataset": "digits", "spc": 10, "draws": Draws(0, 4)}


@pytest.fixture(autouse=True)
def no_limits(monkeypatch):
    for variable in (job_costs.MAX_RUNTIME, job_costs.MAX_MEMORY):
        monkeypatch.delenv(variable, raising=False)


def table(tmp_path, *lines):
    path = tmp_path / "costs.csv"
    path.write_text("\n".join([HEAD, *lines]) + "\n")
    return path


def seconds(tmp_path, *lines, rule="defend", **axes):
    """Return the seconds that a table says a job takes; ``lines`` are keys but for the rule, and seconds."""
    keys = (line.rpartition(",") for line in lines)
    rows = [f"{rule},{key},,{taken},0,0,cpu,assumed" for key, _, taken in keys]
    return Costs.load(table(tmp_path, *rows)).estimate(rule, axes).seconds


# --- which row holds --------------------------------------------------------------------------------


def test_the_row_that_names_most_wins(tmp_path):
    rows = [",,,,1", "ft,,,,2", "ft,net,,,3", "ft,net,digits,,4", "fp,net,digits,,5"]
    axes = {"defense": "ft", "architecture": "net", "dataset": "digits", "spc": 10}
    assert seconds(tmp_path, *rows, **axes) == 4
    assert seconds(tmp_path, *rows[::-1], **axes) == 4
    assert seconds(tmp_path, *rows, **axes | {"dataset": "signs"}) == 3
    assert seconds(tmp_path, *rows, **axes | {"architecture": "other"}) == 2
    assert seconds(tmp_path, *rows, **axes | {"defense": "new"}) == 1


def test_of_rows_that_name_as_much_the_earlier_key_wins(tmp_path):
    assert seconds(tmp_path, ",net,,,1", ",,digits,,2", **SHARD) == 1
    assert seconds(tmp_path, ",net,digits,,1", "ft,,,10,2", **SHARD) == 2
    assert seconds(tmp_path, ",net,digits,,1", "ft,,,2,2", **SHARD) == 1  # at SPC 10 the other holds not


def test_a_row_holds_for_fewer_samples_too(tmp_path):
    rows = ["ft,,,2,1", "ft,,,10,2", "ft,,,,3"]
    asked = {spc: seconds(tmp_path, *rows, defense="ft", spc=spc) for spc in (1, 2, 3, 10, 11)}
    assert asked == {1: 1, 2: 1, 3: 2, 10: 2, 11: 3}
    assert seconds(tmp_path, *rows, defense="ft") == 3  # a job without samples


def test_the_method_is_the_attack_but_for_defend(tmp_path):
    axes = {"defense": "ft", "attack": "iab"}
    assert seconds(tmp_path, ",,,,1", "ft,,,,2", "iab,,,,3", **axes) == 2
    assert seconds(tmp_path, ",,,,1", "ft,,,,2", "iab,,,,3", rule="train", **axes) == 3
    assert seconds(tmp_path, ",,,,1", "ft,,,,2", rule="evaluate", **axes) == 1


def test_where_no_row_holds_the_formula_does(tmp_path):
    costs_of = Costs.load(table(tmp_path, "train,,,,,,36,0,0,cpu,measured"))
    axes = {"defense": "ft", "architecture": "preactresnet18", "dataset": "cifar10", "spc": 100}
    row = costs_of.row("defend", axes)
    assert row.source == "assumed"
    assert row.estimate.seconds == pytest.approx(31)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("defend,,,,,,one,0,0,cpu,assumed", "line 3: could not convert"),
        ("defend,,,,,,-1,0,0,cpu,assumed", "line 3: seconds, memory_mb, disk_mb should be numbers of 0 or"),
        ("defend,,,,,,1,nan,0,cpu,assumed", "line 3: seconds, memory_mb, disk_mb should be numbers of 0 or"),
        ("defence,,,,,,1,0,0,cpu,assumed", "line 3: no rule 'defence'"),
        ("defend,,,,,,1", "line 3"),
        ("defend,,,,ten,,1,0,0,cpu,assumed", "line 3: invalid literal"),
        ("defend,,,,,,1,0,0,cpu,assumed,2", "line 3: expected_s should be from 0 to the seconds, 1"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = table(tmp_path, "train,,,,,,1,0,0,cpu,assumed", line)
    path.write_text(path.read_text().replace(HEAD, ",".join(job_costs.COLUMNS)))
    with pytest.raises(ValueError, match=message):
        Costs.load(path)


def test_wrong_columns_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"costs\.csv is missing"):
        Costs.load(tmp_path / "costs.csv")
    (tmp_path / "costs.csv").write_text("rule,seconds\n")
    with pytest.raises(ValueError, match="line 1: the columns should be rule,method"):
        Costs.load(tmp_path / "costs.csv")


# --- what is asked of schedulers --------------------------------------------------------------------


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Return a function that has the given rows stand for the table of the checkout."""

    def give(*lines):
        path = table(tmp_path, *lines)
        monkeypatch.setattr(job_costs, "default", lambda: Costs.load(path))

    return give


def test_time_limits(given):
    given(
        "defend,,,,,,90,0,0,cpu,assumed", "train,,,,,,30,0,0,cpu,assumed", "poison,,,,,,9000,0,0,cpu,assumed"
    )
    # 180 s to start and twice five draws of 90 s are 1,080 s.
    assert [job_costs.runtime_min("defend", SHARD, attempt) for attempt in (1, 2, 3)] == [18, 36, 72]
    assert job_costs.runtime_min("defend", SHARD | {"draws": Draws(0, 0)}, 1) == 10  # never less
    assert job_costs.runtime_min("defend", SHARD | {"draws": Draws(0, 0)}, 2) == 20
    assert job_costs.runtime_min("train", {}, 1, 100) == 103
    assert job_costs.runtime_min("train", {}, 1, 100.5) == 104  # rounded up
    assert job_costs.runtime_min("poison", {"ratio": 0.1}, 1) == 33  # a tenth of the training set


def test_memory(given):
    given("defend,,,,,,1,4000,0,cpu,assumed", "evaluate,,,,,,1,500,0,cpu,assumed")
    # A quarter more, and 500 MB for Snakemake.
    assert [job_costs.mem_mb("defend", SHARD, attempt) for attempt in (1, 2, 3)] == [5500, 11_000, 22_000]
    assert [job_costs.mem_mb("evaluate", SHARD, attempt) for attempt in (1, 2)] == [2000, 4000]


def test_a_site_may_allow_less(given, monkeypatch):
    given("defend,,,,,,90,4000,0,cpu,assumed")
    monkeypatch.setenv("DETROJAN_MAX_RUNTIME", "30")
    monkeypatch.setenv("DETROJAN_MAX_MEM_MB", "8000")
    assert [job_costs.runtime_min("defend", SHARD, attempt) for attempt in (1, 2, 3)] == [18, 30, 30]
    assert [job_costs.mem_mb("defend", SHARD, attempt) for attempt in (1, 2, 3)] == [5500, 8000, 8000]
    monkeypatch.setenv("DETROJAN_MAX_RUNTIME", "1 day")
    with pytest.raises(ValueError, match="DETROJAN_MAX_RUNTIME: should be a whole number"):
        job_costs.runtime_min("defend", SHARD, 1)


# --- the table that ships ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    return Costs.load()


def test_the_table_has_nothing_that_nobody_measured(shipped):
    assert all(row.measured for row in shipped.rows.values())


def test_methods_of_the_table_exist(shipped):
    attacks, defenses = set(registry.names("attacks")), set(registry.names("defenses"))
    for key in shipped.rows:
        assert key.method in {"", *(defenses if key.rule == "defend" else attacks)}, key
        assert key.architecture in {"", *registry.names("models")}, key


def test_a_slow_method_with_many_images_gets_more_time_than_a_quick_one_with_few():
    axes = {"architecture": "preactresnet18", "draws": Draws(0, 9)}
    slow = axes | {"defense": "anp", "dataset": "tiny_imagenet", "spc": 100}
    quick = axes | {"defense": "ft", "dataset": "cifar10", "spc": 2}
    assert job_costs.runtime_min("defend", slow, 1) > 20 * job_costs.runtime_min("defend", quick, 1)
    assert job_costs.mem_mb("defend", slow, 1) > job_costs.mem_mb("defend", quick, 1)


def test_written_and_read_again_it_is_the_same(shipped, tmp_path):
    path = tmp_path / "costs.csv"
    Costs(shipped.rows.values(), path).write()
    assert path.read_bytes() == job_costs.TABLE.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["costs.csv"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0204, "0.0204"),
        (1.5, "1.5"),
        (20, "20"),
        (99.95, "100"),
        (79_000, "79000"),
        (1234.5, "1234"),
    ],
)
def test_numbers_are_short_and_have_no_exponent(value, text):
    assert job_costs.number_text(value) == text


def test_reading_the_table_imports_nothing_heavy():
    program = (
        "import sys; from detrojan.workflow import job_costs; job_costs.default()\n"
        "print([name for name in sys.modules if name in ('numpy', 'pandas', 'pyarrow', 'torch', 'rich')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- what finished runs teach -----------------------------------------------------------------------


def cell(defense, taken, *, status=OK, device="cpu", peak=700e6, **keys):
    key = {"dataset": "digits", "architecture": "net", "attack": "badnets", "ratio": 0.1, "seed": 0}
    return (
        dict.fromkeys(collect.CELLS.names)
        | collect.NOTHING_MEASURED
        | key
        | {"defense": defense, "threat_model": "clean_data", "spc": 10, "draw": 0, "status": status}
        | {"protocol": "survey", "chosen": "{}"}
        | {"seconds": float(taken), "peak_memory_bytes": int(peak), "device": device}
        | keys
    )


def model(attack, taken, epochs, *, device="cpu", peak=900e6, **keys):
    return (
        dict.fromkeys(collect.MODELS.names)
        | {"dataset": "digits", "architecture": "net", "attack": attack, "ratio": 0.1, "seed": 0}
        | {"seconds": float(taken), "epochs": epochs, "peak_memory_bytes": int(peak), "device": device}
        | dict.fromkeys(("num_train", "num_poisoned", "num_parameters"), 1)
        | dict.fromkeys(("effective_ratio", "train_loss", "train_accuracy", "images_per_second"), 0.5)
        | dict.fromkeys(("architecture_settings", "optimization"), "{}")
        | provenance.origin("")
        | keys
    )


def study(folder, cells, models=()):
    """Write the tables of a study into ``folder``."""
    for name, rows, schema in (("cells", cells, collect.CELLS), ("models", models, collect.MODELS)):
        records.write_rows(list(rows), folder / "tables" / f"{name}.parquet", schema)
    return folder


@pytest.fixture
def before(tmp_path):
    """Return a table that earlier studies have left."""
    return table(
        tmp_path,
        "train,,,,,,30,4000,44,A100,assumed",
        "defend,,,,,,100,3000,44,A100,assumed",
        "defend,ft,net,digits,10,,50,3500,45,A100,assumed",
        "defend,ft,net,signs,10,,60,3600,46,A100,assumed",
    )


def learn(path, *results, device=""):
    lines = costs.learn(results, path, device)
    return Costs.load(path).rows, lines


def test_learns_the_ninth_decile_of_seconds_and_the_largest_memory(tmp_path, before):
    cells = [cell("ft", taken, draw=taken, peak=taken * 1e8) for taken in range(1, 11)]
    cells += [
        cell("ft", 999, draw=11, status=NOT_APPLICABLE),
        cell("none", 999, spc=0),
        cell("clp", 7, spc=0),
    ]
    rows, _ = learn(before, study(tmp_path / "results", cells, [model("iab", 200, 8)]))
    ft = rows[Key("defend", "ft", "net", "digits", 10)]
    assert ft == Row(ft.key, Estimate(9, 1000, 45), "cpu", "measured, 10 runs", 5)
    clp = rows[Key("defend", "clp", "net", "digits")]  # without data, it is the same at each SPC
    assert clp == Row(clp.key, Estimate(7, 700, 44), "cpu", "measured, 1 run", 7)
    iab = rows[Key("train", "iab", "net", "digits")]
    assert iab == Row(iab.key, Estimate(25, 900, 44), "cpu", "measured, 1 run", 25)  # an epoch
    assert not any(key.method == "none" for key in rows)
    # What was not measured stays.
    assert rows[Key("defend", "ft", "net", "signs", 10)].estimate == Estimate(60, 3600, 46)
    assert rows[Key("defend")].estimate == Estimate(100, 3000, 44)


def test_on_a_gpu_the_hosts_memory_stays(tmp_path, before):
    rows, _ = learn(before, study(tmp_path / "results", [cell("ft", 5, device=GPU, peak=20e9)]))
    ft = rows[Key("defend", "ft", "net", "digits", 10)]
    assert ft == Row(ft.key, Estimate(5, 3500, 45), GPU, "measured, 1 run", 5)


CIFAR10 = {"architecture": "preactresnet18", "dataset": "cifar10", "spc": 10}


def test_what_was_measured_corrects_the_formula(tmp_path):
    empty = Costs.load(table(tmp_path))
    ft, fp = (empty.by_formula("defend", CIFAR10 | {"defense": name}) for name in ("ft", "fp"))
    some = [cell("ft", 4 * ft.expected_s, **CIFAR10), cell("fp", 2 * fp.expected_s, **CIFAR10)]
    learn(empty.path, study(tmp_path / "results", some))
    after = Costs.load(empty.path)
    for name, factor in (("ft", 4), ("fp", 2), ("anp", 3)):  # of what nobody measured, the middle
        axes = CIFAR10 | {"defense": name, "spc": 100}
        said, row = empty.row("defend", axes), after.row("defend", axes)
        assert row.estimate.seconds == pytest.approx(factor * said.estimate.seconds, rel=0.01)
        assert row.estimate.memory_mb == said.estimate.memory_mb
        assert (row.measured, row.device) == (False, "cpu")
    # Nor does a row of one protocol hold for another.
    paper = after.row("defend", CIFAR10 | {"defense": "fp", "protocol": "paper"})
    assert paper.source == job_costs.CORRECTED


def test_images_that_are_not_known_correct_nothing(tmp_path):
    path = table(tmp_path, "defend,ft,preactresnet18,letters,10,,900,1,1,cpu,measured")
    axes = CIFAR10 | {"defense": "ft"}
    assert Costs.load(path).row("defend", axes) == Costs([]).by_formula("defend", axes)


CHOSEN = (
    {"num_pruned": [4, 10], "tuning_epoch": [3, 9], "search_steps": [320, 300, 280]},
    {"num_pruned": [6], "tuning_epoch": [5], "search_steps": [320]},
    {"num_pruned": [2, 4, 8], "tuning_epoch": [1, 1, 1], "search_steps": [320, 320, 320]},
)


def test_counts_of_finished_runs_are_what_to_expect(tmp_path, capsys):
    path = table(tmp_path)
    cells = [
        cell("grad_prune_inverted", 5, draw=number, chosen=json.dumps(chosen), **CIFAR10)
        for number, chosen in enumerate(CHOSEN)
    ]
    lines = costs.learn([study(tmp_path / "results", cells)], path, "")
    assert "grad_prune_inverted cifar10 spc 10, survey: inversions 2, the median of 3" in lines
    # Filters of the middle turn: 5, 6, 2; epochs: 6, 5, 1.
    expected = {"inversions": 2, "num_pruned": 5, "tuning_epoch": 5, "search_steps": 320}
    key = Key("defend", "grad_prune_inverted", "vgg19_bn", "cifar10", 10)
    assert Costs.load(path).counts_of(key) == expected
    assert Costs.load(path).counts_of(key._replace(spc=100, dataset="gtsrb")) == expected
    assert Costs.load(path).counts_of(key._replace(protocol="ours")) == {}
    axes = CIFAR10 | {"architecture": "vgg19_bn", "defense": "grad_prune_inverted"}
    few, guessed = Costs.load(path).by_formula("defend", axes), Costs([]).by_formula("defend", axes)
    assert few.expected_s < guessed.expected_s
    assert few.estimate == guessed.estimate  # time limits go by the bound
    assert costs.learn([tmp_path / "results"], path, "")[-1].endswith("What has no row goes by the formula.")


def test_several_studies_are_learnt_together(tmp_path, before):
    one, two = (study(tmp_path / str(n), [cell("ft", n), cell("ft", n, draw=1)]) for n in (1, 2))
    rows, _ = learn(before, one, two)
    assert rows[Key("defend", "ft", "net", "digits", 10)].source == "measured, 4 runs"
    assert rows[Key("defend", "ft", "net", "digits", 10)].estimate.seconds == 2


def test_cpus_and_gpus_are_not_mixed(tmp_path, before):
    table_before = before.read_bytes()
    results = study(tmp_path / "results", [cell("ft", 40), cell("ft", 2, device=GPU, draw=1)])
    with pytest.raises(ValueError, match="choose a device, such as --device 'cpu'"):
        learn(before, results)
    assert before.read_bytes() == table_before
    rows, _ = learn(before, results, device="A100")
    assert rows[Key("defend", "ft", "net", "digits", 10)].estimate.seconds == 2
    with pytest.raises(ValueError, match=f"no run on a device named 'H100': there are {GPU}, cpu"):
        learn(before, results, device="H100")


def test_before_there_are_tables_the_metrics_and_cards_tell(tmp_path, before):
    results = tmp_path / "results"
    names = collect.METRICS.names
    for number in (1, 2):
        row = {name: value for name, value in cell("ft", number).items() if name in names}
        records.write_rows([row], results / f"metrics/{number}/metrics.parquet", collect.METRICS)
    records.write_card(model("badnets", 60, 3), results / "models/digits/net/card.json")
    rows, _ = learn(before, results)
    assert rows[Key("defend", "ft", "net", "digits", 10)].source == "measured, 2 runs"
    assert rows[Key("train", "badnets", "net", "digits")].estimate.seconds == 20


def test_it_says_what_has_changed(tmp_path, before, capsys):
    results = study(tmp_path / "results", [cell("ft", 5)])
    assert exit_code("costs", "learn", results, "--table", before) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "defend ft net digits spc 10: 50 → 5 s, measured, 1 run"
    assert out[1] == f"{before}: 1 rows changed; it has 4. What has no row goes by the formula."
    assert exit_code("costs", "learn", results, "--table", before) == 0
    assert (
        capsys.readouterr().out
        == f"{before}: nothing changed; it has 4. What has no row goes by the formula.\n"
    )


def test_rows_that_were_measured_elsewhere_replace_ours(tmp_path, before):
    lines = (
        f'defend,ft,net,digits,10,,4,900,1,{GPU},"measured, 3 runs"',
        f"defend,ft,net,other,10,,8,900,1,{GPU},assumed",
    )
    elsewhere = tmp_path / "gpu.csv"
    elsewhere.write_text("\n".join([HEAD, *lines]) + "\n")
    rows, _ = learn(before, elsewhere)
    measured = rows[Key("defend", "ft", "net", "digits", 10)]
    assert (measured.estimate.seconds, measured.device, measured.source) == (4, GPU, "measured, 3 runs")
    assert Key("defend", "ft", "net", "other", 10) not in rows
    with pytest.raises(ValueError, match=f"no run on a device named 'cpu': there are {GPU}"):
        costs.learn([elsewhere], before, "cpu")


def test_what_is_no_folder_of_results_is_one_line(tmp_path, before, capsys):
    assert exit_code("costs", "learn", tmp_path / "nothing", "--table", before) == 1
    assert capsys.readouterr().err.count("\n") == 1
    broken = tmp_path / "results/tables/cells.parquet"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"PAR1")
    assert exit_code("costs", "learn", tmp_path / "results", "--table", before) == 1
    error = capsys.readouterr().err
    assert str(broken) in error
    assert error.count("\n") == 1
    broken.unlink()
    card = tmp_path / "results/models/card.json"
    card.parent.mkdir()
    card.write_text(json.dumps({"dataset": "digits"}))
    assert exit_code("costs", "learn", tmp_path / "results", "--table", before) == 1
    assert str(card) in capsys.readouterr().err


# --- show -------------------------------------------------------------------------------------------


def test_show_prints_the_estimate_of_a_cell(before, capsys):
    complete = before.read_text() + "".join(
        f"{rule},,,,,,1,2,3,cpu,assumed\n" for rule in job_costs.UNITS if rule not in ("train", "defend")
    )
    before.write_text(complete)
    asked = ["show", "defense=ft", "dataset=digits", "spc=10", "draw=0-3", "--table", str(before)]
    assert exit_code("costs", *asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    (row,) = (line for line in lines if line.startswith("defend"))
    assert row.split() == ["defend", "100", "100", "draw", "3000", "44", "assumed,", "A100"]
    assert lines[-1] == "Draws 0-3 take at most 404 s, 100 epochs 3000 s."


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("defense=fz", "no 'fz' among the defenses"),
        ("colour=red", "unknown key 'colour'"),
        ("defense=ft,fp", "can mean several cells"),
        ("draw=>3", "doesn't say how many draws"),
        ("spc", "should be KEY=VALUE"),
        ("spc=ten", "ten"),
    ],
)
def test_a_cell_that_is_none_is_one_line(asked, message, capsys):
    assert exit_code("costs", "show", asked) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
