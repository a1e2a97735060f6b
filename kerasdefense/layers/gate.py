"""Gated features: one half of the channels says how much of the other half passes."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from kerasdefense.types import look_up

_ACTIVATIONS = {"elu": tf.nn.elu, "relu": tf.nn.relu}


@keras.saving.register_keras_serializable(package="kerasdefense")
class Gate(keras.layers.Layer):
    """Return `activation(a) * sigmoid(b)`, [..., c], of the two halves `a`, `b` of the channels [..., 2 c].

    A convolution before it thus learns which places to look at, such as those that are not missing.

    Args:
        activation: "elu" or "relu".

    Source: Yu et al. 2019, "Free-form image inpainting with gated convolution", section 3.1. Deviations: none.
    """

    def __init__(self, activation: str = "elu", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        look_up(_ACTIVATIONS, activation, "activation of a gate")
        self.activation = activation

    def call(self, tensor: tf.Tensor) -> tf.Tensor:
        """Return float [..., c] of `tensor` [..., 2 c]."""
        features, gates = tf.split(tensor, 2, axis=-1)
        return _ACTIVATIONS[self.activation](features) * tf.sigmoid(gates)

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {**super().get_config(), "activation": self.activation}
