"""Training: strategy, optimizer, callbacks, fit, and the choice of the best epoch."""

from __future__ import annotations

import functools
import math
import sys
import warnings
from pathlib import Path
from typing import Any, Optional

import keras
import tensorflow as tf

from kerasdefense import backbones, config, defenses
from kerasdefense.data import Splits
from kerasdefense.defenses import ADVERSARIAL_ACCURACY, Defense
from kerasdefense.types import InputError, UsageError

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # the notice of TFA's end of life
    from tensorflow_addons.callbacks import TQDMProgressBar
    from tensorflow_addons.optimizers import TriangularCyclicalLearningRate


MASKED = 0.1
"""How far accuracy under the training attack must be above that under PGD for a fall to be called overfitting to it."""


def make_strategy(train: config.Train) -> tf.distribute.Strategy:
    """Return the distribution strategy: mirrored over all visible GPUs (or logical CPUs), or the default one."""
    if train.strategy == "none":
        return tf.distribute.get_strategy()
    devices = [device.name for device in tf.config.list_logical_devices("GPU")]
    if not devices:
        devices = [device.name for device in tf.config.list_logical_devices("CPU")]
    if train.batch_size % len(devices):
        raise UsageError(f"--train_batch_size={train.batch_size} does not divide over {len(devices)} replicas")
    return mirrored(tuple(devices))


@functools.cache
def mirrored(devices: tuple[str, ...]) -> tf.distribute.MirroredStrategy:
    """Return this process's one strategy over these devices.

    TensorFlow numbers the collective operations of every strategy from the same start, so that two strategies over the
    same devices can take each other's for their own and abort.
    """
    return tf.distribute.MirroredStrategy(list(devices))


def make_optimizer(train: config.Train, steps: int) -> keras.optimizers.Optimizer:
    """Return the optimizer for a run of `steps` steps."""
    rate: Any = train.learning_rate
    if train.schedule == "triangular":
        rate = TriangularCyclicalLearningRate(0.0, train.learning_rate, step_size=max(1, steps // 2))
    if train.optimizer == "adam":
        return keras.optimizers.Adam(rate, weight_decay=train.weight_decay or None)
    return keras.optimizers.SGD(rate, momentum=train.momentum, weight_decay=train.weight_decay or None)


def build(run: config.Run, splits: Splits) -> Defense:
    """Return the compiled defense of a run; call it in the scope of the strategy."""
    keras.utils.set_random_seed(run.train.seed)
    backbone = backbones.build(run.backbone, image_shape=splits.image_shape, classes=len(splits.labels))
    defense = defenses.build(run, backbone)
    steps = run.train.epochs * splits.train.steps_per_epoch(run.train.batch_size)
    defense.compile(optimizer=make_optimizer(run.train, steps))
    return defense


class SelectBest(keras.callbacks.Callback):
    """Keep the epoch that is best on validation, and go back to it when training ends.

    With `guard`, training also ends on catastrophic overfitting: accuracy under the validation attack falls below half
    of its best, and is at least 10 points below the accuracy under the attack that training crafts with.

    Args:
        folder: where the best epoch's checkpoint is kept.
        monitor: validation metric to select by, higher is better.
        guard: whether to stop on a collapse.
    """

    def __init__(self, folder: Path, *, monitor: str, guard: bool) -> None:
        super().__init__()
        self.folder = folder
        self.monitor = monitor
        self.guard = guard
        self.best = -math.inf
        self.best_epoch: Optional[int] = None
        self.collapsed_epoch: Optional[int] = None
        self.history: list[dict[str, float]] = []

    def on_train_begin(self, logs: Optional[dict[str, float]] = None) -> None:
        """Bind the checkpoints to the model."""
        self.checkpoints = tf.train.CheckpointManager(
            tf.train.Checkpoint(model=self.model), str(self.folder), max_to_keep=1, checkpoint_name="best"
        )

    def on_epoch_end(self, epoch: int, logs: Optional[dict[str, float]] = None) -> None:
        """Save the epoch if it is the best so far; stop if accuracy under attack has collapsed."""
        logs = logs or {}
        self.history.append({"epoch": epoch + 1, **{name: float(value) for name, value in logs.items()}})
        if not all(math.isfinite(each) for each in logs.values()):
            raise InputError(f"the loss is not finite after epoch {epoch + 1}; lower --train_learning_rate")
        value = logs.get(f"val_{self.monitor}")
        if value is None:  # no validation after this epoch
            return
        if self.guard and self.monitor == ADVERSARIAL_ACCURACY and self._has_collapsed(value, logs):
            self.collapsed_epoch = epoch + 1
            self.model.stop_training = True
        if value > self.best:
            self.best, self.best_epoch = float(value), epoch + 1
            self.checkpoints.save(checkpoint_number=epoch + 1)

    def _has_collapsed(self, value: float, logs: dict[str, float]) -> bool:
        """Return whether accuracy under PGD halved while that under the training attack stayed well above it."""
        return value < 0.5 * self.best and logs[ADVERSARIAL_ACCURACY] - value > MASKED

    def on_train_end(self, logs: Optional[dict[str, float]] = None) -> None:
        """Restore the best epoch."""
        if self.best_epoch is None:
            raise UsageError("no epoch was validated: --train_validate_every must not exceed --train_epochs")
        self.checkpoints.restore_or_initialize()
        if self.collapsed_epoch is not None:
            message = (
                f"catastrophic overfitting in epoch {self.collapsed_epoch}: accuracy under attack fell below half of"
            )
            print(
                f"{message} its best; training stopped and epoch {self.best_epoch} was restored",
                file=sys.stderr,
            )


def train(run: config.Run, splits: Splits, run_dir: Path) -> tuple[Defense, SelectBest]:
    """Train the defense of a run and return it at its best epoch, with the record of the selection.

    Args:
        run: the run's configuration.
        splits: data to train and validate on.
        run_dir: folder that receives `checkpoints/` and `tensorboard/`.
    """
    if run.train.epochs < 1:
        raise UsageError(f"--train_epochs must be at least 1, not {run.train.epochs}")
    if not 1 <= run.train.validate_every <= run.train.epochs:
        raise UsageError("--train_validate_every must be at least 1, and must not exceed --train_epochs")
    strategy = make_strategy(run.train)
    with strategy.scope():
        defense = build(run, splits)
    select = SelectBest(run_dir / "checkpoints", monitor=defense.monitor, guard=run.train.guard)
    tensorboard = keras.callbacks.TensorBoard(str(run_dir / "tensorboard"), write_graph=False)
    progress = [TQDMProgressBar(show_epoch_progress=sys.stderr.isatty())] if run.progress else []
    batch_size = run.train.batch_size
    defense.fit(
        splits.train.epochs(batch_size, seed=run.train.seed, epochs=run.train.epochs),
        epochs=run.train.epochs,
        steps_per_epoch=splits.train.steps_per_epoch(batch_size),
        validation_data=splits.validation.batches(batch_size),
        validation_freq=run.train.validate_every,
        callbacks=[select, tensorboard, *progress],
        verbose=0,
    )
    return defense, select
