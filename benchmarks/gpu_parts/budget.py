"""Time: each part of the check ends when its share of the minutes is over, whatever it is at."""

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import NoReturn


class OutOfTimeError(BaseException):
    """The time is over: no error of what was cut off, so that nothing takes it for one."""


class Budget:
    """So many seconds from ``started`` on.

    Args:
        seconds: in all.
        started: by ``time.monotonic``; what went by since then counts.
    """

    def __init__(self, seconds: float, started: float) -> None:
        self.seconds = seconds
        self._started = started
        self._end = started + seconds

    @property
    def spent(self) -> float:
        """Seconds gone by."""
        return time.monotonic() - self._started

    @property
    def left(self) -> float:
        """Seconds until the part at work must end."""
        return self._end - time.monotonic()

    @contextlib.contextmanager
    def until(self, share: float) -> Iterator[None]:
        """Let the block go on until ``share`` of all seconds are spent, no longer."""
        whole, self._end = self._end, min(self._end, self._started + share * self.seconds)
        try:
            yield
        finally:
            self._end = whole

    @contextlib.contextmanager
    def limited(self, seconds: float | None = None) -> Iterator[None]:
        """Cut the block off when the time is over, or after ``seconds`` if that is less.

        Raises:
            OutOfTimeError: it was cut off, or no time was left for it.
        """
        allowed = self.left if seconds is None else min(self.left, seconds)
        if allowed <= 0:
            raise OutOfTimeError

        def cut_off(_number: int, _frame: object) -> NoReturn:
            raise OutOfTimeError

        before = signal.signal(signal.SIGALRM, cut_off)
        signal.setitimer(signal.ITIMER_REAL, allowed)
        try:
            yield
        finally:
            self.let_finish()
            signal.signal(signal.SIGALRM, before)

    @staticmethod
    def let_finish() -> None:
        """Cut the block no longer off: what it has measured is being written, and that must be whole."""
        signal.setitimer(signal.ITIMER_REAL, 0)
