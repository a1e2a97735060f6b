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


def advance(seed: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """Return the seeds [batch, 2] of each example's draw number `count` int32 [batch]."""
    # Hashed after it is joined, so that advancing twice gives other seeds than advancing the other way round.
    joined = tf.bitwise.bitwise_xor(tf.bitcast(seed[:, 1], tf.uint32), _mixed(count, 0x85EBCA6B))
    return tf.stack([seed[:, 0], tf.bitcast(_mixed(joined, 0xC2B2AE35), tf.int32)], axis=1)


def uniform(seed: tf.Tensor, count: tf.Tensor, numbers: int) -> tf.Tensor:
    """Return draws from [0, 1) that depend on an example's seed and `count` alone.

    TensorFlow's stateless draws take one seed for a whole tensor; these take one per example, without a loop over them:
    a 32-bit hash of seed, count and place, which is enough for the few numbers that a step of a search draws.

    Args:
        seed: int32 [batch, 2].
        count: int32 [batch], which of the example's draws it is.
        numbers: how many numbers each example gets.

    Returns:
        float32 [batch, numbers].

    Source: the finaliser of MurmurHash3 (Appleby, public domain). Deviations: none.
    """
    key = _mixed(seed[:, 0], 0x9E3779B9)
    for value in (seed[:, 1], count):
        key = _mixed(tf.bitwise.bitwise_xor(key, _mixed(value, 0x85EBCA6B)), 0xC2B2AE35)
    bits = _mixed(tf.bitwise.bitwise_xor(key[:, None], _mixed(tf.range(numbers), 0x27D4EB2F)), 0)
    return tf.cast(tf.bitwise.right_shift(bits, tf.constant(8, tf.uint32)), tf.float32) / float(1 << 24)


def _mixed(values: tf.Tensor, salt: int) -> tf.Tensor:
    """Return a hash of 32-bit integers, uint32 of their shape."""

    def shifted(bits: tf.Tensor, by: int) -> tf.Tensor:
        return tf.bitwise.bitwise_xor(bits, tf.bitwise.right_shift(bits, tf.constant(by, tf.uint32)))

    bits = tf.bitcast(values, tf.uint32) + tf.constant(salt, tf.uint32)
    bits = shifted(bits, 16) * tf.constant(0x85EBCA6B, tf.uint32)
    return shifted(shifted(bits, 13) * tf.constant(0xC2B2AE35, tf.uint32), 16)
