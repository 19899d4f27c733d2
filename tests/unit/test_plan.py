"""What a study will take: jobs, files, disk and days, against numbers worked out by hand."""

import re
from pathlib import Path

import pytest
import yaml

from detrojan.commands import plan
from detrojan.study.files import load_study, read
from detrojan.workflow import graph
from detrojan.workflow.cost_formula import H100
from detrojan.workflow.job_costs import Costs, Estimate, Key, Row
from tests.command import exit_code
from tests.unit.test_schema import minimal

ROOT = Path(__file__).parents[2]
SURVEY = ROOT / "config" / "survey.yaml"
TABLE = """\
rule,method,architecture,dataset,spc,seconds,memory_mb,disk_mb,device,source
dataset,,,,,100,0,50,cpu,assumed
sample,,,,,10,0,5,cpu,assumed
trigger,,,,,7200,0,1,A100,assumed
poison,,,,,1000,0,100,cpu,assumed
triggered,,,,,50,0,30,cpu,assumed
stamp,,,,,20,0,4,cpu,assumed
train,,,,,36,0,200,A100,assumed
train,badnets,,,,72,0,200,A100,"measured, 3 runs"
defend,,,,,360,0,200,A100,assumed
defend,ft,,,,720,0,200,A100,"measured, 9 runs"
evaluate,,,,,36,0,2,A100,assumed
evaluate_untouched,,,,,36,0,3,A100,assumed
aggregate,,,,,1000,0,1000,cpu,assumed
report,,,,,2000,0,1000,cpu,assumed
job,,,,,20,0,0,cpu,assumed
"""


def study(**grid):
    """Return a study of a clean model and one of BadNets, with FT, FP and CLP."""
    return load_study(minimal(**{"defenses": ["ft", "fp", "clp"]} | grid))


@pytest.fixture
def costs(tmp_path):
    path = tmp_path / "costs.csv"
    path.write_text(TABLE)
    return Costs.load(path)


# --- jobs -------------------------------------------------------------------------------------------


def test_jobs_of_a_small_study():
    assert plan.count_jobs(study()) == {
        "dataset": 1,
        "trigger": 1,
        "poison": 1,
        "triggered": 1,
        "train": 2,
        "sample": 1,
        "evaluate_untouched": 2,
        "check_trigger": 1,
        "defend": 2 * 3,
        "evaluate": 2 * 3,
        "aggregate": 1,
        "report": 1,
        "all": 1,
    }


def test_what_models_share_is_made_once_and_what_is_their_own_for_each():
    counts = plan.count_jobs(
        study(
            architectures=["preactresnet18", "mobilenet_v3_large"],
            attacks=["badnets", "lf", "wanet"],
            ratios=[0.05, 0.1],
            seeds=[0, 1],
            defenses=["ft", "fp", "clp", "grad_prune"],
            draws=["0-1", "2-4"],
        )
    )
    models = 2 * 2 * (1 + 3 * 2)
    assert counts["trigger"] == 2 * 2  # BadNets and WaNet, a seed each
    assert counts["trigger_against_model"] == 2 * 2  # LF, an architecture and a seed each
    assert counts["poison"] == 2 * 2  # BadNets: a ratio and a seed each
    assert counts["poison_own"] == 2 * 2 * 2  # LF: a model each; WaNet poisons on the fly
    assert counts["triggered"] == 2
    assert counts["triggered_own"] == 2 * (2 * 2 * 2)
    assert counts["train"] == models - 2 * 2 * 2
    assert counts["train_controlled"] == 2 * 2 * 2
    assert counts["check_trigger"] == models - 2 * 2  # all but the clean ones
    assert counts["sample"] == 2
    assert counts["stamp"] == 2 * 2
    assert counts["stamp_own"] == 2 * (2 * 2 * 2) * 2
    assert counts["defend"] == counts["evaluate"] == models * (1 + 3 * 2)


def test_nothing_is_made_that_no_shard_asks_for():
    exclude = [{"attack": "badnets", "defense": "grad_prune"}, {"defense": ["ft", "fp"], "spc": 10}]
    counts = plan.count_jobs(study(defenses=["ft", "fp", "grad_prune"], spc=[2, 10], exclude=exclude))
    assert counts["stamp"] == 0  # clean models have no trigger to know
    assert counts["sample"] == 2  # Grad-Prune of the clean model still meets SPC 10
    only_clp = plan.count_jobs(study(defenses=["clp"], controls=False))
    assert only_clp["sample"] == 0


# --- files and disk ---------------------------------------------------------------------------------


def test_files_of_a_small_study():
    # Outputs: data set 4, sample 1, trigger 2, poison 3, triggered 3, two models of 3, two untouched of 2,
    # a check of the trigger, six shards of 2; of the report the page, each figure in 3 formats, 18 listings
    # in 2, 3 for the data set.
    report = 1 + 3 * len(graph.FIGURES) + 18 * 2 + 3
    outputs = 4 + 1 + 2 + 3 + 3 + 2 * 3 + 2 * 2 + 1 + 6 * 2 + len(graph.TABLES) + report
    assert plan.count_files(study()) == {
        "results": outputs + 1,  # study.yaml
        "logs": 1 + 1 + 1 + 1 + 1 + 2 + 2 + 1 + 6 + 1 + 1,
        ".snakemake/metadata": outputs + 6,  # of the weights that are gone
    }


def test_a_shard_leaves_six_files_and_more_if_its_weights_are_kept():
    def files(raw):
        return sum(plan.count_files(load_study(raw)).values())

    one, two = minimal(draws=["0-9"]), minimal(draws=["0-9", "10-19"])
    shards = 2 * 2  # models and defenses
    sample = 3  # itself, its log and its record
    assert files(two) - files(one) == shards * 6 + sample
    kept = {"keep_defended": True}
    assert files(one | kept) - files(one) == shards * (10 + 1)


def test_disk(costs):
    small = study(draws=["0-4"])
    planned = plan.make(small, costs)
    # Data set, five draws of a sample, trigger, a tenth of the training set, triggered test set, two models,
    # two untouched, a check and 2 × 2 × 5 + 2 × 1 draws evaluated, eight shards of tables and report.
    megabytes = 50 + 5 * 5 + 1 + 10 + 30 + 2 * 200 + (2 + 1) * 3 + 22 * 2 + 2 * 8
    files = sum(plan.count_files(small).values())
    assert planned.disk_mb == pytest.approx(megabytes + files * 4096 / 1e6)
    assert planned.waiting_mb(1) == 5 * 200  # CLP's shards, of one draw, are small
    assert planned.waiting_mb(3) == 3 * 5 * 200
    assert planned.waiting_mb(100) == 22 * 200
    kept = plan.make(small.model_copy(update={"keep_defended": True}), costs)
    more = 22 * 200 + (22 + 6) * 4096 / 1e6  # 22 models and six tables of runs, a block each
    assert kept.disk_mb == pytest.approx(planned.disk_mb + more)


# --- time -------------------------------------------------------------------------------------------


def test_hours_by_stage(costs):
    planned = plan.make(study(draws=["0-4"]), costs)
    stages = planned.stages
    assert (stages["train"].gpu, stages["train"].longest) == (100 * 36 + 100 * 72, 7200)
    assert stages["trigger"].gpu == 7200
    assert (stages["defend"].gpu, stages["defend"].longest) == (2 * (5 * 720 + 5 * 360 + 360), 3600)
    assert stages["evaluate"].gpu == 22 * 36
    assert stages["evaluate_untouched"].gpu == (2 + 1) * 36  # with the check of the trigger
    assert stages["poison"].cpu == 100  # of the training set, a tenth
    assert stages["aggregate"].cpu == 8  # thousandths of a thousand shards
    assert stages["sample"].cpu == 50
    assert planned.total.cpu == 100 + 50 + 100 + 50 + 8 + 16
    assert planned.total.gpu == 10_800 + 7200 + 2 * 5760 + 22 * 36 + 3 * 36
    assert planned.total.longest == 7200
    assert planned.longest_shard == "ft on digits and preactresnet18, spc 2, draws 0-4"
    assert planned.by(["method"])[plan.Part("ft", "", "", "")] == (2 * 5 * (720 + 36),) * 2
    assert [part.method for part in planned.by(["method", "dataset"])] == ["ft", "fp", "clp"]
    measured = 7200 + 2 * 5 * 720
    everything = planned.total.gpu + planned.total.cpu
    assert planned.assumed == pytest.approx(1 - measured / everything)


def test_days_are_bounded_by_the_work_and_the_longest_chain(costs):
    planned = plan.make(study(draws=["0-4"]), costs)
    # Trigger, two models, two untouched, a check and six shards start on a GPU.
    work = planned.total.gpu + 20 * (1 + 2 + 2 + 1 + 6)
    assert planned.most_s(1) == planned.expected_s(1) == pytest.approx(work)
    stages = 100 + 50 + 7200 + 100 + 50 + 7200 + 36 + 3600 + 5 * 36 + 8 + 16
    chain = stages + 7200 + 12 * 20  # one training more, and what twelve jobs take besides
    assert planned.most_s(10**9) == pytest.approx(chain)
    assert planned.most_s(4) == pytest.approx(work / 4 + chain * 3 / 4)
    assert planned.expected_s(4) == pytest.approx(work / 4)


def test_what_is_expected_stands_beside_what_it_takes_at_most(tmp_path, capsys):
    head, *rows = TABLE.splitlines()
    expected = [f"{row},180" if row.startswith("defend,ft") else f"{row}," for row in rows]
    (tmp_path / "costs.csv").write_text("\n".join([head + ",expected_s", *expected]) + "\n")
    costs = Costs.load(tmp_path / "costs.csv")
    planned = plan.make(study(draws=["0-4"]), costs)
    assert planned.by(["method"])[plan.Part("ft", "", "", "")] == (10 * (180 + 36), 10 * (720 + 36))
    defend = planned.stages["defend"]
    assert defend.gpu - defend.expected == 10 * (720 - 180)
    lines = plan.report(study(draws=["0-4"]), planned, [8], ["method", "spc"])
    place = next(number for number, line in enumerate(lines) if line.startswith("method "))
    assert lines[place].split("  ")[0] == "method"
    assert [line.split() for line in lines[place + 1 : place + 4]] == [
        ["ft", "2", "0.6", "2.1"],
        ["fp", "2", "1.1", "1.1"],
        ["clp", "0", "0.2", "0.2"],
    ]


def test_another_machine_counts_what_was_measured_on_its_own():
    axes = {"defense": "ft", "architecture": "preactresnet18", "dataset": "digits", "spc": 2, "draws": [0]}
    key = Key("defend", "ft", "preactresnet18", "digits", 2)
    measured = [Row(key, Estimate(50, 1, 1), device, "measured, 1 run", 40) for device in ("cpu", "H100 SXM")]
    for row, hours in zip(measured, (False, True), strict=True):
        costs = Costs([row])
        assert (plan._on(H100, row, costs, "defend", axes) == row) == hours


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (75, "75 s"), (300, "5 min"), (5400, "1.5 h"), (86_400, "24.0 h"), (1e6, "11.6 d")],
)
def test_a_short_study_takes_minutes_and_not_no_days(seconds, text):
    assert plan.duration(seconds) == text


def test_only_what_shards_differ_in_can_be_asked_for(capsys):
    assert exit_code("plan", "--by", "method,seed") == 1
    assert "--by seed: there are method, dataset, architecture, spc" in capsys.readouterr().err


def test_jobs_of_slurm(costs):
    # All but the targets, and a shard's two jobs in one.
    planned = plan.make(study(), costs)
    assert planned.jobs.total() == 1 + 1 + 1 + 1 + 2 + 1 + 2 + 1 + 6 + 6 + 1 + 1 + 1
    assert planned.slurm_jobs == planned.jobs.total() - 6 - 1


def test_cells(costs):
    planned = plan.make(study(draws=["0-4", "5-9"]), costs)
    assert planned.cells == 2 * (1 + 1 + 2 * 10)


# --- filters ----------------------------------------------------------------------------------------


def test_what_filters_leave_out_is_counted_with_its_reason():
    some = study(
        attacks=["badnets", "sig"],
        ratios=[0.05, 0.1, 0.2],
        spc=[2, 10],
        exclude=[
            {"attack": "sig", "ratio": "> 0.05", "why": "too few images"},
            {"attack": "sig", "ratio": 0.2},
            {"defense": "fp", "spc": [10], "why": "too slow"},
        ],
    )
    first, third = plan.left_out(some)
    assert first == ("attack sig, ratio > 0.05", "too few images", 2, 0)
    # A clean model, three of BadNets, one of SIG; two draws.
    assert third == ("defense fp, spc 10", "too slow", 0, 5 * 2)
    assert plan.left_out(study()) == []


def test_what_no_include_names_is_left_out():
    some = study(attacks=["badnets", "sig"], include=[{"attack": "badnets", "defense": ["ft", "clp"]}])
    (part,) = plan.left_out(some)
    assert (part.filter, part.why, part.models) == ("grid.include names none of it", "", 1)
    assert part.cells == 2 * 2  # FP of two models, two draws


# --- the survey -------------------------------------------------------------------------------------


def test_the_survey_is_as_large_as_the_papers_and_within_bounds():
    survey = plan.make(load_study(read([SURVEY])), Costs.load())
    assert survey.cells >= 122_236
    assert survey.jobs.total() <= 35_000
    assert sum(survey.files.values()) <= 100_000
    (part,) = plan.left_out(load_study(read([SURVEY])))
    assert (part.models, part.cells) == (24, 0)
    assert "clean-label" in part.why


# --- the command ------------------------------------------------------------------------------------


def test_the_command_prints_narrow_lines(tmp_path, costs, capsys):
    assert exit_code("plan", "--configfile", SURVEY, "--table", costs.path, "--gpus", "2,1000") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith("264 attacked models and 12 clean ones; ")
    (columns,) = (line for line in lines if line.startswith("GPUs"))
    assert columns.split() == ["GPUs", "2", "1,000"]
    assert any(
        line.startswith("Left out: 24 models (dataset gtsrb or tiny_imagenet, attack sig)") for line in lines
    )


def test_a_study_without_gpus_has_no_days(tmp_path, capsys):
    (tmp_path / "costs.csv").write_text(TABLE.replace("A100", "cpu"))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(minimal()))
    files = ["--configfile", str(tmp_path / "study.yaml"), "--table", str(tmp_path / "costs.csv")]
    assert exit_code("plan", *files) == 0
    out = capsys.readouterr().out
    assert "repaired models that wait" not in out
    assert "GPU-hours" in out


def test_later_study_files_win_key_by_key(tmp_path):
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(minimal(seeds=[0, 1], spc=[2, 10])))
    (tmp_path / "two.yaml").write_text("grid: {spc: [5]}\ntarget: 3\n")
    merged = load_study(read([tmp_path / "one.yaml", tmp_path / "two.yaml"]))
    assert (merged.grid.seeds, merged.grid.spc, merged.target) == ([0, 1], [5], 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("grid: [", "study.yaml, line 1: "),
        ("- a list", "no keys with values"),
        ("pool: train", "missing"),
    ],
)
def test_a_wrong_study_file_is_an_error(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "study.yaml").write_text(text)
    assert exit_code("plan", "--configfile", tmp_path / "study.yaml") == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_no_gpus_are_refused(capsys):
    assert exit_code("plan", "--gpus", "0") == 2
    assert "at least 1" in capsys.readouterr().err


def test_the_page_on_scale_has_the_surveys_counts():
    page = (ROOT / "docs" / "scale.md").read_text().splitlines()
    survey = load_study(read([SURVEY]))
    lines = plan.report(survey, plan.make(survey, Costs.load()), [8])
    counts = [line for line in lines if line.startswith(("264 ", "Files in the end"))]
    assert len(counts) == 2
    said = f"docs/scale.md should have these lines, and its section on files follow: {counts}"
    assert counts[0] in page, said
    (written,) = (line for line in page if line.startswith("Files in the end"))
    # A table or a figure that was added is a few files of a hundred thousand; one more a shard would be many.
    assert numbers(counts[1]) == pytest.approx(numbers(written), rel=1e-3), said


def numbers(line):
    return [int(text.replace(",", "")) for text in re.findall(r"[0-9][0-9,]*(?=[ ,.)])", line)]
