"""Trials: the settings among which those of the protocol ``tuned`` are chosen, and the families of attacks.

A defense has 24 of them, which run as ordinary cells under the protocols ``trial-00`` to ``trial-23``: the
settings of ``survey``, those of ``paper``, then points of a Sobol sequence over the ranges that
``config/defenses/`` declares. No trial waits for another, and the first few are a smaller search.

The points are those of Joe and Kuo, "Constructing Sobol sequences with better two-dimensional projections",
SIAM J. Sci. Comput. 30 (2008), scrambled after Matoušek, "On the L2-discrepancy for anchored boxes",
J. Complexity 14 (1998), Sec. 4: a random lower triangular matrix of bits for each dimension, and a shift.
They are made here and not by SciPy, whose scrambling may change from version to version: the settings of a
trial must not, and reading a study must stay cheap. Free of torch.
"""

import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from detrojan.cells import NO_METHOD

NUM_TRIALS = 24
FIRST_DRAWN = 2  # those before are the settings of `survey` and of `paper`
TRIALS = "trials"  # in a study file, for all of them
PREFIX = "trial-"
TUNED = "tuned"
FIRST_OF_TUNING = 100  # the seeds and draws from here on are for tuning, and no other study has them
# Attacks whose triggers are alike: what is chosen with one of them in sight says nothing of the others.
FAMILIES = (("badnets",), ("blended", "sig", "lf"), ("ssba", "iab", "wanet", "bpp"))

BITS = 30
# Of dimensions 2 to 6: degree and coefficients of the primitive polynomial, first direction numbers.
JOE_KUO = ((1, 0, (1,)), (2, 1, (1, 3)), (3, 1, (1, 3, 1)), (3, 2, (1, 1, 1)), (4, 1, (1, 1, 3, 3)))
MOST_SEARCHED = 1 + len(JOE_KUO)  # settings of a defense


class Range(BaseModel):
    """Where the trials look for the value of a setting: between two numbers, or among some values."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    low: float | None = None
    high: float | None = None
    scale: Literal["linear", "log"] = "linear"
    among: tuple[bool | int | float | str, ...] = Field((), description="in place of the numbers")

    @pydantic.model_validator(mode="after")
    def _is_one_or_the_other(self) -> "Range":
        if self.among:
            if self.low is not None or self.high is not None:
                raise ValueError("give low and high, or among")
            return self
        if self.low is None or self.high is None or not self.low < self.high:
            raise ValueError("needs low and a larger high, or among")
        if self.scale == "log" and self.low <= 0:
            raise ValueError("a log scale needs a low above 0")
        return self

    def at(self, share: float, *, whole: bool) -> Any:
        """Return the value that lies at ``share``, in [0, 1), of the range.

        Args:
            share: 0 is the low end.
            whole: whether the setting is a whole number.
        """
        if self.among:
            return self.among[int(share * len(self.among))]
        assert self.low is not None
        assert self.high is not None
        if self.scale == "log":
            value = self.low * (self.high / self.low) ** share
        else:
            value = self.low + (self.high - self.low) * share
        # Three digits: a power may differ in its last bit from machine to machine, a setting must not.
        return round(value) if whole else float(f"{value:.3g}")


# --- names -----------------------------------------------------------------------------------------


def name(number: int) -> str:
    """Return the protocol of a trial."""
    return f"{PREFIX}{number:02d}"


NAMES = tuple(map(name, range(NUM_TRIALS)))


def number(protocol: str) -> int | None:
    """Return which trial a protocol is; None if it is none."""
    return NAMES.index(protocol) if protocol in NAMES else None


@functools.cache
def family(attack: str) -> str:
    """Return the family of an attack, by the name of its first; an attack of none is one by itself."""
    return next((group[0] for group in FAMILIES if attack in group), attack)


# --- settings --------------------------------------------------------------------------------------


def drawn(defense: str, search: Mapping[str, Range], whole: Sequence[str], trial: int) -> dict[str, Any]:
    """Return the settings that a trial draws; none for the two that draw nothing.

    Args:
        defense: seeds the sequence.
        search: of at most six settings, in their order.
        whole: which of them are whole numbers.
        trial: from 0 to 23.
    """
    if trial < FIRST_DRAWN:
        return {}
    return {
        setting: found.at(
            _scrambled(f"{defense}/{setting}", dimension)[trial - FIRST_DRAWN], whole=setting in whole
        )
        for dimension, (setting, found) in enumerate(search.items())
    }


def sobol(dimension: int, count: int) -> list[float]:
    """Return the first points of a dimension of the Sobol sequence, unscrambled, in [0, 1)."""
    return [point / 2**BITS for point in _points(_directions(dimension), count)]


@functools.cache
def _scrambled(seed: str, dimension: int) -> list[float]:
    """Return the points of all trials that draw, in [0, 1)."""
    rows = hashlib.shake_256(seed.encode()).digest(4 * (BITS + 1))
    words = [int.from_bytes(rows[at : at + 4]) >> (32 - BITS) for at in range(0, len(rows), 4)]
    directions = [_times(words[:BITS], direction) for direction in _directions(dimension)]
    count = NUM_TRIALS - FIRST_DRAWN
    return [(point ^ words[BITS]) / 2**BITS for point in _points(directions, count)]


def _points(directions: Sequence[int], count: int) -> list[int]:
    """Return the points of a dimension, in the order of Gray's code: each turns one more direction."""
    changed = (directions[(place & -place).bit_length() - 1] for place in range(1, count))
    return list(itertools.accumulate(changed, int.__xor__, initial=0))


def _directions(dimension: int) -> list[int]:
    """Return the direction numbers of a dimension, from 0, as fractions of ``2**BITS``."""
    if dimension == 0:
        return [1 << (BITS - place) for place in range(1, BITS + 1)]
    degree, coefficients, first = JOE_KUO[dimension - 1]
    found = [value << (BITS - place) for place, value in enumerate(first, 1)]
    while len(found) < BITS:
        new = found[-degree] ^ (found[-degree] >> degree)
        for place in range(1, degree):
            if coefficients >> (degree - 1 - place) & 1:
                new ^= found[-place]
        found.append(new)
    return found


def _times(rows: Sequence[int], direction: int) -> int:
    """Return a direction number times a lower triangular matrix with ones on its diagonal, modulo 2.

    Args:
        rows: random bits; of each row those below the diagonal count.
        direction: its highest bit is the first of the vector.
    """
    found = 0
    for place, row in enumerate(rows):
        diagonal = 1 << (BITS - 1 - place)
        before = (1 << BITS) - 2 * diagonal  # the bits that stand higher
        found |= diagonal * (((row & before | diagonal) & direction).bit_count() & 1)
    return found


def left_out(attack: str) -> str:
    """Return which family of attacks has no say in what is chosen for an attack; none for a clean model."""
    return NO_METHOD if attack == NO_METHOD else family(attack)
