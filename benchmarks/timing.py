"""Timing several ways of doing the same thing in turns, so that what disturbs one disturbs all."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Callable, NamedTuple

import numpy as np

Step = Callable[[], Any]
"""Does the work once and returns when it is done."""


class Timing(NamedTuple):
    """Seconds of each contender in each round, on the clock and of the processor."""

    seconds: dict[str, list[float]]
    processor_seconds: dict[str, list[float]]

    def milliseconds(self, name: str) -> float:
        """Return the time of one step: the median of the faster half of the rounds.

        What else runs on the machine only ever adds time: the slower half tells more about it than about the step.
        """
        return 1000 * _faster_median(self.seconds[name])

    def ratio(self, name: str, other: str) -> float:
        """Return how many times as long `name` takes as `other`."""
        return self.milliseconds(name) / self.milliseconds(other)

    def processor_ratio(self, name: str, other: str) -> float:
        """Return how many times the processor time of `other` `name` takes; a busy machine hardly moves it."""
        return _faster_median(self.processor_seconds[name]) / _faster_median(self.processor_seconds[other])

    def disturbance(self, name: str) -> float:
        """Return how many times its time above `name` took in its median round: 1 on a machine of its own."""
        return 1000 * float(np.median(self.seconds[name])) / self.milliseconds(name)


def time_in_turns(steps: Mapping[str, Step], rounds: int) -> Timing:
    """Time each step once per round, each round beginning with another one."""
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    processor_seconds: dict[str, list[float]] = {name: [] for name in names}
    for each in range(rounds):
        first = each % len(names)
        for name in names[first:] + names[:first]:
            start, processor_start = time.perf_counter(), time.process_time()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
            processor_seconds[name].append(time.process_time() - processor_start)
    return Timing(seconds, processor_seconds)


def _faster_median(values: list[float]) -> float:
    return float(np.median(sorted(values)[: (len(values) + 1) // 2]))
