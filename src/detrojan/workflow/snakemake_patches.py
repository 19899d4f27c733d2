"""What Snakemake 9.27 has no setting for. Tests fail if an upgrade makes one of these needless or void."""

import dataclasses
import functools
import gc
import inspect
import operator
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import snakemake.common
import snakemake.jobs
import snakemake.persistence
import snakemake.resources
import snakemake.script

from detrojan import registry
from detrojan.workflow import equal_code, fork_server, graph

Function = TypeVar("Function", bound=Callable[..., Any])

_sources: dict[Any, Any] = {}


def apply() -> None:
    """Change this process's Snakemake, for good. The Snakefile calls it at each parse."""
    # Each rule's `code` param covers its script. Snakemake also reruns what is older than the script's
    # file, and every checkout makes files anew; there is no setting for that but one on the command line.
    snakemake.jobs.get_script_mtime = lambda path: 0.0
    # It puts the interpreter's path into shell commands as it is; a clone may lie in "my projects".
    if not sys.executable.startswith("'"):
        sys.executable = shlex.quote(sys.executable)
    # Planning a survey would take half as long again without these three. The graph of jobs is millions of
    # objects that stay; the collector would look through them over and over.
    gc.set_threshold(200_000, 50, 100)
    # It reads a rule's script anew for each of the rule's jobs, and asks for a function's parameters too.
    if snakemake.script.get_source is not _source:
        _sources[None] = snakemake.script.get_source
        snakemake.script.get_source = _source
    known_parameters(snakemake.resources.Resource.evaluate)


def know_equal_code() -> None:
    """Have this process take a result of code that is recorded to give today's numbers for one of today's.

    The params themselves stay what they are: a result says which code made it, and one that today's code
    has made isn't made again when an older code turns out to equal it.

    Raises:
        ValueError: the record is mangled, or contradicts itself.
    """
    equal_code.record()
    usual = snakemake.persistence.PersistenceBase.params_changed
    if getattr(usual, "__wrapped__", None) is not None:  # a Snakefile is parsed more than once
        return

    @functools.wraps(usual)
    def params_changed(self: Any, job: Any, file: Any = None) -> Any:
        changes = usual(self, job, file)
        if not changes:
            return changes
        try:
            network = (job.params.get("architecture") or {}).get(registry.NETWORK)
            named = {"source": job.params.get("source"), registry.NETWORK: network, **job.wildcards_dict}
            key = graph.code_key(graph.known(job.rule.name), named)
        except KeyError:  # a rule of a workflow that uses ours
            return changes
        unchanged = snakemake.persistence.NO_PARAMS_CHANGE
        # Each output may be of another code.
        of_each = [usual(self, job, output) for output in ([file] if file else job.output)]
        settled = (_without_code(one, key, str(job.params.get("code"))) for one in of_each)
        return functools.reduce(operator.or_, settled, unchanged)

    snakemake.persistence.PersistenceBase.params_changed = params_changed


def _without_code(changes: Any, key: str, code: str) -> Any:
    """Return changes of params but for that of a digest of code, if what was became gives equal numbers."""
    oldest = graph.oldest_code(key, code)
    equal = {text for text in changes.only_old if graph.oldest_code(key, text.strip("'")) == oldest}
    if not (equal and repr(code) in changes.only_new):
        return changes
    return dataclasses.replace(
        changes, only_old=changes.only_old - equal, only_new=changes.only_new - {repr(code)}
    )


def fork_scripts(folder: Path) -> None:
    """Have this process run the Python scripts of ``folder`` in forks of one process; the others as ever."""
    usual = snakemake.script.PythonScript.execute_script
    if getattr(usual, "__wrapped__", None) is not None:  # a Snakefile is parsed more than once
        return

    @functools.wraps(usual)
    def execute(self: Any, fname: str, edit: bool = False) -> None:
        where = Path(self.path.get_path_or_uri(secret_free=True)).resolve().parent
        elsewhere = self.container_img or self.conda_env or self.env_modules or self.bench_record
        ours = self.threads == 1 and where == folder.resolve() and not (edit or elsewhere)
        if not ours or not fork_server.server().alive:
            usual(self, fname, edit)
            return
        environment = os.environ | dict.fromkeys(fork_server.THREADS, str(self.threads))
        if folder_of_job := self.resources.get("tmpdir"):
            environment |= dict.fromkeys(("TMPDIR", "TMP", "TEMPDIR", "TEMP"), str(folder_of_job))
        if code := fork_server.server().run(fname, environment):
            raise subprocess.CalledProcessError(code, shlex.join([shlex.split(sys.executable)[0], fname]))

    snakemake.script.PythonScript.execute_script = execute


def known_parameters(function: Function) -> Function:
    """Return ``function`` with its parameters noted where Snakemake looks first."""
    setattr(function, snakemake.common.FUNC_OVERWRITE_PARAMS_ATTR, inspect.signature(function).parameters)
    return function


def _source(path: Any, *arguments: Any, **named: Any) -> Any:
    if path not in _sources:
        _sources[path] = _sources[None](path, *arguments, **named)
    return _sources[path]
