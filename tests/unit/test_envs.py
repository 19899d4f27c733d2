"""The lock, the conda environment and the container recipes install the same versions of all packages."""

import importlib.util
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
HASHED = re.compile(r"(\S+)((?: --hash=sha256:[0-9a-f]{64})+)")


def pins(lines):
    """Return the version of each package; a line that pins nothing is a mistake."""
    found = {}
    for line in lines:
        name, version = PIN.fullmatch(line).groups()
        assert canonicalize_name(name) not in found, f"twice: {name}"
        found[canonicalize_name(name)] = version
    return found


def locked(name):
    """Return the lines of a lock that pin something, each whole, hashes and all."""
    text = re.sub(r" *\\\n\s*", " ", (ENVS / name).read_text())
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def instructions(recipe):
    """Return the lines of a recipe that do something, each whole."""
    text = re.sub(r"\\\n\s*", "", (ENVS / recipe).read_text())
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


@pytest.fixture(scope="module")
def lock():
    """The versions of all packages but the linters, those without hashes too."""
    hashed = [line.partition(" ")[0] for line in locked("lock.txt")]
    return pins([*hashed, *locked("lock-torch.txt")])


@pytest.fixture(scope="module")
def conda():
    return yaml.safe_load((ENVS / "environment.yml").read_text())


@pytest.mark.parametrize("name", ["lock.txt", "lock-lint.txt", "lock-timm.txt"])
def test_every_package_but_torch_has_the_digests_of_its_files(name):
    assert [line for line in locked(name) if not HASHED.fullmatch(line)] == []
    assert set(pins(locked("lock-torch.txt"))) == {"torch", "torchvision"}
    installs = re.findall(rf".*--requirement \S*{name}.*", (ROOT / "Makefile").read_text())
    assert installs
    assert all("--require-hashes --no-deps --requirement" in line for line in installs)


def test_the_lock_pins_what_the_project_needs(lock):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for text in (*project["project"]["dependencies"], *project["build-system"]["requires"]):
        needed = Requirement(text)
        assert needed.specifier.contains(lock[canonicalize_name(needed.name)]), text


def test_the_lock_pins_what_its_packages_need(lock):
    assert not missing(lock, lock)


def test_the_lock_of_timm_pins_what_it_needs_on_top(lock):
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    own = pins(line.partition(" ")[0] for line in locked("lock-timm.txt"))
    assert not own.keys() & lock.keys()
    assert not missing(own, lock | own)
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["timm"]
    assert Requirement(extra[0]).specifier.contains(own["timm"])


def missing(names, lock):
    """Return what packages of these names need and a lock doesn't pin."""
    missing = set()
    for name in names:
        for text in metadata.requires(name) or []:
            needed = Requirement(text)
            wanted = needed.marker is None or needed.marker.evaluate({"extra": ""})
            wanted = wanted and not needed.name.startswith(CUDA)
            pinned = lock.get(canonicalize_name(needed.name))
            if wanted and not (pinned and needed.specifier.contains(pinned)):
                missing.add(f"{name} needs {text}")
    return missing


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
        "pip install --require-hashes --no-deps --requirement /opt/lock.txt",
        "pip install --requirement /opt/lock-torch.txt",
        "pip install --no-deps --no-build-isolation --editable /opt/detrojan",
    ]
    copied = {word for line in lines if "envs/" in line for word in line.split() if "/lock" in word}
    assert {"envs/lock.txt", "envs/lock-torch.txt"} <= copied
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
    lint = pins(line.partition(" ")[0] for line in locked("lock-lint.txt"))
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    found = {repo["hooks"][0]["id"].partition("-")[0]: repo["rev"] for repo in hooks}
    assert found == {name: f"v{lint[name]}" for name in ("ruff", "snakefmt")}
