"""A refactoring that changes no number reruns nothing once that is proved; another edit does."""

import subprocess
import sys

from detrojan.workflow.equal_code import Record

METHOD = "src/detrojan/defenses/clean_data/ft.py"
CODE = ("Snakefile", "config", "local", "rules", "scripts", "slurm", "src")
GIT = ("git", "-c", "user.name=a", "-c", "user.email=a@b")
# What the proof runs of the study: enough to train, to poison, and to defend by the method that is edited.
PART = """
training: {epochs: 1}
grid: {attacks: [badnets], defenses: [ft]}
"""


def git(workshop, *arguments):
    subprocess.run([*GIT, *arguments], cwd=workshop.code, check=True, capture_output=True)


def prove(workshop):
    """Run the command in the workshop; return what became of it."""
    (workshop.folder / "part.yaml").write_text(PART)
    return subprocess.run(
        [
            *(sys.executable, "-m", "detrojan", "prove", "--configfile", "study.yaml"),
            *("--configfile", "part.yaml", "--", "--cores", "2", "--quiet"),
        ],
        cwd=workshop.folder,
        env=workshop.environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_is_proved_equal_is_not_made_again(workshop):
    git(workshop, "init", "--quiet")
    git(workshop, "add", *CODE)
    git(workshop, "commit", "--quiet", "--message", "the old code")
    workshop.edit(METHOD, "images = clean.everything", "taken = clean.everything\n        images = taken")
    assert workshop.planned()["defend"] == 2
    done = prove(workshop)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (proof,) = Record.load(workshop.code / "config" / "equal_code.csv").proofs.values()
    # The attacked model, and the clean one that goes with it.
    assert (proof.key, proof.jobs, proof.study) == ("defend/ft", 2, "study.yaml + part.yaml")
    assert f"defend/ft: {proof.code} gives the numbers of {proof.equals}" in done.stdout
    assert not (workshop.folder / "proof").exists()
    assert workshop.planned() == {}
    workshop.edit(METHOD, "taken = clean.everything", "taken = clean.train")
    assert workshop.planned()["defend"] == 2


def test_a_mangled_record_ends_a_run_before_it_plans(workshop):
    with (workshop.code / "config" / "equal_code.csv").open("a") as file:
        file.write("<<<<<<< ours\n")
    output = workshop.snakemake("--dry-run", check=False)
    assert workshop.returncode
    assert "equal_code.csv, line 2: 1 values where there should be 12" in output
