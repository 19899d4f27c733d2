"""Kills a whole small study at random moments, runs it again to its end, and compares what it made.

    python benchmarks/kills.py --kills 200

The study runs once undisturbed. Then it is started and killed, again and again, at moments drawn evenly over
the time that it took. Half of the kills are of all processes, as when a machine stops, the others of the
driver alone, as when memory runs out. After a few kills, or where it ends before its moment, the study runs
to its end, and the next starts from nothing. No file may differ from the undisturbed run's, be missing, or be
left over.
"""

import argparse
import contextlib
import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from detrojan import registry
from detrojan.commands.differences import compared, differences
from detrojan.workflow import attempts, graph

STUDY = """\
pool: held_out
datasets:
  tiny: {source: digits, image_size: 16, held_out: 0.3, per_class: 10}
architectures:
  preactresnet18: {width: 4}
training: {epochs: 3, batch_size: 32}
gate: {min_asr: 0, max_acc_loss: 1, min_asr_gain: -1}
defenses:
  ft: {epochs: 1}
  grad_prune: {max_rounds: 2, max_epochs: 1}
grid:
  datasets: [tiny]
  architectures: [preactresnet18]
  attacks: [none, badnets, wanet]
  ratios: [0.1]
  defenses: [none, ft, clp, grad_prune]
  spc: [2]
  draws: ["0-1"]
  controls: false
"""
EARLIEST = 1.0  # seconds after the start: before that Python has not imported Snakemake
A_STUDY = 6  # kills of one study: more would meet its last jobs alone
LONGEST = 600  # seconds that a run to its end may take


@dataclasses.dataclass
class Outcome:
    """What became of the kills.

    Attributes:
        kills: how many there were, by whom they hit: ``machine`` or ``driver``.
        hit: by rule, the jobs that were at work when a kill ended them.
        half: files that were half-written when a kill came.
        ends: how often the study came to its end.
        files: that were compared, each time that it did.
        differences: a line each.
    """

    kills: Counter[str] = dataclasses.field(default_factory=Counter)
    hit: Counter[str] = dataclasses.field(default_factory=Counter)
    half: int = 0
    ends: int = 0
    files: int = 0
    differences: list[str] = dataclasses.field(default_factory=list)


def run(folder: Path) -> subprocess.Popen[bytes]:
    """Start the study in a folder, as the leader of a process group of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "study.yaml").write_text(STUDY, encoding="utf-8")
    snakefile = str(registry.CHECKOUT / "Snakefile")
    options = ["--configfile", "study.yaml", "--cores", "2", "--rerun-incomplete", "--nolock"]
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "snakemake", "--snakefile", snakefile, *options],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def to_the_end(folder: Path) -> float:
    """Run the study in a folder to its end; return how long that took, in seconds.

    Raises:
        ValueError: it failed.
    """
    began = time.monotonic()
    check(run(folder).wait(LONGEST), folder)
    return time.monotonic() - began


def check(code: int, folder: Path) -> None:
    """Refuse an exit code that is no success.

    Raises:
        ValueError: it is none.
    """
    if code:
        raise ValueError(f"the study failed with exit code {code}: see {folder / 'log'}")


def kill(process: subprocess.Popen[bytes], whom: str, folder: Path, outcome: Outcome) -> None:
    """Kill a run, and note what it was at."""
    half = len(list((folder / graph.RESULTS).rglob(".*.partial")))
    at_work = Counter(record.rule for record in attempts.read(folder / attempts.FOLDER) if _runs(record))
    with contextlib.suppress(ProcessLookupError):
        (os.killpg if whom == "machine" else os.kill)(process.pid, signal.SIGKILL)
    process.wait()
    outcome.kills[whom] += 1
    outcome.hit += at_work
    outcome.half += half


def _runs(record: attempts.Record) -> bool:
    return record.states({})[-1] == "running"


def killed(kills: int, seed: int, scratch: Path) -> Outcome:
    """Return what became of a study that was killed so many times.

    Raises:
        ValueError: it failed by itself.
    """
    whole, outcome, moments = scratch / "whole", Outcome(), random.Random(seed)  # noqa: S311
    longest = to_the_end(whole)
    starts = 0
    while starts < kills:
        folder = scratch / f"killed-{outcome.ends}"
        for _ in range(min(A_STUDY, kills - starts)):
            starts += 1
            process = run(folder)
            try:
                check(process.wait(moments.uniform(EARLIEST, longest)), folder)
            except subprocess.TimeoutExpired:
                kill(process, ("machine", "driver")[starts % 2], folder, outcome)
            else:
                break
        end(whole, folder, outcome)
    return outcome


def end(whole: Path, folder: Path, outcome: Outcome) -> None:
    """Let a study come to its end, and compare its results with the undisturbed run's."""
    to_the_end(folder)
    outcome.ends += 1
    outcome.files += len(compared(whole / graph.RESULTS))
    outcome.differences += differences(whole / graph.RESULTS, folder / graph.RESULTS)


def main() -> int:
    """Kill as often as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="starts of the study, each with a moment")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            outcome = killed(asked.kills, asked.seed, Path(scratch))
        except ValueError as error:
            sys.exit(str(error))
    whom = ", ".join(f"{number} of the {name}" for name, number in sorted(outcome.kills.items()))
    rules = ", ".join(f"{name} {number}" for name, number in sorted(outcome.hit.items()))
    print(f"{asked.kills} starts, {sum(outcome.kills.values())} kills ({whom})")
    print(
        f"jobs at work when a kill came: {sum(outcome.hit.values())} ({rules}); files half-written:", end=" "
    )
    print(outcome.half)
    print(f"ends: {outcome.ends}; files compared: {outcome.files}; differences: {len(outcome.differences)}")
    print("\n".join(outcome.differences))
    return 1 if outcome.differences else 0


if __name__ == "__main__":
    sys.exit(main())
