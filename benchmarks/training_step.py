"""One training step as this package takes it, timed in turns with the work it cannot avoid and with others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Callable, NamedTuple, Optional

import numpy as np
import tensorflow as tf

from benchmarks.case import Case
from benchmarks.floor import floor
from benchmarks.timing import Step, Timing, time_in_turns
from kerasdefense import defenses, training


class Measurement(NamedTuple):
    """Times of the floor, of ours per strategy and of the others; traces of ours after its first step."""

    timing: Timing
    retraces: dict[str, int]


def measure(
    case: Case,
    rounds: int,
    *,
    strategies: Mapping[str, tf.distribute.Strategy],
    others: Optional[Mapping[str, Step]] = None,
    make_floor: Callable[[Case], Step] = floor,
) -> Measurement:
    """Time a step of all contenders in turns, after two to trace them and warm up."""
    ours = {name: Ours(case, strategy) for name, strategy in strategies.items()}
    steps: dict[str, Step] = {"floor": make_floor(case), **ours, **(others or {})}
    time_in_turns(steps, rounds=1)
    traces = {name: one.traces() for name, one in ours.items()}
    time_in_turns(steps, rounds=1)
    timing = time_in_turns(steps, rounds)
    return Measurement(timing, {name: one.traces() - traces[name] for name, one in ours.items()})


def mirrored() -> dict[str, tf.distribute.Strategy]:
    """Return the strategy that users train under, on one device."""
    device = "/device:GPU:0" if tf.config.list_logical_devices("GPU") else "/device:CPU:0"
    return {"mirrored": training.mirrored((device,))}


def mirrored_and_none() -> dict[str, tf.distribute.Strategy]:
    """Return both strategies of `--train_strategy` that one device can train under."""
    return {**mirrored(), "none": tf.distribute.get_strategy()}


class Ours:
    """The compiled train function that `fit` calls, on an iterator, metrics and checks of the data included."""

    def __init__(self, case: Case, strategy: tf.distribute.Strategy) -> None:
        self.strategy = strategy
        with strategy.scope():
            self.defense = defenses.build(case.run, case.make_backbone())
            self.defense.compile(optimizer=case.make_optimizer())
            if self.defense.needs_bank:
                self.defense.bank = case.make_bank()
            self.train_function = self.defense.make_train_function()
        dataset = tf.data.Dataset.from_tensors(case.batch()).repeat()
        self.iterator = iter(strategy.experimental_distribute_dataset(dataset))

    def __call__(self) -> dict[str, np.ndarray]:
        """Take one step."""
        with self.strategy.scope():
            return {name: value.numpy() for name, value in self.train_function(self.iterator).items()}

    def traces(self) -> int:
        """Return how often the train function has been traced."""
        return self.train_function.experimental_get_tracing_count()
