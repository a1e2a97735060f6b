"""How far a decoder's image is from the one that it should have drawn."""

from __future__ import annotations

import tensorflow as tf


def reconstruction_error(reconstruction: tf.Tensor, image: tf.Tensor) -> tf.Tensor:
    """Return the mean over pixels and channels of `(reconstruction - (2 image - 1))^2`.

    Args:
        reconstruction: float [batch, height, width, channels] in [-1, 1], as a decoder's tanh gives it.
        image: float [batch, height, width, channels] in [0, 1], the clean image.

    Returns:
        float [batch].

    Source: the reconstruction loss of OSDN (Shao, Perera, Yuen & Patel 2020). Deviations: the target is the image
        mapped to the range of tanh; the authors' is the image normalised by the data's mean and deviation, which
        tanh cannot reach.
    """
    return tf.reduce_mean(tf.math.squared_difference(reconstruction, 2 * image - 1), axis=(1, 2, 3))
