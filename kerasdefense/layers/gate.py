"""Gated features: one half of the channels says how much of the other half passes."""

from __future__ import annotations

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable(package="kerasdefense")
class Gate(keras.layers.Layer):
    """Return `ELU(a) * sigmoid(b)`, [..., c], of the two halves `a`, `b` of the channels [..., 2 c].

    A convolution before it thus learns which places to look at, such as those that are not missing.

    Source: Yu et al. 2019, "Free-form image inpainting with gated convolution", section 3.1. Deviations: none.
    """

    def call(self, tensor: tf.Tensor) -> tf.Tensor:
        """Return float [..., c] of `tensor` [..., 2 c]."""
        features, gates = tf.split(tensor, 2, axis=-1)
        return tf.nn.elu(features) * tf.sigmoid(gates)
