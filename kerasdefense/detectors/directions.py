"""Lengths and directions of feature vectors, with finite gradients at zero."""

from __future__ import annotations

import tensorflow as tf

TINY = 1e-10


def length(vectors: tf.Tensor) -> tf.Tensor:
    """Return the euclidean length over the last axis, `||vectors||`, with gradient 0 at the zero vector.

    Args:
        vectors: float32 [..., d].

    Returns:
        float32 [...].
    """
    return root(tf.reduce_sum(tf.square(vectors), axis=-1))


def root(squared: tf.Tensor) -> tf.Tensor:
    """Return the square root, with value and gradient 0 where `squared` is not above 0."""
    is_zero = squared <= 0
    return tf.where(is_zero, tf.zeros_like(squared), tf.sqrt(tf.where(is_zero, tf.ones_like(squared), squared)))


def direction(vectors: tf.Tensor, tiny: float = TINY) -> tf.Tensor:
    """Return `vectors / (||vectors|| + tiny)`, zero for the zero vector.

    Args:
        vectors: float32 [batch, d].
        tiny: above 0.

    Returns:
        float32 [batch, d].
    """
    return vectors / (length(vectors)[:, tf.newaxis] + tiny)
