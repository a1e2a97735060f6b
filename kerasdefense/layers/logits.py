"""The logits of a dense layer that ends in an activation."""

from __future__ import annotations

from typing import Any, Optional

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable(package="kerasdefense")
class Logits(keras.layers.Layer):
    """Apply a dense layer without its activation: logits where the layer gives probabilities.

    `embedding @ kernel + bias` with the kernel and bias of `dense`, shared, and its regularisation in force.

    Args:
        dense: the layer; it is left as it is.
    """

    def __init__(self, dense: keras.layers.Dense, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dense = dense

    @property
    def kernel(self) -> tf.Variable:
        """The weights [d, classes]."""
        return self.dense.kernel

    @property
    def bias(self) -> Optional[tf.Variable]:
        """The offsets [classes], or None."""
        return self.dense.bias

    def build(self, input_shape: tf.TensorShape) -> None:
        """Build `dense` unless it has weights already."""
        if not self.dense.built:
            self.dense.build(input_shape)
        super().build(input_shape)

    def call(self, embedding: tf.Tensor) -> tf.Tensor:
        """Return logits [batch, classes] of `embedding` [batch, d]."""
        logits = tf.matmul(embedding, self.kernel)
        return logits if self.bias is None else tf.nn.bias_add(logits, self.bias)

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {**super().get_config(), "dense": keras.saving.serialize_keras_object(self.dense)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Logits:
        """Build the layer, with fresh weights, from `get_config()`."""
        return cls(**{**config, "dense": keras.saving.deserialize_keras_object(config["dense"])})
