"""The lock, the conda environment and the container recipes install the same versions of all packages."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
ENVS = ROOT / "envs"
RECIPES = ("Dockerfile", "detrojan.def")
CUDA = ("cuda", "nvidia", "triton")  # which torch's CUDA build pins by itself, and its CPU build lacks
PIN = re.compile(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+]+)")


def pins(lines):
    """Return the version of each package; a line that pins nothing is a mistake."""
    found = {}
    for line in lines:
        name, version = PIN.fullmatch(line).groups()
        assert canonicalize_name(name) not in found, f"twice: {name}"
        found[canonicalize_name(name)] = version
    return found


def instructions(recipe):
    """Return the lines of a recipe that do something, each whole."""
    text = re.sub(r"\\\n\s*", "", (ENVS / recipe).read_text())
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


@pytest.fixture(scope="module")
def lock():
    lines = (ENVS / "lock.txt").read_text().splitlines()
    return pins(line for line in lines if line and not line.startswith("#"))


@pytest.fixture(scope="module")
def conda():
    return yaml.safe_load((ENVS / "environment.yml").read_text())


def test_the_lock_pins_what_the_project_needs(lock):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for text in (*project["project"]["dependencies"], *project["build-system"]["requires"]):
        needed = Requirement(text)
        assert needed.specifier.contains(lock[canonicalize_name(needed.name)]), text


def test_the_lock_pins_what_its_packages_need(lock):
    missing = set()
    for name in lock:
        for text in metadata.requires(name) or []:
            needed = Requirement(text)
            wanted = needed.marker is None or needed.marker.evaluate({"extra": ""})
            wanted = wanted and not needed.name.startswith(CUDA)
            pinned = lock.get(canonicalize_name(needed.name))
            if wanted and not (pinned and needed.specifier.contains(pinned)):
                missing.add(f"{name} needs {text}")
    assert not missing


def test_conda_installs_what_the_lock_says(lock, conda):
    *others, pip = conda["dependencies"]
    assert pins(pip["pip"]) == lock
    assert [re.split("=", other)[0] for other in others] == ["python", "pip"]
    assert set(conda) == {"name", "channels", "dependencies"}  # no prefix: that is a path of one machine


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_image_installs_what_the_lock_says_and_the_project(recipe):
    lines = instructions(recipe)
    installs = [part for line in lines for part in re.findall(r"pip install [^&]*", line)]
    assert [install.strip() for install in installs] == [
        "pip install --requirement /opt/lock.txt",
        "pip install --no-deps --no-build-isolation --editable /opt/detrojan",
    ]
    assert (
        re.sub("^COPY ", "", next(line for line in lines if "lock.txt /" in line))
        == "envs/lock.txt /opt/lock.txt"
    )
    assert any("git clone /source.git /opt/detrojan" in line for line in lines)
    assert not any(PIN.search(line) for line in lines)


def test_all_have_the_same_python(conda):
    bases = [re.search(r"(?m)^(?:FROM|From:) (.*)", (ENVS / recipe).read_text())[1] for recipe in RECIPES]
    assert len(set(bases)) == 1
    version = re.fullmatch(r"python:(3\.\d+\.\d+)-slim-\w+", bases[0])[1]
    assert f"python={version}" in conda["dependencies"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert Requirement(f"python{project['requires-python']}").specifier.contains(version)


def test_hooks_before_a_commit_are_the_linters_of_the_lock():
    lines = (ENVS / "lock-lint.txt").read_text().splitlines()
    lint = pins(line for line in lines if line and not line.startswith("#"))
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    found = {repo["hooks"][0]["id"].partition("-")[0]: repo["rev"] for repo in hooks}
    assert found == {name: f"v{lint[name]}" for name in ("ruff", "snakefmt")}
