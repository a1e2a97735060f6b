"""Quarter turns of images, one number of turns per example."""

from __future__ import annotations

import tensorflow as tf

from kerasdefense.types import UsageError


def rotate(image: tf.Tensor, turns: tf.Tensor) -> tf.Tensor:
    """Turn each image by `90 turns` degrees counter-clockwise.

    Args:
        image: [batch, side, side, channels].
        turns: int [batch], any integers; 4 is a whole turn and -1 a quarter turn clockwise.

    Returns:
        [batch, side, side, channels]; `tf.image.rot90(image[i], turns[i])` at place i.

    Raises:
        UsageError: if the images are not square, or their size is not known.

    Source: the transformation of OSDN (Shao, Perera, Yuen & Patel 2020). Deviations: none.
    """
    if image.shape.rank != 4 or image.shape[1] is None or image.shape[1] != image.shape[2]:
        raise UsageError(f"rotate takes square images (batch, side, side, channels), not {tuple(image.shape)}")
    turns = tf.math.floormod(turns, 4)[:, None, None, None]
    image = tf.where(turns >= 2, tf.reverse(image, axis=[1, 2]), image)
    quarter = tf.transpose(tf.reverse(image, axis=[2]), [0, 2, 1, 3])
    return tf.where(turns % 2 == 1, quarter, image)
