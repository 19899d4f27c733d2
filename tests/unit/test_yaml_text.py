"""Study files of strangers: what YAML would let pass, guess, or run is refused, with its line."""

import re

import pytest

from detrojan.study import yaml_text
from detrojan.workflow import strict_studies

ENDLESS = "a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 30))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("pool: train\ntarget: 3\n", {"pool": "train", "target": 3}),
        ('{"pool": "train", "target": [3, null, 0.5]}', {"pool": "train", "target": [3, None, 0.5]}),
        ("\ufeffpool: train", {"pool": "train"}),
        ("grüße: 日本", {"grüße": "日本"}),
        ("why: 2026-01-01", {"why": "2026-01-01"}),
        ("a: &own {x: 1, z: 1}\nb: {<<: *own, x: 2}", {"a": {"x": 1, "z": 1}, "b": {"x": 2, "z": 1}}),
    ],
)
def test_plain_values_are_read(text, found):
    assert yaml_text.parse(text.encode(), "study.yaml") == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"pool: train\ntarget: 1\npool: held_out\n", "study.yaml, line 3: key 'pool' stands there twice"),
        (b"grid:\n  spc: [1]\n  spc: [2]\n", "study.yaml, line 3: key 'spc' stands there twice"),
        (b'{"a": {"b": 1, "b": 2}}', "study.yaml: key 'b' stands there twice"),
        (b"target: 1\nwhy: caf\xe9\n", "study.yaml, line 2: no UTF-8; save the file as UTF-8"),
        (b"why: !!binary aGVsbG8=", "study.yaml, line 1: !!binary is no plain value; "),
        (b"why: !!python/name:os.system", "study.yaml, line 1: !!python/name:os.system is no plain value; "),
        (b"why: !own 1", "study.yaml, line 1: !own is no plain value; "),
        (b"a: " + b"[" * 50 + b"]" * 50, "study.yaml, line 1: nested more than 40 deep"),
        (b'{"a":' * 50 + b"1" + b"}" * 50, "study.yaml: nested more than 40 deep"),
        (b"[" * 100_000, "study.yaml: nested too deeply for a study file"),
        (b"{a: " * 5000, "study.yaml: nested too deeply"),
        (b"a: &own [*own]", "study.yaml, line 1: an alias (*name) within what it stands for"),
        (ENDLESS.encode(), "study.yaml: its aliases (*name) stand for more than 1,000,000 values"),
        (b"? [1, 2]\n: 3", "study.yaml, line 1: a list or keys with values in place of a key"),
        (b"a: 1\n---\nb: 2", "study.yaml, line 2: but found another document"),
        (b"a: 1\n\tb: 2", "study.yaml, line 2: found character '\\t' that cannot start any token"),
        (b"a: \x00", "study.yaml: unacceptable character #x0000"),
        (b"a: " + b"9" * 5000, "study.yaml: Exceeds the limit"),
        (b"", "study.yaml: no keys with values"),
        (b"- a list", "study.yaml: no keys with values"),
        (b"__use_yte__: true\na: ?1 + 1", "study.yaml: __use_yte__ would run the Python"),
    ],
)
def test_all_else_is_refused_with_its_line(content, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        yaml_text.parse(content, "study.yaml")
    assert len(str(refused.value).splitlines()) == 1


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.yaml: No such file"):
        yaml_text.read(tmp_path / "absent.yaml")
    with pytest.raises(ValueError, match="Is a directory"):
        yaml_text.read(tmp_path)


def test_only_a_run_of_our_snakefile_reads_strictly(tmp_path, monkeypatch):
    ours = strict_studies.CHECKOUT / "Snakefile"
    monkeypatch.chdir(tmp_path)
    assert strict_studies.runs_ours(["-n", "--snakefile", str(ours)])
    assert strict_studies.runs_ours(["-n", f"--snakefile={ours}"])
    assert not strict_studies.runs_ours(["-n", "--configfile", "x" * 5000])
    (tmp_path / "Snakefile").write_text("rule all:\n")
    assert not strict_studies.runs_ours(["-n"])
    (tmp_path / "Snakefile").unlink()
    (tmp_path / "Snakefile").symlink_to(ours)
    assert strict_studies.runs_ours(["-n"])
