"""A convolution whose kernel is divided by its spectral norm, which bounds how fast its output can change."""

from __future__ import annotations

from typing import Any, Optional

import keras
import tensorflow as tf

_TINY = 1e-12


@keras.saving.register_keras_serializable(package="kerasdefense")
class SpectralConv2D(keras.layers.Conv2D):
    """Convolve by `kernel / sigma`, with `sigma` the largest singular value of the kernel.

    The kernel is taken for a matrix W [kh kw c, filters]. A weight `u` [filters, 1], which is not trained, approximates
    the singular vector of that value:

    1. In training first one power iteration: `v = W u / |W u|`, then `u = W' v / |W' v|`.
    2. `sigma = v' W u`, with `v` of the present `u`; the gradient flows through W and neither through `u` nor `v`.

    The kernel that is stored stays as it is. `sigma` is computed in the type of the weights, in mixed precision
    float32. `u` starts at the same values in every layer of a size, and each replica turns its own, by equal kernels.

    Source: Miyato et al. 2018, "Spectral normalization for generative adversarial networks", section 2.1 and algorithm
    1. Deviations: `v` is computed anew instead of kept, so that training and inference divide by the same `sigma`.
    """

    def build(self, input_shape: tf.TensorShape) -> None:
        """Make the weights for the channels of the input."""
        super().build(input_shape)
        self.u = self.add_weight(
            name="u",
            shape=[self.filters, 1],
            initializer=keras.initializers.RandomNormal(stddev=1.0, seed=0),
            trainable=False,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )

    def add_weight(self, name: Optional[str] = None, **settings: Any) -> tf.Variable:
        """Make a weight, of which only the bias is read in the type that the layer computes in."""
        return super().add_weight(name, experimental_autocast=name == "bias", **settings)

    def call(self, inputs: tf.Tensor, training: Optional[bool] = None) -> tf.Tensor:
        """Return [batch, h, w, filters] of `inputs` [batch, h, w, c]; in training one power iteration comes before."""
        if training:
            self.u.assign(self._turned(_matrix(tf.stop_gradient(tf.convert_to_tensor(self.kernel)))))
        return super().call(inputs)

    def convolution_op(self, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """Return the convolution of `inputs` by the divided `kernel`."""
        return super().convolution_op(inputs, tf.cast(self.divided(kernel), inputs.dtype))

    def divided(self, kernel: tf.Tensor) -> tf.Tensor:
        """Return a kernel of the layer's shape divided by what the layer takes for its spectral norm."""
        kernel = tf.convert_to_tensor(kernel)
        u = tf.math.l2_normalize(tf.convert_to_tensor(self.u), epsilon=_TINY)
        matrix = _matrix(kernel)
        v = tf.math.l2_normalize(tf.matmul(tf.stop_gradient(matrix), u), epsilon=_TINY)
        sigma = tf.reduce_sum(v * tf.matmul(matrix, u))
        return kernel / tf.maximum(sigma, _TINY)

    def _turned(self, matrix: tf.Tensor) -> tf.Tensor:
        """Return `u` after one power iteration."""
        v = tf.math.l2_normalize(tf.matmul(matrix, self.u), epsilon=_TINY)
        return tf.math.l2_normalize(tf.matmul(matrix, v, transpose_a=True), epsilon=_TINY)


def _matrix(kernel: tf.Tensor) -> tf.Tensor:
    """Return [kh kw c, filters] of [kh, kw, c, filters]."""
    return tf.reshape(kernel, [-1, kernel.shape[-1]])
