"""Deadlines, and attempts that keep them."""

from __future__ import annotations

import random
import time
from typing import Callable, TypeVar

from kerasdefense.serving.errors import DeadlineError, MergedError, UnavailableError

T = TypeVar("T")
_FIRST, _LONGEST = 0.1, 5.0
"""Seconds before the second attempt, and the longest pause."""
_MERGED = 2
"""Attempts after a merged refusal, however many others are left: a wrong request spoils those of others each time."""
_RANDOM = random.Random()
"""Not the generator that programs seed, whose draws do not depend on how often a server was busy."""


class Deadline:
    """A point in time, so many seconds from now."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds that are left, or raise a DeadlineError where none are."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise DeadlineError(f"no answer within {self._seconds:g} s")
        return left


def pause(attempt: int) -> float:
    """Return the seconds to wait after attempt number 0, 1, ...: twice as long each time, less up to a half at random.

    Clients that were turned away together so do not come back together.
    """
    return min(_LONGEST, _FIRST * 2.0**attempt) * _RANDOM.uniform(0.5, 1.0)


def attempted(call: Callable[[float], T], deadline: Deadline, retries: int) -> T:
    """Return what a call returns, made again up to `retries` times while nobody takes it and there is time.

    Args:
        call: takes the seconds that it may last.
        deadline: when all attempts and pauses must be over.
        retries: attempts after the first.

    Raises:
        UnavailableError: nobody took the last attempt, or the next pause would have gone past the deadline; or a
            MergedError, the request was refused with one of another shape for the third time.
        DeadlineError: there was no time for another attempt.
    """
    attempt, merged = 0, 0
    while True:
        try:
            return call(deadline.left())
        except UnavailableError as error:
            wait = pause(attempt)
            merged += isinstance(error, MergedError)
            if attempt >= retries or merged > _MERGED or wait >= deadline.left():
                raise
        time.sleep(wait)
        attempt += 1
