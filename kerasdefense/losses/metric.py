"""Distances of embeddings and the triplets that pull and push them: one value per example."""

from __future__ import annotations

import tensorflow as tf


def angular_distance(first: tf.Tensor, second: tf.Tensor, *, absolute: bool = True) -> tf.Tensor:
    """Return `1 - |cos(first, second)|`, or without `absolute` one minus the cosine.

    Args:
        first: float [batch, d].
        second: float [batch, d].
        absolute: whether a vector and its opposite count as equal.

    Returns:
        float32 [batch], in [0, 1], without `absolute` in [0, 2]; 1 where a vector is 0.

    Source: Mao et al. 2019, "Metric learning for adversarial robustness", as in the code released with AGKD-BML.
    Deviations: vectors shorter than 1e-6 count as 0, so that the gradient stays finite.
    """
    directions = [tf.math.l2_normalize(tf.cast(each, tf.float32), axis=-1) for each in (first, second)]
    cosine = tf.reduce_sum(directions[0] * directions[1], axis=-1)
    return 1 - (tf.abs(cosine) if absolute else cosine)


def angular_triplet(
    anchor: tf.Tensor, positive: tf.Tensor, negative: tf.Tensor, *, margin: float, absolute: bool = True
) -> tf.Tensor:
    """Return `max(0, margin + D(anchor, positive) - D(anchor, negative))`, D being the angular distance.

    Args:
        anchor: embeddings, float [batch, d].
        positive: what they are pulled to, float [batch, d].
        negative: what they are pushed from, float [batch, d].
        margin: by how much farther that should be, at least 0.
        absolute: as in `angular_distance`.

    Returns:
        float32 [batch].

    Source: as of `angular_distance`. Deviations: none.
    """
    near, far = (angular_distance(anchor, each, absolute=absolute) for each in (positive, negative))
    return tf.nn.relu(margin + near - far)


def mean_square(embedding: tf.Tensor) -> tf.Tensor:
    """Return the mean of squares of each `embedding` [batch, d], float32 [batch]: a price on its length."""
    return tf.reduce_mean(tf.square(tf.cast(embedding, tf.float32)), axis=-1)
