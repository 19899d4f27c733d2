"""Which code gives the numbers of which other: the record ``config/equal_code.csv``.

A refactoring that changes no number changes digests of code all the same, and with them what Snakemake
would run again. ``detrojan prove`` runs a study with both codes, and where all that they leave has the
same bits, it adds rows here. Each says, of one rule and the methods that its jobs run:

    rule, methods       such as ``defend`` and ``ft``; methods as in ``graph.code_key``
    code, equals        digests: ``code`` gives the numbers of ``equals``, which is the older one
    date                of the proof
    study, jobs, files  the study that showed it, how many jobs of this rule and these methods it has, and
                        how many of their files were compared
    commit, equals_commit, versions, device
                        where the two codes were found, and with what they ran

Digests that such rows connect are one code by another name: they have one oldest. The record stands in no
digest and in no param: whoever compares two digests looks here. So results keep the digest of the code that
made them, and a run goes on undisturbed when the record is edited meanwhile. Snakemake asks at every parse,
so nothing here imports more than a moment's worth.
"""

import csv
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from detrojan.registry import CHECKOUT

TABLE = CHECKOUT / "config" / "equal_code.csv"
DIGEST = re.compile("[0-9a-f]{16}")


class Proof(NamedTuple):
    """A row of the record, in the order of its columns."""

    rule: str
    methods: str
    code: str
    equals: str
    date: str
    study: str
    jobs: int
    files: int
    commit: str
    equals_commit: str
    versions: str
    device: str

    @property
    def key(self) -> str:
        """What it is proved for, as ``graph.code_key`` names it."""
        return f"{self.rule}/{self.methods}" if self.methods else self.rule


def made(values: Mapping[str, Any]) -> Proof:
    """Return the row that has these values in its columns."""
    return Proof._make(values[name] for name in Proof._fields)


class Record:
    """What was proved, and what follows from it.

    Attributes:
        proofs: by their lines in the file.
    """

    def __init__(self, proofs: Iterable[tuple[int, Proof]] = (), path: Path = TABLE) -> None:
        """Connect the proofs.

        Raises:
            ValueError: they lead round in a circle, or from one code to two that nothing connects.
        """
        self.proofs = dict(proofs)
        self.path = path
        self._from: dict[tuple[str, str], Proof] = {}
        self._oldest: dict[tuple[str, str], str] = {}
        for proof in self.proofs.values():
            self._from.setdefault((proof.key, proof.code), proof)
        for line, proof in self.proofs.items():
            roots = [self._follow(proof.key, code, line) for code in (proof.code, proof.equals)]
            if roots[0] != roots[1]:
                raise ValueError(
                    f"{path}, line {line}: {proof.code} of {proof.key} gives the numbers of {roots[1]} here, "
                    f"and of {roots[0]} elsewhere, which nothing connects: delete one of the rows"
                )

    @classmethod
    def load(cls, path: Path = TABLE) -> "Record":
        """Read a record; where there is none, nothing was proved.

        Raises:
            ValueError: a line of it is wrong, or two contradict each other.
        """
        try:
            with path.open(encoding="utf-8", newline="") as file:
                reader = csv.reader(file)
                if tuple(next(reader, ())) != Proof._fields:
                    raise ValueError(f"{path}, line 1: the columns should be {','.join(Proof._fields)}")
                return cls(
                    [(reader.line_num, _parsed(path, reader.line_num, texts)) for texts in reader], path
                )
        except FileNotFoundError:
            return cls(path=path)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: no table of text ({error}); take it from the repository") from None

    def oldest(self, key: str, code: str) -> str:
        """Return the oldest code that ``code`` gives the numbers of, itself if none is known.

        Args:
            key: of the rule and its methods, as ``graph.code_key`` returns it.
            code: a digest.
        """
        return self._oldest.get((key, code), code)

    def between(self, key: str, code: str, other: str) -> list[Proof]:
        """Return the proofs that connect two codes that have the same oldest, the newest first."""
        ways = [list(self._way(key, end)) for end in (code, other)]
        # Where both ways have come together, they go on together.
        return [proof for way, against in (ways, ways[::-1]) for proof in way if proof not in against]

    def write(self, more: Iterable[Proof]) -> None:
        """Add proofs to the file, whole or not at all.

        Raises:
            ValueError: they contradict what was proved before.
        """
        last = max(self.proofs, default=1)
        proofs = [*self.proofs.items(), *enumerate(more, last + 1)]
        Record(proofs, self.path)
        partial = self.path.with_name(f".{self.path.name}.partial")
        with partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Proof._fields)
            writer.writerows(proof for _, proof in proofs)
        partial.replace(self.path)

    def _way(self, key: str, code: str) -> Iterator[Proof]:
        """Yield the proofs from a code to its oldest."""
        while (key, code) in self._from:
            proof = self._from[key, code]
            yield proof
            code = proof.equals

    def _follow(self, key: str, code: str, line: int) -> str:
        """Return the oldest code on the way from ``code``, and keep it for all that were passed."""
        passed: dict[str, None] = {}
        while (key, code) in self._from and (key, code) not in self._oldest:
            if code in passed:
                raise ValueError(
                    f"{self.path}, line {line}: {code} of {key} gives the numbers of itself, through "
                    f"{', '.join(passed)}: delete one of the rows"
                )
            passed[code] = None
            code = self._from[key, code].equals
        oldest = self._oldest.get((key, code), code)
        self._oldest |= {(key, one): oldest for one in passed}
        return oldest


@functools.cache
def record() -> Record:
    """Return the record as it was when this process first asked; errors are those of :meth:`Record.load`."""
    return Record.load()


def _parsed(path: Path, line: int, texts: list[str]) -> Proof:
    """Return a row.

    Raises:
        ValueError: a value of it is wrong.
    """

    def wrong(what: str) -> ValueError:
        return ValueError(
            f"{path}, line {line}: {what}; only `detrojan prove` writes it: take it from the repository"
        )

    if len(texts) != len(Proof._fields):
        raise wrong(f"{len(texts)} values where there should be {len(Proof._fields)}")
    row = dict(zip(Proof._fields, texts, strict=True))
    for name in ("code", "equals"):
        if not DIGEST.fullmatch(row[name]):
            raise wrong(f"{name} should be a digest of 16 digits, found {row[name]!r}")
    for name in ("jobs", "files"):
        if not (row[name].isdecimal() and int(row[name])):
            raise wrong(f"{name} should be a whole number, at least 1, found {row[name]!r}")
    try:
        date.fromisoformat(row["date"])
    except ValueError:
        raise wrong(f"date should be YYYY-MM-DD, found {row['date']!r}") from None
    numbers = {name: int(row[name]) for name in ("jobs", "files")}
    return made({**row, **numbers})
