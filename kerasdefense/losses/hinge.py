"""Hinge losses of a patch critic: places of true images are to be judged above 1, those of restored ones below -1."""

from __future__ import annotations

import tensorflow as tf


def hinge_critic_loss(real: tf.Tensor, fake: tf.Tensor) -> tf.Tensor:
    """Return what the critic descends on, `(mean(relu(1 - real)) + mean(relu(1 + fake))) / 2`, float32 [batch].

    The means are over the places of each image.

    Args:
        real: the critic's judgements of true images, float [batch, places].
        fake: of restored images, float [batch, places].

    Source: Yu et al. 2019, "Free-form image inpainting with gated convolution", section 3.3, halved as in the code
    released with AToP (Lin et al. 2024). Deviations: none.
    """
    of_real = tf.nn.relu(1 - tf.cast(real, tf.float32))
    of_fake = tf.nn.relu(1 + tf.cast(fake, tf.float32))
    return (tf.reduce_mean(of_real, axis=-1) + tf.reduce_mean(of_fake, axis=-1)) / 2


def hinge_adversarial_loss(fake: tf.Tensor) -> tf.Tensor:
    """Return what the restoring network descends on, `-mean(fake)`, float32 [batch]; as `hinge_critic_loss`."""
    return -tf.reduce_mean(tf.cast(fake, tf.float32), axis=-1)
