"""Where a result comes from: digests of code, versions, commit.

Snakemake watches a rule's script, not what the script imports. So each rule has a ``code`` param:
the digest of all package source that its job can run, computed by reading, never by importing.
"""

import ast
import functools
import hashlib
import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from detrojan.registry import PACKAGE

# In place of a commit. Not an import of the package's name: that also names what stands above this room.
RELEASE = f"{PACKAGE.name} {sys.modules[PACKAGE.name].__version__}"
OURS = "src/detrojan/storage/provenance.py"  # this file, from the top of a checkout

# What runs the jobs and what people ask with. Nothing that computes a number imports it but the scripts,
# for the frame of a job (`workflow.job`); so it does not count, and mending it reruns nothing.
PLUMBING = ("workflow", "commands")


@functools.cache
def code_digest(*files: str | Path) -> str:
    """Return a digest of ``files`` and of the package modules that they import, directly or not.

    Comments, docstrings and layout don't count, so editing them reruns nothing; nor does where the
    checkout lies. Imports inside functions count, those of ``PLUMBING`` don't. A method that is loaded
    by its name is not seen: its file must be among ``files``. So must one that is no Python, a template
    say: it counts whole.
    """
    seen: set[Path] = set()
    waiting = [Path(file).resolve() for file in files]
    while waiting:
        file = waiting.pop()
        if file not in seen:
            seen.add(file)
            waiting += _module(file)[1]
    total = hashlib.sha256()
    for file in sorted(seen, key=lambda file: (file.name, _module(file)[0])):
        total.update(_module(file)[0].encode())
    return total.hexdigest()[:16]


@functools.cache
def _module(file: Path) -> tuple[str, list[Path]]:
    """Return the digest of one file and the package files that it imports."""
    if file.suffix != ".py":
        return hashlib.sha256(file.read_bytes()).hexdigest(), []
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    imported: set[Path] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import, which digests don't follow: make it absolute"
            module = node.module or ""
            for name in [module, *(f"{module}.{alias.name}" for alias in node.names)]:
                imported.update(_package_files(name))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                imported.update(_package_files(alias.name))
    text = json.dumps(_canonical(tree))
    return hashlib.sha256(text.encode()).hexdigest(), sorted(imported)


def _package_files(module: str) -> list[Path]:
    """Return the files that importing ``module`` runs, if it is one of ours: its package's too."""
    parts = module.split(".")
    if parts[0] != PACKAGE.name or parts[1:2] in [[folder] for folder in PLUMBING]:
        return []
    found = []
    for depth in range(2, len(parts) + 1):
        stem = PACKAGE.joinpath(*parts[1:depth])
        found += [file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.is_file()]
    return found


def _canonical(node: object) -> object:
    """Return a syntax tree as plain lists, without docstrings, positions and empty fields.

    Empty fields are left out because Python versions differ in which ones they have.
    """
    if isinstance(node, ast.AST):
        fields = dict(ast.iter_fields(node))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                fields["body"] = node.body[isinstance(first.value.value, str) :]
        kept = {key: _canonical(value) for key, value in fields.items() if value not in (None, [])}
        return [type(node).__name__, kept]
    if isinstance(node, list):
        return [_canonical(item) for item in node]
    return node if isinstance(node, str | int | float | bool) else repr(node)


@functools.cache
def git_commit() -> str:
    """Return the commit of this code's checkout, ``-dirty`` if it was edited since; else our version.

    A repository that our code only lies in, unpacked or installed, is another's: its commit says nothing.
    """
    # Git says where a file lies from the top of the repository, if it knows the file.
    if _git("ls-files", "--full-name", "--error-unmatch", __file__) != OURS:
        return RELEASE
    return _git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*") or RELEASE


def _git(*arguments: str) -> str:
    """Return what git says of the repository around our code; nothing if it fails, or there is none."""
    command = ["git", "-C", str(PACKAGE), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


@functools.cache
def versions() -> str:
    """Return the versions that a result may depend on, as JSON; null for a package that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("detrojan", "torch", "torchvision", "numpy", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return json.dumps(found)


def origin(code: str) -> dict[str, str]:
    """Return the columns of a row that say where it comes from; ``code`` is its digest of code."""
    return {"code": code, "versions": versions(), "git_commit": git_commit()}
