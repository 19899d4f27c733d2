"""Proves that today's code gives the numbers of an older one, and records it: ``detrojan prove``.

A study runs with both, each in a folder of its own, and all that they leave is compared. Where nothing
differs, ``workflow.equal_code`` has what was shown, and results of the old code are not made again. Nothing
else writes that record. Free of torch.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import click
import yaml

from detrojan import registry
from detrojan.cells import NO_METHOD
from detrojan.commands import reproduce
from detrojan.commands.differences import differences
from detrojan.storage import provenance, records
from detrojan.study import files
from detrojan.study.schema import ALL, MethodKind
from detrojan.workflow import equal_code, graph, handover
from detrojan.workflow.equal_code import Proof, Record
from detrojan.workflow.graph import Job

STUDY = registry.CHECKOUT / "config" / "smoke.yaml"
# Below the folder of a proof: a checkout of the old code, and where each code runs the study.
CHECKOUT, OLD, TODAY = "old-code", "old", "today"
HEAD = "# A study that `detrojan prove` runs with two codes.\n"
TARGET = "aggregate"  # what a page shows stands in the tables; that rule is remade in seconds
# A rule that has all methods of a kind.
WITH_ALL: dict[MethodKind, str] = {"attacks": "trigger", "defenses": "defend"}
ASK = "import json; from detrojan.workflow import graph; print(json.dumps(graph.all_code()))"
MOST_SHOWN = 10  # differences

Code = Mapping[str, str]  # digests, by `graph.code_key`


# --- the old code ----------------------------------------------------------------------------------


def _git(*arguments: str) -> str:
    """Return what git prints in the checkout.

    Raises:
        ValueError: it fails.
    """
    command = ["git", "-C", str(registry.CHECKOUT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except OSError as error:
        raise ValueError(f"git is needed to find the old code: {error}") from error
    except subprocess.CalledProcessError as error:
        raise ValueError(f"git {arguments[0]}: {' '.join(error.stderr.split())}") from error
    return done.stdout.strip()


def old_commit(revision: str | None) -> str:
    """Return the full name of the commit that a revision names.

    Args:
        revision: None for the last commit whose code may be another: that of HEAD if the code was edited
            since, else its parent.

    Raises:
        ValueError: there is no such commit, or our code is in no repository of its own.
    """
    if Path(_git("rev-parse", "--show-toplevel")).resolve() != registry.CHECKOUT.resolve():
        raise ValueError(f"{registry.CHECKOUT} is no clone of the repository, so there is no old code in it")
    if revision is None:
        code = [folder.name for folder in (registry.PACKAGE.parent, graph.SCRIPTS)]
        revision = "HEAD" if _git("status", "--porcelain", "--", *code) else "HEAD~1"
    try:
        return _git("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")
    except ValueError:
        raise ValueError(f"{revision} names no commit; name one that the repository has") from None


@contextlib.contextmanager
def _checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """Yield a folder with the files of a commit; it goes in the end."""
    _git("worktree", "add", "--detach", "--force", str(folder), commit)
    try:
        yield folder
    finally:
        _git("worktree", "remove", "--force", str(folder))


def _environment(checkout: Path) -> dict[str, str]:
    """Return the environment in which a checkout's package comes before the installed one."""
    paths = [str(checkout / "src"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def code_of(checkout: Path) -> Code:
    """Return the digests of the code in a checkout.

    Raises:
        ValueError: it has none.
    """
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=_environment(checkout), capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        raise ValueError(f"the old code can't tell its digests, it may be too old to be compared: {said}")
    return dict(json.loads(done.stdout))


# --- the study -------------------------------------------------------------------------------------


def study_of(configfiles: Sequence[Path], old: Code) -> dict[str, Any]:
    """Return what both codes run: the study of these files, and all that it makes stays.

    A method that the old code does not have is left out of ``all``. Paths that start at the working
    directory are made absolute.

    Raises:
        ValueError: the study has mistakes.
    """
    raw = files.read(configfiles)
    files.load_study(raw)
    grid = dict(raw["grid"])
    for kind, rule in WITH_ALL.items():
        if grid.get(kind) == ALL:
            known = [name for name in registry.names(kind) if graph.code_key(rule, _named(rule, name)) in old]
            grid[kind] = [NO_METHOD, *known]
    datasets = {
        name: reproduce.with_absolute_paths(dataset, Path.cwd()) for name, dataset in raw["datasets"].items()
    }
    return raw | {"datasets": datasets, "grid": grid, "keep_defended": True, "close": 0}


def _named(rule: str, name: str) -> dict[str, str]:
    return dict.fromkeys(graph.RULES[rule].methods.values(), name)


def jobs_of(raw: Mapping[str, Any]) -> dict[str, list[Job]]:
    """Return the jobs of a study whose files are compared, by the code that they run."""
    study = files.load_study(raw)
    found = defaultdict(list)
    for job in graph.jobs(study):
        if graph.RULES[job.rule].folder not in ("", graph.RULES["report"].folder):
            found[graph.code_key(job.rule, graph.methods_of(study, job.axes))].append(job)
    return found


def _run(folder: Path, checkout: Path, raw: Mapping[str, Any], extra: Sequence[str], code: Code) -> None:
    """Run a study in a folder of its own with the code of a checkout, whose digests are ``code``.

    Raises:
        ValueError: it doesn't run to its end, or the code was edited before it began.
    """
    folder.mkdir(parents=True)
    text = yaml.safe_dump(dict(raw), sort_keys=False, allow_unicode=True)
    (folder / files.KEPT).write_text(HEAD + text, encoding="utf-8")
    ended = reproduce.run(reproduce.making(TARGET, folder, extra, checkout), _environment(checkout))
    if ended:
        raise ValueError(
            f"nothing is proved: Snakemake ended with exit code {ended}; logs are in {folder / graph.LOGS}"
        )
    given = handover.given(folder)
    if not given:
        raise ValueError("nothing is proved: Snakemake ran nothing")
    if given != code:
        raise ValueError("nothing is proved: the code was edited while this command began; start it again")


# --- what was shown --------------------------------------------------------------------------------


def _files_of(job: Job, folder: Path) -> int:
    """Return how many files a job has left below a folder; each of its outputs must be there."""
    rule = graph.RULES[job.rule]
    outputs = [graph.below(folder / graph.RESULTS, job.file(name)) for name in rule.outputs]
    for output in outputs:
        assert output.exists(), f"{output}: not there, though the study ran to its end"
    return sum(
        sum(file.is_file() for file in output.rglob("*")) if output.is_dir() else 1 for output in outputs
    )


def _ran_with(folder: Path) -> dict[str, str]:
    """Return versions and device of a study that has run in a folder, as columns of a proof."""
    table = graph.below(folder / graph.RESULTS, graph.table("cells"))
    with records.readable(table, "Parquet table"):
        cells = records.open_table(table).read(["versions", "device"])
    versions = {
        " ".join(f"{name}={version}" for name, version in json.loads(text).items() if version)
        for text in cells["versions"].to_pylist()
        if text
    }
    devices = {text for text in cells["device"].to_pylist() if text}
    return {"versions": "; ".join(sorted(versions)), "device": "; ".join(sorted(devices))}


def _study_name(configfiles: Sequence[Path]) -> str:
    names = []
    for file in configfiles:
        inside = file.resolve().is_relative_to(registry.CHECKOUT.resolve())
        names.append(
            file.resolve().relative_to(registry.CHECKOUT.resolve()).as_posix() if inside else file.name
        )
    return " + ".join(names)


def proofs(
    jobs: Mapping[str, Sequence[Job]], old: Code, today: Code, folder: Path, **shared: str
) -> list[Proof]:
    """Return what a study has shown that ran with both codes and left no difference.

    Args:
        jobs: of the study, by the code that they run: of that which is another by now.
        old: the digests of the old code.
        today: those of today's.
        folder: of the study that today's code has run.
        shared: the columns that all rows have in common.
    """
    found = []
    for key, of_key in jobs.items():
        rule, _, methods = key.partition("/")
        num_files = sum(_files_of(job, folder) for job in of_key)
        counts = {"jobs": len(of_key), "files": num_files}
        codes = {"code": today[key], "equals": old[key]}
        found.append(equal_code.made({"rule": rule, "methods": methods, **shared, **codes, **counts}))
    return found


# --- the command -----------------------------------------------------------------------------------


def prove(
    configfiles: Sequence[Path], revision: str | None, into: Path, extra: Sequence[str]
) -> Iterator[str]:
    """Run a study with two codes, and record what it shows; yield what to say of it.

    Raises:
        ValueError: nothing can be proved with this study, or the two codes give different results.
    """
    if into.exists() and any(into.iterdir()):
        raise ValueError(f"--into {into}: the folder isn't empty; delete it, or name another one")
    record, today, commit = Record.load(equal_code.TABLE), graph.all_code(), old_commit(revision)
    folder = into.resolve()
    with _checked_out(commit, folder / CHECKOUT) as checkout:
        old = code_of(checkout)
        changed = {
            key
            for key in today.keys() & old.keys()
            if _has_jobs(key) and record.oldest(key, today[key]) != record.oldest(key, old[key])
        }
        if not changed:
            yield f"Nothing to prove: all code is that of {commit}, or recorded to give its numbers."
            return
        raw = study_of(configfiles, old)
        jobs = {key: of_key for key, of_key in jobs_of(raw).items() if key in changed}
        if not jobs:
            raise ValueError(f"the study runs nothing of the code that has changed: {_listed(changed)}")
        yield f"The old code is commit {commit}."
        if provenance.git_commit().endswith("-dirty"):
            yield "Today's has edits that are not committed. That is no matter: what counts is its content."
        _run(folder / OLD, checkout, raw, extra, old)
    _run(folder / TODAY, registry.CHECKOUT, raw, extra, today)
    found = list(differences(folder / OLD / graph.RESULTS, folder / TODAY / graph.RESULTS))
    if found:
        raise ValueError(_refusal(found, into))
    rows = proofs(
        jobs,
        old,
        today,
        folder / TODAY,
        date=date.today().isoformat(),
        study=_study_name(configfiles),
        commit=provenance.git_commit(),
        equals_commit=commit,
        **_ran_with(folder / TODAY),
    )
    Record.load(equal_code.TABLE).write(rows)
    yield f"Equal, bit for bit. {equal_code.TABLE} has {len(rows)} rows more; commit it with the code:"
    yield from (f"  {row.key}: {row.code} gives the numbers of {row.equals}" for row in rows)
    rest = changed - jobs.keys()
    if rest:
        yield f"Not shown, since this study doesn't run it, and so made again: {_listed(rest)}"


def _has_jobs(key: str) -> bool:
    """Return whether any study has jobs of a code: a rule serves some attacks only."""
    name, *methods = key.split("/")
    rule = graph.RULES[name]
    named = dict(zip(rule.methods.values(), methods, strict=True))
    return named.get("attack", NO_METHOD) in [NO_METHOD, *rule.attack_names]


def _listed(keys: set[str]) -> str:
    return ", ".join(sorted(keys))


def _refusal(found: Sequence[str], into: Path) -> str:
    more = [f"  and {len(found) - MOST_SHOWN:,} more"] if len(found) > MOST_SHOWN else []
    return "\n".join(
        [
            f"nothing is recorded, for the results differ; {into} has both:",
            *(f"  {line}" for line in found[:MOST_SHOWN]),
            *more,
        ]
    )


def main(configfiles: Sequence[Path], revision: str | None, into: Path, extra: Sequence[str]) -> None:
    """Prove that today's code gives the numbers of an older one, record it, and say so.

    Args:
        configfiles: the study that is run with both; ``STUDY`` if there are none.
        revision: where the old code is, see :func:`old_commit`.
        into: a folder to run it in, which is there no more if nothing differs.
        extra: options for Snakemake.

    Raises:
        ValueError: see :func:`prove`.
    """
    for line in prove(configfiles or [STUDY], revision, into, extra):
        click.echo(line)
    shutil.rmtree(into, ignore_errors=True)
