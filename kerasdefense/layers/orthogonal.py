"""A classifier that is never trained: one orthonormal axis per class."""

from __future__ import annotations

from typing import Any, Optional

import keras
import tensorflow as tf

from kerasdefense.types import UsageError

_TINY = 1e-12


@keras.saving.register_keras_serializable(package="kerasdefense")
class OrthogonalHead(keras.layers.Layer):
    """Frozen orthonormal axes: the logits are the absolute cosines of the embedding with them.

    `logits = |direction(embedding) @ kernel|`, where `direction` divides by the length and the columns of `kernel` are
    orthonormal. So each logit is in [0, gain], the sum of their squares at most gain^2, and neither the embedding's
    length nor its sign counts: a class is a line through the origin. An embedding of zero has logits of zero; in
    training it stops the step. The layer computes in float32, in whatever precision the rest does.

    Args:
        classes: number of classes, at least 2; no more than the embedding has dimensions.
        gain: length of the axes, above 0.
        use_abs: whether logits are absolute; otherwise they are the signed cosines.
        seed: of the axes; None = drawn from Keras' global generator.

    Source: the code released with DFA (Liu et al. 2022). Deviations: none.
    """

    def __init__(
        self, classes: int, *, gain: float = 1.0, use_abs: bool = True, seed: Optional[int] = None, **kwargs: Any
    ) -> None:
        super().__init__(**{"dtype": "float32", "name": "logits", **kwargs})
        if classes < 2:
            raise UsageError(f"a classifier needs at least 2 classes, not {classes}")
        if not gain > 0:
            raise UsageError(f"gain must be above 0, not {gain}")
        self.classes, self.gain, self.use_abs, self.seed = classes, gain, use_abs, seed

    def build(self, input_shape: tf.TensorShape) -> None:
        """Draw the axes."""
        dimensions = input_shape[-1]
        if dimensions < self.classes:
            raise UsageError(
                f"an orthogonal head has an axis for each of {self.classes} classes, but the embedding has only "
                f"{dimensions} dimensions; use a wider backbone"
            )
        self.kernel = self.add_weight(
            name="kernel",
            shape=[dimensions, self.classes],
            initializer=keras.initializers.Orthogonal(gain=self.gain, seed=self.seed),
            trainable=False,
        )
        super().build(input_shape)

    def call(self, embedding: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Return logits [batch, classes] of `embedding` [batch, d].

        In training an embedding of zero stops the step: it has no direction, and nothing would be learnt of it.
        """
        direction = self.direction(embedding)
        if training:
            is_zero = tf.reduce_any(tf.reduce_all(tf.equal(direction, 0), axis=-1))
            message = "the embedding of a training image is zero, which has no direction; lower --train_learning_rate"
            with tf.control_dependencies(filter(None, [tf.debugging.Assert(~is_zero, [message])])):
                direction = tf.identity(direction)
        return self.logits_of(direction)

    def direction(self, embedding: tf.Tensor) -> tf.Tensor:
        """Return `embedding` [batch, d] at length 1 in float32; zeros stay."""
        return tf.math.l2_normalize(tf.cast(embedding, tf.float32), axis=-1, epsilon=_TINY)

    def signed_scores(self, direction: tf.Tensor) -> tf.Tensor:
        """Return what `direction` [batch, d] projects to on each axis, [batch, classes], the sign kept."""
        return tf.matmul(direction, self.kernel)

    def logits_of(self, direction: tf.Tensor) -> tf.Tensor:
        """Return the logits [batch, classes] of embeddings that were divided by their length, or mixed of such."""
        scores = self.signed_scores(direction)
        return tf.abs(scores) if self.use_abs else scores

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        own = {name: getattr(self, name) for name in ("classes", "gain", "use_abs", "seed")}
        return {**super().get_config(), **own}
