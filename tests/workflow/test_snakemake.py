"""Snakemake's own tools work on the workflow."""

import re


def test_lint_finds_nothing_but_its_wish_for_an_environment_a_rule(workshop):
    output = workshop.snakemake("--lint", check=False)
    by_rule = re.split(r"^Lints for rule (\w+)", output, flags=re.M)
    assert "evaluate" in by_rule
    for rule, lints in zip(by_rule[1::2], by_rule[2::2], strict=True):
        findings = set(re.findall(r"^    \* (.*):$", lints, re.M))
        # `evaluate` adds to the log of `defend`.
        expected = {"No log directive defined"} if rule == "evaluate" else set()
        assert findings - expected == {"Specify a conda environment or container for each rule."}, output


def test_rulegraph_names_every_stage(workshop):
    graph = workshop.snakemake("--rulegraph", "mermaid-js", "--forceall")
    for rule in (
        "dataset",
        "sample",
        "trigger",
        "poison",
        "triggered",
        "stamp",
        "train",
        "defend",
        "evaluate",
    ):
        assert rule in graph


def test_report_opens_with_the_study(workshop):
    workshop.snakemake("--report", "snakemake-report.html")
    page = (workshop.folder / "snakemake-report.html").read_text()
    assert "index.html" in page
    assert "effect.svg" in page
