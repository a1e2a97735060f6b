"""The choice of the best epoch on validation, and the guard against catastrophic overfitting."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, Optional

import keras
import tensorflow as tf

from kerasdefense.defenses import ADVERSARIAL_ACCURACY, Defense
from kerasdefense.training import saving
from kerasdefense.types import InputError, UsageError

MASKED = 0.1
"""How far accuracy under the training attack must be above that under PGD for a fall to be called overfitting to it."""
BLIND = 0.5
"""How far it must be above for the training attack to be called blind, be there a fall or not."""


class SelectBest(keras.callbacks.Callback):
    """Keep the epoch that is best on validation, and go back to it when training ends.

    With `guard`, training also ends on catastrophic overfitting: accuracy under the validation attack falls below half
    of its best, and is at least 10 points below the accuracy under the attack that training crafts with; or it is at
    least 50 points below, as where training has overfitted to its attack from the start.

    Args:
        folder: where the checkpoints of the best epochs are kept, `best-N.*`; the last three, so that training that
            goes on from one of the last three epochs finds the best epoch of that time.
        monitor: validation metric to select by, higher is better.
        guard: whether to stop on a collapse.
        guard_after: epochs that the guard lets pass, those before the training attack has its whole radius.
    """

    def __init__(self, folder: Path, *, monitor: str, guard: bool, guard_after: float = 0) -> None:
        super().__init__()
        self.folder = folder
        self.monitor = monitor
        self.guard = guard
        self.guard_after = guard_after
        self.best = -math.inf
        self.best_epoch: Optional[int] = None
        self.collapsed_epoch: Optional[int] = None
        self.history: list[dict[str, float]] = []

    def state(self) -> dict[str, Any]:
        """Return what the selection must know to go on, as JSON takes it."""
        best = None if self.best_epoch is None else self.best
        return {
            "best": best,
            "best_epoch": self.best_epoch,
            "collapsed_epoch": self.collapsed_epoch,
            "epochs": self.history,
        }

    def load_state(self, state: dict[str, Any], *, same_settings: bool = True) -> None:
        """Go on from `state()`; what was best under other settings does not count."""
        self.history = list(state["epochs"])
        if same_settings and state["best"] is not None:
            self.best, self.best_epoch = state["best"], state["best_epoch"]
            self.collapsed_epoch = state["collapsed_epoch"]

    def on_train_begin(self, logs: Optional[dict[str, float]] = None) -> None:
        """Bind the checkpoints to the model."""
        self.manager = saving.open_folder(tf.train.Checkpoint(model=self.model), self.folder, "best")

    def on_epoch_end(self, epoch: int, logs: Optional[dict[str, float]] = None) -> None:
        """Save the epoch if it is the best so far; stop if accuracy under attack has collapsed."""
        logs = logs or {}
        self.history.append({"epoch": epoch + 1, **{name: float(value) for name, value in logs.items()}})
        if not all(math.isfinite(each) for each in logs.values()):
            raise InputError(f"the loss is not finite after epoch {epoch + 1}; lower --train_learning_rate")
        value = logs.get(f"val_{self.monitor}")
        if value is None:  # no validation after this epoch
            return
        guarded = self.guard and epoch + 1 > self.guard_after and self.monitor == ADVERSARIAL_ACCURACY
        if guarded and self._has_collapsed(value, logs):
            self.collapsed_epoch = epoch + 1
            self.model.stop_training = True
        if value > self.best:
            self.best, self.best_epoch = float(value), epoch + 1
            with self.model.averaged():
                saving.save(self.manager, epoch + 1)

    def _has_collapsed(self, value: float, logs: dict[str, float]) -> bool:
        """Return whether accuracy under PGD halved or never rose, while that under the training attack is far above."""
        above = logs.get(ADVERSARIAL_ACCURACY, value) - value
        return above > BLIND or (value < 0.5 * self.best and above > MASKED)

    def on_train_end(self, logs: Optional[dict[str, float]] = None) -> None:
        """Restore the best epoch."""
        self.restore_best(self.model)

    def restore_best(self, defense: Defense) -> None:
        """Give the defense the weights of the best epoch, and say so if training had collapsed after it."""
        if self.best_epoch is None:
            raise UsageError("no epoch was validated: --train_validate_every must not exceed --train_epochs")
        path = self.folder / f"best-{self.best_epoch}"
        try:
            tf.train.Checkpoint(model=defense).restore(str(path)).assert_existing_objects_matched()
        except (tf.errors.OpError, RuntimeError, AssertionError) as error:
            raise InputError(f"the best epoch, {path}, cannot be read; --train_resume=never trains anew") from error
        if self.collapsed_epoch is not None:
            print(
                f"catastrophic overfitting in epoch {self.collapsed_epoch}: accuracy under the validation attack is "
                f"far below that under the training attack; training stopped, epoch {self.best_epoch} was restored",
                file=sys.stderr,
            )
