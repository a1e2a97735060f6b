"""Optimizers that begin anew while training goes on: moments and steps at zero, the learning rate as it was."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf


class ByStep(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule that goes by a counter of its own, whatever the optimizer counts.

    Args:
        schedule: from a step to a learning rate.
        step: int64 variable.
    """

    def __init__(self, schedule: Any, step: tf.Variable) -> None:
        self.schedule, self.step = schedule, step

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        """Return the learning rate at the counter."""
        del step
        return self.schedule(self.step)


def follow(optimizer: Any, step: tf.Variable) -> None:
    """Have the learning rate of an optimizer go by `step`; one that is constant stays."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if isinstance(inner._learning_rate, keras.optimizers.schedules.LearningRateSchedule):
        inner._learning_rate = ByStep(inner._learning_rate, step)


def forget(optimizer: Any) -> None:
    """Set the moments of an optimizer of Keras, Adam or SGD, and its count of steps to zero."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    gathered = [each for name in ("_momentums", "_velocities", "momentums") for each in getattr(inner, name, ())]
    for variable in (inner.iterations, *gathered):
        variable.assign(tf.zeros_like(variable))


def serialised(optimizer: Any) -> Any:
    """Return an optimizer as Keras serialises it, with the schedule that `follow` has wrapped."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    wrapped = inner._learning_rate
    try:
        if isinstance(wrapped, ByStep):
            inner._learning_rate = wrapped.schedule
        return keras.saving.serialize_keras_object(optimizer)
    finally:
        inner._learning_rate = wrapped
