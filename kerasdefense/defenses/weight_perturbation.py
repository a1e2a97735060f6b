"""Adversarial weight perturbation: a step is taken on the loss at weights that were first moved up that loss.

Source: Wu et al. 2020, "Adversarial weight perturbation helps robust generalization", equations 8 to 10, one step.
Deviations: as in the authors' code, a kernel's norm is that of the whole tensor, and only tensors of two and more
dimensions are moved. Their proxy model is the model itself: kernels are moved in place and put back exactly, where the
authors subtract what they added; the statistics of BatchNormalization are put back after the ascent pass, as those of a
proxy would be thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable, Optional

import keras
import tensorflow as tf


def move_up(variables: Sequence[Any], gradients: Sequence[Optional[tf.Tensor]], gamma: float) -> Callable[[], None]:
    """Move every kernel along its gradient by `gamma` times its own norm; call it in a replica context.

    `kernel + gamma * ||kernel|| / ||gradient|| * gradient`, the norms over the whole tensor; a kernel whose gradient
    is zero or not finite stays.

    Args:
        variables: trainable variables; those of fewer than two dimensions stay.
        gradients: of the loss, over the global batch; None where the loss does not depend on the variable.
        gamma: length of the move relative to the kernel's norm.

    Returns:
        The function that puts the kernels back, exactly.
    """
    pairs = [
        (variable, gradient)
        for variable, gradient in zip(variables, gradients)
        if gradient is not None and variable.shape.rank > 1
    ]
    kernels = [variable for variable, _ in pairs]
    before = [tf.identity(kernel) for kernel in kernels]
    moved = []
    for value, (_, gradient) in zip(before, pairs):
        length = tf.norm(gradient)
        usable = tf.math.is_finite(length) & (length > 0)
        direction = tf.where(usable, gradient / length, tf.zeros_like(gradient))
        moved.append(value + gamma * tf.norm(value) * direction)
    _assign(kernels, moved)
    return lambda: _assign(kernels, before)


def keep_statistics(model: keras.Model) -> Callable[[], None]:
    """Return the function that puts the moving statistics of every BatchNormalization in `model` back as they are."""
    layers = [layer for layer in model.submodules if isinstance(layer, keras.layers.BatchNormalization)]
    variables = [variable for layer in layers for variable in (layer.moving_mean, layer.moving_variance)]
    before = [tf.identity(variable) for variable in variables]

    def put_back() -> None:
        for variable, value in zip(variables, before):  # each replica has its own until it is read
            variable.assign(value)

    return put_back


def _assign(variables: Sequence[Any], values: Sequence[tf.Tensor]) -> None:
    """Assign values, equal on all replicas, to variables that the replicas mirror."""

    def update(strategy: tf.distribute.Strategy, values: Sequence[Any]) -> None:
        for variable, value in zip(variables, values):
            strategy.extended.update(variable, lambda one, new: one.assign(new), args=(value,), group=False)

    tf.distribute.get_replica_context().merge_call(update, args=(list(values),))
