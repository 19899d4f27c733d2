"""What all commands have in common: help, completion, exit codes, and how little they import."""

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

import detrojan
from detrojan.commands import cli
from detrojan.commands.cli import detrojan as command
from tests.command import exit_code

ROOT = Path(__file__).parents[2]
# What takes more than a moment to import, and what help and completion have no use for.
HEAVY = ("torch", "pandas", "pyarrow", "matplotlib", "snakemake", "pydantic", "yaml")


def paths(group=command, before=()):
    """Yield the words of each command, groups too."""
    for name, one in group.commands.items():
        yield (*before, name)
        if isinstance(one, click.Group):
            yield from paths(one, (*before, name))


def found(words):
    """Return the command of these words."""
    return functools.reduce(lambda group, name: group.commands[name], words, command)


ALL = [(), *paths()]


def python(program, *arguments, **environment):
    """Run a program in a process of its own, where the package is not installed; return what it printed."""
    done = subprocess.run(
        [sys.executable, *program, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("words", ALL, ids=" ".join)
@pytest.mark.parametrize("asked", ["-h", "--help"])
def test_help_has_an_example(words, asked, capsys):
    assert exit_code(*words, asked) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"Usage: {' '.join(['detrojan', *words])} ")
    examples = said.partition("Examples:\n")[2].partition("\n\n")[0].splitlines()
    assert any(f"detrojan {' '.join(words)}".strip() in line for line in examples), said


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_example_is_understood(words, monkeypatch):
    for other in ALL:
        monkeypatch.setattr(found(other), "callback", lambda *_, **__: None)
    for line in found(words).epilog.partition("Examples:\n")[2].partition("\n\n")[0].splitlines():
        _, dollar, inner = line.partition("$(")
        name, *arguments = shlex.split(inner.rstrip(")") if dollar else line.partition(" > ")[0])
        assert name == "detrojan"
        assert exit_code(*arguments) == 0


def test_help_of_all_commands_imports_nothing_heavy():
    program = f"""
import sys
from detrojan.commands.cli import main
for words in {ALL}:
    try:
        main([*words, "--help"])
    except SystemExit as ended:
        assert ended.code == 0, words
print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_help_says_what_holds():
    from detrojan.commands import new, reproduce
    from detrojan.workflow import graph

    for kind, start in new.STARTS.items():
        one = command.commands["new"].commands[kind]
        choices = [list(option.type.choices) for option in one.params if option.name == "threat_model"]
        assert (choices or [[""]])[0] == list(start.templates)
    assert cli.RESULTS == graph.RESULTS
    (tolerance,) = (one for one in command.commands["reproduce"].params if one.name == "tolerance")
    assert f" {reproduce.ELSEWHERE:g} if" in tolerance.help


def test_version(capsys):
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"detrojan, version {detrojan.__version__}\n"


def test_it_runs_from_a_checkout_that_is_not_installed():
    assert python(["-m", "detrojan"], "--version") == f"detrojan, version {detrojan.__version__}\n"


def test_the_page_has_all_commands():
    page = (ROOT / "docs" / "commands.md").read_text()
    said = dict(re.findall(r"^\| `detrojan (\w+)` \| (.*?) \|", page, re.M))
    assert said.keys() == command.commands.keys()
    for name, text in said.items():
        short = command.commands[name].get_short_help_str(limit=100)
        assert text.replace("yours", "ours") == short[0].lower() + short[1:].removesuffix("."), name


# --- completion ------------------------------------------------------------------------------------


def completed(*words):
    """Return what bash is offered after these words, the last of which is begun."""
    program = "import sys; sys.argv[0] = 'detrojan'; from detrojan.commands.cli import main; main()"
    said = python(
        ["-c", program],
        _DETROJAN_COMPLETE="bash_complete",
        COMP_WORDS=" ".join(["detrojan", *words]),
        COMP_CWORD=str(len(words)),
    )
    return [line.partition(",")[2] for line in said.splitlines()]


def test_commands_and_options_are_completed():
    assert completed("s") == ["status", "select", "show", "schema"]
    assert completed("status", "--w") == ["--watch"]
    assert completed("new", "d") == ["defense"]
    assert completed("select", "--stage", "e") == ["evaluate"]


def test_the_page_says_how_to_switch_completion_on():
    page = (ROOT / "docs" / "commands.md").read_text()
    for shell in ("bash", "zsh", "fish"):
        assert f"_DETROJAN_COMPLETE={shell}_source detrojan" in page
        program = "import sys; sys.argv[0] = 'detrojan'; from detrojan.commands.cli import main; main()"
        assert "_DETROJAN_COMPLETE" in python(["-c", program], _DETROJAN_COMPLETE=f"{shell}_source")


# --- exit codes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["shw"], "No such command 'shw'. Did you mean 'show'?"),
        (["costs", "lern"], "Did you mean 'learn'?"),
        (["show", "--result", "x"], "No such option '--result'. Did you mean '--results'?"),
        (["show", "results"], "unexpected extra argument"),
        (["why"], "Missing argument"),
        (["merge", "a", "b"], "Missing option '--into'"),
        (["plan", "--configfile", "a.yaml", "b.yaml"], "unexpected extra argument"),
        (["plan", "--gpus", "8,x"], "'8,x' should be whole numbers, at least 1, with commas between"),
        (["plan", "--gpus", "8,"], "'8,' should be whole numbers"),
        (["select", "--stage", "poison"], "'poison' is not one of 'defend', 'evaluate', 'train'"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_what_is_not_understood_ends_with_2(words, said, capsys):
    assert exit_code(*words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert said in output.err
    assert "Usage: detrojan" in output.err


@pytest.mark.parametrize(
    "words", [["show"], ["status"], ["select"], ["why", "seed=0"], ["reproduce", "seed=0"], ["measure"]]
)
def test_an_error_is_one_line_and_ends_with_1(words, tmp_path, capsys):
    assert exit_code(*words, "--results", tmp_path / "nothing") == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("detrojan: ")
    assert "nothing" in output.err or "neither a study file nor tables" in output.err


def test_a_bug_has_a_traceback(monkeypatch):
    from detrojan.commands import new

    monkeypatch.setattr(new, "main", lambda *_, **__: {}["bug"])
    with pytest.raises(KeyError):
        cli.main(["new", "defense", "x", "--threat-model", "clean_data"])
