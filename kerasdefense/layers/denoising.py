"""Denoising blocks of open-set defense networks: two attention gates, or attention over positions."""

from __future__ import annotations

from typing import Any, Optional

import keras
import tensorflow as tf

from kerasdefense.types import UsageError


@keras.saving.register_keras_serializable(package="kerasdefense")
class DualAttention(keras.layers.Layer):
    """Scale features first by channel, then by position, and add them to the input.

    With C channels, `r = max(1, C // reduction)` and one MLP `C -> r -> ReLU -> C` for both pooled vectors,

        U       = ReLU(BN(conv1x1(X)))
        channel = sigmoid(MLP(mean_hw U) + MLP(max_hw U))                     # [batch, C]
        V       = U * channel
        spatial = sigmoid(BN(conv7x7([max_c V, mean_c V])))                   # [batch, h, w, 1]
        output  = ReLU(X + V * spatial)                                       # [batch, h, w, C]

    Both gates, with what they are computed from, are in the type of the weights: under mixed precision float32,
    because half precision has too few digits for a mean over many positions.

    Args:
        reduction: how many times narrower the MLP is in its middle, at least 1. Thin networks, with C below
            `reduction`, keep a middle of one.

    Source: the block of the code released with OSDN-CAML (Shao, Perera, Yuen & Patel 2022), a CBAM unit (Woo et al.
        2018) behind a 1x1 convolution. Deviations: convolutions start he_normal, not N(0, 0.02).
    """

    def __init__(self, reduction: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if reduction < 1:
            raise UsageError(f"the reduction of DualAttention must be at least 1, not {reduction}")
        self.reduction = reduction

    def build(self, input_shape: tf.TensorShape) -> None:
        """Make the layers for the channels of the input."""
        channels, gate = _feature_map(self, input_shape)[-1], self.variable_dtype
        self.convolution = _convolution(channels, 1, name="conv", dtype=self.dtype_policy, use_bias=False)
        self.normalisation = _batch_normalisation(name="bn", dtype=self.dtype_policy)
        self.squeeze = keras.layers.Dense(
            max(1, channels // self.reduction), activation="relu", name="squeeze", dtype=gate
        )
        self.expand = keras.layers.Dense(channels, name="expand", dtype=gate)
        self.spatial_convolution = _convolution(1, 7, name="spatial_conv", dtype=gate, use_bias=False)
        self.spatial_normalisation = _batch_normalisation(name="spatial_bn", dtype=gate, momentum=0.99)
        super().build(input_shape)

    def call(self, inputs: tf.Tensor, training: Optional[bool] = None) -> tf.Tensor:
        """Return [batch, h, w, C], at least 0, of `inputs` [batch, h, w, C]."""
        gated = self._gated(inputs, training)[-1]
        return tf.nn.relu(inputs + gated)

    def gates(self, inputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return a built layer's gates in inference, in (0, 1): channel [batch, C] and spatial [batch, h, w, 1]."""
        channel, spatial, _ = self._gated(tf.cast(inputs, self.compute_dtype), False)
        return channel, spatial

    def _gated(self, inputs: tf.Tensor, training: Optional[bool]) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Return both gates and the gated features [batch, h, w, C]."""
        features = tf.nn.relu(self.normalisation(self.convolution(inputs), training=training))
        features = tf.cast(features, self.variable_dtype)
        positions = tf.reshape(features, [tf.shape(features)[0], -1, features.shape[-1]])
        pooled = tf.stack([tf.reduce_mean(positions, axis=1), _largest(positions, axis=1)], axis=1)
        channel = tf.sigmoid(tf.reduce_sum(self.expand(self.squeeze(pooled)), axis=1))
        features *= channel[:, None, None]
        pooled = tf.stack([_largest(features, axis=-1), tf.reduce_mean(features, axis=-1)], axis=-1)
        spatial = self.spatial_convolution(pooled)
        spatial = tf.sigmoid(self.spatial_normalisation(spatial, training=training))
        return channel, spatial, tf.cast(features * spatial, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {**super().get_config(), "reduction": self.reduction}


@keras.saving.register_keras_serializable(package="kerasdefense")
class NonLocal(keras.layers.Layer):
    """Add to every position an average of features over all positions, weighted by how alike they are.

    With `theta`, `phi`, `g` 1x1 convolutions with bias to `max(1, C // 2)` channels, and i, j over positions,

        attention = softmax_j(theta(x_i) . phi(x_j))                          # [batch, N, M]
        output    = X + BN(conv1x1(attention g(X)))                           # [batch, h, w, C]

    The scale of the batch normalisation starts at 0, so that the layer starts as the identity. The attention is in
    the type of the weights, under mixed precision float32: its unscaled products overflow float16.

    Args:
        max_positions: `phi` and `g` see the input average-pooled by 2 as often as it takes to leave at most so many
            positions M, at least 1; otherwise M = N = h w. Memory grows with N M: 4 MB per float32 image of 32 x 32.

    Source: the block of the code released with OSDN (Shao, Perera, Yuen & Patel 2020), the embedded Gaussian of Wang
        et al. 2018, section 3.2. Deviations: the pooling, which the authors' code lacks. It comes before the 1x1
        convolutions: they give the same values after it, with less work. `g` and the last convolution start he_normal.
    """

    def __init__(self, max_positions: int = 1024, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if max_positions < 1:
            raise UsageError(f"max_positions of NonLocal must be at least 1, not {max_positions}")
        self.max_positions = max_positions

    def build(self, input_shape: tf.TensorShape) -> None:
        """Make the layers for the channels of the input."""
        height, width, channels = _feature_map(self, input_shape)
        if height is None or width is None:
            raise UsageError(f"layer {self.name!r} needs images of a fixed size, not {tuple(input_shape)}")
        half, policy = max(1, channels // 2), self.dtype_policy
        self.theta = _convolution(half, 1, name="theta", dtype=policy, kernel_initializer=_small())
        self.phi = _convolution(half, 1, name="phi", dtype=policy, kernel_initializer=_small())
        self.g = _convolution(half, 1, name="g", dtype=policy)
        self.projection = _convolution(channels, 1, name="projection", dtype=policy)
        self.normalisation = _batch_normalisation(name="bn", dtype=policy, gamma_initializer="zeros")
        super().build(input_shape)

    def call(self, inputs: tf.Tensor, training: Optional[bool] = None) -> tf.Tensor:
        """Return [batch, h, w, C] of `inputs` [batch, h, w, C]."""
        pooled = self._pooled(inputs)
        values = _rows(self.g(pooled))
        average = tf.matmul(tf.cast(self._attention(inputs, pooled), values.dtype), values)
        average = tf.reshape(average, [-1, *inputs.shape[1:3], values.shape[-1]])
        return inputs + self.normalisation(self.projection(average), training=training)

    def attention(self, inputs: tf.Tensor) -> tf.Tensor:
        """Return the weights of a built layer, [batch, N, M]; each row sums to 1."""
        inputs = tf.cast(inputs, self.compute_dtype)
        return self._attention(inputs, self._pooled(inputs))

    def _attention(self, inputs: tf.Tensor, pooled: tf.Tensor) -> tf.Tensor:
        theta = tf.cast(_rows(self.theta(inputs)), self.variable_dtype)
        phi = tf.cast(_rows(self.phi(pooled)), self.variable_dtype)
        return tf.nn.softmax(tf.matmul(theta, phi, transpose_b=True))

    def _pooled(self, inputs: tf.Tensor) -> tf.Tensor:
        """Return the inputs, halved in height and width (rounded up) until they have at most `max_positions`."""
        while inputs.shape[1] * inputs.shape[2] > self.max_positions:
            inputs = tf.nn.avg_pool2d(inputs, ksize=2, strides=2, padding="SAME")
        return inputs

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {**super().get_config(), "max_positions": self.max_positions}


DENOISERS: dict[str, type[keras.layers.Layer]] = {"cbam": DualAttention, "nonlocal": NonLocal}


def _feature_map(layer: keras.layers.Layer, input_shape: tf.TensorShape) -> tuple[Optional[int], Optional[int], int]:
    """Return height, width and channels, of which only the channels must be known."""
    shape = tuple(input_shape)
    if len(shape) != 4 or shape[-1] is None:
        raise UsageError(f"layer {layer.name!r} takes (batch, height, width, channels), not {shape}")
    return shape[1], shape[2], shape[3]


def _convolution(filters: int, kernel_size: int, **kwargs: Any) -> keras.layers.Layer:
    kwargs = {"padding": "same", "kernel_initializer": "he_normal", **kwargs}
    return keras.layers.Conv2D(filters, kernel_size, **kwargs)


def _batch_normalisation(*, momentum: float = 0.9, **kwargs: Any) -> keras.layers.Layer:
    """Return the batch normalisation of the backbones: over all replicas where there are several."""
    synchronized = tf.distribute.get_strategy().num_replicas_in_sync > 1
    return keras.layers.BatchNormalization(momentum=momentum, epsilon=1e-5, synchronized=synchronized, **kwargs)


def _largest(tensor: tf.Tensor, *, axis: int) -> tf.Tensor:
    """Return the maximum along an axis; its gradient goes to the first of the largest values.

    That of `tf.reduce_max` goes to all values equal to the maximum. XLA computes both sides of this comparison anew,
    may round them differently, and divides by the number of values that it found, none.
    """
    first = tf.one_hot(tf.argmax(tensor, axis=axis), tf.shape(tensor)[axis], axis=axis, dtype=tensor.dtype)
    return tf.reduce_sum(tensor * first, axis=axis)


def _small() -> keras.initializers.Initializer:
    """Return N(0, 0.01), a new one for every layer: Keras draws the same values twice from one."""
    return keras.initializers.RandomNormal(stddev=0.01)


def _rows(tensor: tf.Tensor) -> tf.Tensor:
    """Return [batch, h w, c] of [batch, h, w, c]."""
    return tf.reshape(tensor, [-1, tensor.shape[1] * tensor.shape[2], tensor.shape[3]])
