"""Stateless seeds keyed per example, so that no draw depends on a replica or on a place in the batch."""

from __future__ import annotations

import tensorflow as tf


def per_example(seed: int, stream: tf.Tensor | int, index: tf.Tensor) -> tf.Tensor:
    """Fold a run's seed, a stream (training step, attack and restart) and each example's index into seeds.

    Args:
        seed: the run's seed.
        stream: integer scalar that tells apart the draws of one example.
        index: int32 [batch], the global example index.

    Returns:
        int32 [batch, 2].
    """
    folded = tf.random.experimental.stateless_fold_in(tf.constant([seed, 0x5EED], tf.int32), tf.cast(stream, tf.int32))
    # Folding only puts the stream beside a hash of the seed: hash both, or streams and indices collide.
    key = tf.random.stateless_uniform([2], folded, minval=None, maxval=None, dtype=tf.int32)
    return tf.stack(
        [tf.fill(tf.shape(index), key[0]), tf.bitwise.bitwise_xor(tf.cast(index, tf.int32), key[1])], axis=1
    )
