"""One optimizer step on named loss terms, on any number of replicas, in any precision, at perturbed weights or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Callable, Optional

import keras
import tensorflow as tf

from kerasdefense.defenses.weight_perturbation import keep_statistics, move_up

Terms = Mapping[str, tf.Tensor]
"""Named loss terms, each [batch]."""

Forward = Callable[[], tuple[Terms, Any]]
"""Passes a batch through the model and returns its loss terms, weights included, and whatever else is of use."""


def descend(
    forward: Forward,
    model: keras.Model,
    optimizer: Any,
    variables: Sequence[Any],
    *,
    awp_gamma: float = 0.0,
    tape: Optional[tf.GradientTape] = None,
) -> tuple[Terms, Any]:
    """Take one step of `optimizer` on `variables`, and return what `forward` returned at the weights of its gradient.

    Args:
        forward: called under a gradient tape, with `awp_gamma` twice.
        model: whose regularisation losses are added, and whose BatchNormalization `forward` passes through.
        optimizer: with loss scaling or not.
        variables: what it updates.
        awp_gamma: length of the adversarial weight perturbation relative to each kernel's norm; 0 = none.
        tape: goes on recording for `forward`, where that uses earlier passes; without `awp_gamma` only.
    """
    if awp_gamma and tape is not None:
        raise ValueError("a tape holds passes at the weights as they are, not at perturbed ones")
    if awp_gamma:
        put_statistics_back = keep_statistics(model)
        _, _, ascent = _gradients(forward, model, optimizer, variables)
        put_statistics_back()
        put_kernels_back = move_up(variables, _sum_over_replicas(ascent), awp_gamma)
        terms, outputs, gradients = _gradients(forward, model, optimizer, variables)
        put_kernels_back()
    else:
        terms, outputs, gradients = _gradients(forward, model, optimizer, variables, tape)
    optimizer.apply_gradients(zip(gradients, variables))
    return terms, outputs


def _gradients(
    forward: Forward,
    model: keras.Model,
    optimizer: Any,
    variables: Sequence[Any],
    tape: Optional[tf.GradientTape] = None,
) -> tuple[Terms, Any, list[Optional[tf.Tensor]]]:
    """Return what `forward` returns, and this replica's part of the gradients of the mean over the global batch."""
    scaling = isinstance(optimizer, keras.mixed_precision.LossScaleOptimizer)
    tape = tape or tf.GradientTape()
    with tape:
        terms, outputs = forward()
        size = _global_size(next(iter(terms.values())))
        replicas = tf.distribute.get_replica_context().num_replicas_in_sync
        regularisation = [loss / replicas for loss in model.losses]
        total = tf.add_n([tf.reduce_sum(term) / size for term in terms.values()] + regularisation)
        descended = optimizer.get_scaled_loss(total) if scaling else total
    gradients = tape.gradient(descended, variables)
    return terms, outputs, optimizer.get_unscaled_gradients(gradients) if scaling else gradients


def _global_size(values: tf.Tensor) -> tf.Tensor:
    """Return the number of examples over all replicas, of which `values` [batch] are this replica's."""
    return _sum_over_replicas([tf.cast(tf.shape(values)[0], values.dtype)])[0]


def _sum_over_replicas(values: Sequence[Optional[tf.Tensor]]) -> list[Optional[tf.Tensor]]:
    """Return each tensor summed over the replicas; None stays."""
    replica = tf.distribute.get_replica_context()
    if replica.num_replicas_in_sync == 1:
        return list(values)
    summed = iter(replica.all_reduce(tf.distribute.ReduceOp.SUM, [value for value in values if value is not None]))
    return [None if value is None else next(summed) for value in values]
