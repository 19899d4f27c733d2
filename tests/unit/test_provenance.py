"""Digests of code: what changes them, and what must not."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from detrojan import registry
from detrojan.storage import provenance
from detrojan.storage.provenance import PACKAGE, code_digest

LEAF = '''
"""A leaf."""

import math

STEP = 0.1


def step(size: float) -> float:
    """Return a step."""
    # As large as it gets.
    return math.floor(size) + STEP
'''
FILES = {
    "leaf.py": LEAF,
    "middle.py": "from detrojan import leaf\n\n\ndef two():\n    return leaf.step(2)\n",
    "lazy.py": "def late():\n    from detrojan.group.inner import VALUE\n\n    return VALUE\n",
    "plain.py": "import detrojan.leaf\n",
    "group/__init__.py": "from detrojan.group import other\n",
    "group/inner.py": "VALUE = 1\n",
    "group/other.py": "OTHER = 1\n",
    "apart.py": "ALONE = 1\n",
    "circle.py": "from detrojan import round\n",
    "round.py": "from detrojan import circle\n",
}


class Toy:
    """A small package in place of ours, and a script that imports part of it."""

    def __init__(self, folder):
        self.folder = folder / "detrojan"
        self.script = folder / "script.py"
        for name, text in FILES.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(text)

    def digest(self, script):
        self.script.write_text(textwrap.dedent(script))
        provenance._module.cache_clear()
        code_digest.cache_clear()
        return code_digest(self.script)

    def edit(self, name, old, new):
        text = (self.folder / name).read_text()
        assert old in text
        (self.folder / name).write_text(text.replace(old, new))


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "a" / "detrojan")
    yield Toy(tmp_path / "a")
    provenance._module.cache_clear()
    code_digest.cache_clear()


SCRIPT = "from detrojan import middle\nprint(middle.two(), 3)\n"


@pytest.mark.parametrize(
    "same",
    [
        "# Why.\nfrom detrojan import middle\nprint(middle.two(), 3)  # what\n",
        '"""What the script does."""\nfrom detrojan import middle\nprint(middle.two(), 3)\n',
        "\n\nfrom detrojan import (\n    middle,\n)\n\nprint(\n    middle.two(),\n    0b11,\n)\n",
    ],
)
def test_comments_docstrings_and_layout_do_not_count(toy, same):
    assert toy.digest(same) == toy.digest(SCRIPT)


def test_comments_and_docstrings_of_imports_do_not_count(toy):
    before = toy.digest(SCRIPT)
    toy.edit("leaf.py", '"""A leaf."""\n', "\n\n\n")
    toy.edit("leaf.py", '    """Return a step."""\n    # As large as it gets.\n', '    """Return more."""\n')
    assert toy.digest(SCRIPT) == before


def test_a_docstring_alone_is_an_empty_body(toy):
    one = toy.digest('class A:\n    """One."""\n')
    assert toy.digest('class A:\n    """Two."""\n') == one
    assert toy.digest("class A:\n    x = 1\n") != one


@pytest.mark.parametrize(
    "other",
    [
        "from detrojan import middle\nprint(middle.two(), 4)\n",
        "from detrojan import middle\nprint(middle.two(), 3.0)\n",
        "from detrojan import middle\nprint(middle.two(), '3')\n",
        "from detrojan import middle\nprint(middle.two(), b'3')\n",
        "from detrojan import middle\nprint(middle.two())\n",
        "from detrojan import middle\nprint(middle.two(), None)\n",
    ],
)
def test_a_changed_value_counts(toy, other):
    assert toy.digest(other) != toy.digest(SCRIPT)


@pytest.mark.parametrize(
    ("script", "file", "old", "new"),
    [
        ("from detrojan import leaf\n", "leaf.py", "0.1", "0.2"),
        ("from detrojan.leaf import step\n", "leaf.py", "0.1", "0.2"),
        ("import detrojan.leaf as l\n", "leaf.py", "floor", "ceil"),
        (SCRIPT, "leaf.py", "0.1", "0.2"),  # through middle
        ("from detrojan import plain\n", "leaf.py", "0.1", "0.2"),
        ("from detrojan import lazy\n", "group/inner.py", "1", "2"),  # imported in a function
        ("def f():\n    import detrojan.lazy\n", "group/inner.py", "1", "2"),
        # Importing a module of a package runs the package's __init__, and what that imports.
        ("from detrojan.group import inner\n", "group/other.py", "1", "2"),
        ("from detrojan import circle\n", "round.py", "circle", "circle, leaf"),
    ],
)
def test_a_change_in_an_imported_module_counts(toy, script, file, old, new):
    before = toy.digest(script)
    toy.edit(file, old, new)
    assert toy.digest(script) != before


@pytest.mark.parametrize("file", ["apart.py", "group/inner.py", "lazy.py"])
def test_modules_that_are_not_imported_do_not_count(toy, file):
    before = toy.digest(SCRIPT)
    (toy.folder / file).write_text("CHANGED = 2\n")
    assert toy.digest(SCRIPT) == before


def test_a_checkout_elsewhere_has_the_same_digest(toy, tmp_path, monkeypatch):
    before = toy.digest(SCRIPT)
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "b c" / "detrojan")
    assert Toy(tmp_path / "b c").digest(SCRIPT) == before


def test_relative_imports_are_refused(toy):
    with pytest.raises(AssertionError, match="relative import"):
        toy.digest("from . import leaf\n")


# --- our own package -------------------------------------------------------------------------------

PROGRAM = """
import json, sys
from detrojan import registry
from detrojan.storage import provenance
digests = {
    f"{kind}/{name}": provenance.code_digest(registry.path(kind, name))
    for kind in ("datasets", "models", "attacks", "defenses") for name in registry.names(kind)
}
print(json.dumps([digests, str(registry.PACKAGE), "torch" in sys.modules]))
"""


def digests_at(folder):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=folder, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_our_digests_are_the_same_in_another_checkout(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "detrojan", ignore=shutil.ignore_patterns("__pycache__"))
    here, place_here, _ = digests_at(PACKAGE.parent)
    there, place_there, has_torch = digests_at(tmp_path)
    assert place_here != place_there
    assert here == there
    assert not has_torch  # computed by reading alone
    assert len(set(here.values())) == len(here)


def test_a_defense_does_not_depend_on_another(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "detrojan", ignore=shutil.ignore_patterns("__pycache__"))
    before, _, _ = digests_at(tmp_path)
    file = tmp_path / "detrojan" / "defenses" / "data_free" / "clp.py"
    file.write_text(file.read_text() + "\nSOMETHING = 1\n")
    after, _, _ = digests_at(tmp_path)
    assert [name for name in before if before[name] != after[name]] == ["defenses/clp"]


def test_what_is_shared_reaches_all_that_use_it(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "detrojan", ignore=shutil.ignore_patterns("__pycache__"))
    before, _, _ = digests_at(tmp_path)
    file = tmp_path / "detrojan" / "learning" / "training.py"
    file.write_text(file.read_text() + "\nSOMETHING = 1\n")
    after, _, _ = digests_at(tmp_path)
    changed = {name for name in before if before[name] != after[name]}
    assert {"defenses/ft", "defenses/fp", "defenses/grad_prune"} <= changed
    assert not {"defenses/clp", "datasets/digits"} & changed


def test_origin_has_what_every_row_carries():
    origin = provenance.origin("abc")
    assert origin["code"] == "abc"
    assert {"python", "torch", "detrojan"} <= set(json.loads(origin["versions"]))
    assert origin["git_commit"]
    assert registry.PACKAGE == PACKAGE


@pytest.mark.parametrize(
    ("place", "named"), [("src", True), ("vendor/src", False), ("libraries", False), ("src", None)]
)
def test_the_commit_is_that_of_a_checkout_of_ours_alone(tmp_path, place, named):
    """``named`` is None where git does not know our files."""
    copied = tmp_path / place / "detrojan"
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    if named is not None:
        subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "x"], check=True)
    head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()

    def said():
        ask = "from detrojan.storage import provenance; print(provenance.git_commit())"
        environment = os.environ | {"PYTHONPATH": str(tmp_path / place), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.check_output([sys.executable, "-c", ask], env=environment, text=True).strip()

    assert said() == (head if named else provenance.RELEASE)
    (copied / "labels.py").write_text("edited")
    assert said() == (f"{head}-dirty" if named else provenance.RELEASE)


def test_a_file_that_is_no_python_counts_whole(tmp_path):
    template = tmp_path / "page.html.j2"
    template.write_text("<p># no comment</p>")
    before = provenance.code_digest(template)
    template.write_text("<p># another</p>")
    provenance._module.cache_clear()
    provenance.code_digest.cache_clear()
    assert provenance.code_digest(template) != before


ALL_CODE = "import json\nfrom detrojan.workflow import graph\nprint(json.dumps(graph.all_code()))"


@pytest.fixture
def checkout(tmp_path):
    """A copy of the code, and a function that returns which rules' digests an edit changes."""
    for name in ("src/detrojan", "scripts"):
        copied = tmp_path / name
        shutil.copytree(PACKAGE.parents[1] / name, copied, ignore=shutil.ignore_patterns("__pycache__"))

    def digests():
        command = [sys.executable, "-c", ALL_CODE]
        done = subprocess.run(command, cwd=tmp_path / "src", capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    before = digests()

    def changed(*edits):
        for file, old, new in edits:
            path = tmp_path / "src" / "detrojan" / file
            text = path.read_text()
            assert old in text
            path.write_text(text.replace(old, new))
        after = digests()
        assert before.keys() == after.keys()
        return {key for key in before if before[key] != after[key]}

    return changed


def test_what_runs_the_jobs_does_not_count(checkout):
    edits = [
        ("workflow/attempts.py", "NEAR_LIMIT = 0.9 ", "NEAR_LIMIT = 0.95 "),
        ("workflow/job.py", '"done in %.1f s"', '"done after %.1f s"'),
        ("workflow/gpus.py", "POLL_SECONDS = 0.5", "POLL_SECONDS = 5"),
        ("workflow/graph.py", 'unit="epoch"', 'unit="hour"'),
        ("commands/status.py", "MOST_SHOWN = 10", "MOST_SHOWN = 9"),
    ]
    assert checkout(*edits) == set()


@pytest.mark.parametrize(
    ("file", "some", "others"),
    [
        ("learning/training.py", {"train/preactresnet18", "defend/ft"}, {"sample", "dataset/digits"}),
        ("storage/artifacts.py", {"train/preactresnet18", "sample"}, {"aggregate"}),
        ("storage/records.py", {"train/preactresnet18", "sample", "aggregate"}, set()),
        # Only the frame of a job calls it.
        ("learning/determinism.py", {"dataset/digits", "train/preactresnet18", "evaluate", "report"}, set()),
        ("defenses/data_free/clp.py", {"defend/clp"}, {"defend/ft", "evaluate", "train/preactresnet18"}),
    ],
)
def test_what_computes_counts(checkout, file, some, others):
    found = checkout((file, "\n\n\n", "\n\nSOMETHING = 1\n\n\n"))
    assert some <= found
    assert not others & found
