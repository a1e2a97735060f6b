"""What it costs to write the checkpoint that training goes on from."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

from benchmarks.case import Case
from benchmarks.timing import Step, time_in_turns
from benchmarks.training_step import Measurement, Ours, mirrored
from kerasdefense.training.checkpoints import Checkpoints
from kerasdefense.training.selection import SelectBest


def write(ours: Ours, folder: Path) -> Step:
    """Return the write that `fit` makes at an epoch's end: weights, optimizer and averages; the last three are kept."""
    select = SelectBest(folder, monitor=ours.defense.monitor, guard=False)
    checkpoints = Checkpoints(folder, ours.defense, select, settings={})
    checkpoints.on_train_begin()
    epochs = itertools.count()
    return lambda: checkpoints.on_epoch_end(next(epochs))


def measure_checkpoint(case: Case, rounds: int) -> Measurement:
    """Time a training step and a write of its checkpoint in turns, after two to trace and warm up."""
    ((strategy, one),) = mirrored().items()
    ours = Ours(case, one)
    with tempfile.TemporaryDirectory(prefix="kerasdefense-benchmark-") as folder:
        steps: dict[str, Step] = {strategy: ours, "checkpoint": write(ours, Path(folder))}
        time_in_turns(steps, rounds=1)
        traces = ours.traces()
        time_in_turns(steps, rounds=1)
        timing = time_in_turns(steps, rounds)
    return Measurement(timing, {strategy: ours.traces() - traces})
