"""Tokens of a transformer on patches of images: one that stands for what is missing, and where each patch is."""

from __future__ import annotations

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable(package="kerasdefense")
class MaskToken(keras.layers.Layer):
    """Replace features by a learnt token, in proportion to how much of each is missing.

    `output = (1 - share) features + share token`; wholly missing ones thus become the token.

    Source: the mask token of He et al. 2022, "Masked autoencoders are scalable vision learners". Deviations: features
    may be missing in part.
    """

    def build(self, input_shape: list[tf.TensorShape]) -> None:
        """Make the token for the channels of the features."""
        initializer = keras.initializers.RandomNormal(stddev=0.02)
        self.token = self.add_weight(name="token", shape=[input_shape[0][-1]], initializer=initializer)
        super().build(input_shape)

    def call(self, inputs: list[tf.Tensor]) -> tf.Tensor:
        """Return float [..., c] of features [..., c] and the share missing, [..., 1] in [0, 1]."""
        features, share = inputs
        return (1 - share) * features + share * self.token


@keras.saving.register_keras_serializable(package="kerasdefense")
class Positions(keras.layers.Layer):
    """Add to each token of a sequence a learnt vector of its place.

    Source: Dosovitskiy et al. 2021, "An image is worth 16x16 words", section 3.1. Deviations: none.
    """

    def build(self, input_shape: tf.TensorShape) -> None:
        """Make a vector for each place."""
        initializer = keras.initializers.RandomNormal(stddev=0.02)
        self.position = self.add_weight(name="position", shape=list(input_shape[1:]), initializer=initializer)
        super().build(input_shape)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Return float [batch, places, c] of tokens of that shape."""
        return inputs + self.position
