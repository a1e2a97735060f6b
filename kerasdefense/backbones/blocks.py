"""What the backbones share: how they begin, convolve, normalise and end."""

from __future__ import annotations

from typing import Any, Optional

import keras
import tensorflow as tf

from kerasdefense.types import UsageError

ImageShape = tuple[int, int, int]
"""Height, width, channels."""

Tensor = Any
"""A symbolic tensor of a functional model, [batch, ...]; Keras 2 does not export its type."""


def start(image_shape: ImageShape, width: int, normalisation: Optional[keras.layers.Layer]) -> tuple[Tensor, Tensor]:
    """Return the input `image`, and the image normalised.

    Args:
        image_shape: height, width and channels.
        width: width of the backbone, at least 1.
        normalisation: layer from [0, 1] to the network's range; None = `(image - 0.5) / 0.25` in every
            channel, close enough to any set of natural images and the same for all of them.
    """
    if width < 1:
        raise UsageError(f"the width of a backbone must be at least 1, not {width}")
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise UsageError(f"image_shape must be (height, width, channels), each at least 1, not {tuple(image_shape)}")
    image = keras.Input(image_shape, dtype="float32", name="image")
    if normalisation is None:
        channels = image_shape[-1]
        normalisation = keras.layers.Normalization(
            mean=[0.5] * channels, variance=[0.25**2] * channels, name="normalisation"
        )
    return image, normalisation(image)


def finish(image: Tensor, feature_map: Tensor, classes: int, *, name: str) -> keras.Model:
    """Return the model from `image` to `feature_map`, its mean `embedding`, and `logits` in float32."""
    if classes < 2:
        raise UsageError(f"a classifier needs at least 2 classes, not {classes}")
    embedding = keras.layers.GlobalAveragePooling2D(name="embedding")(feature_map)
    dense = keras.layers.Dense(classes, kernel_initializer="he_normal", dtype="float32", name="logits")
    outputs = {"feature_map": feature_map, "embedding": embedding, "logits": dense(embedding)}
    return keras.Model(image, outputs, name=name)


def convolution(
    tensor: Tensor, filters: int, kernel_size: int, *, stride: int = 1, name: str, **settings: Any
) -> Tensor:
    """Convolve, without bias unless `settings` of the layer say otherwise.

    Output pixel i is centred on input pixel `stride * i`: with a stride, "same" padding would centre a kernel of 3 on
    the odd pixels of an even side, and so off the pixels that a 1x1 shortcut of the same stride takes; the published
    networks pad every side, as here.
    """
    padding = "same"
    if stride > 1 and kernel_size > 1:
        tensor = keras.layers.ZeroPadding2D(kernel_size // 2, name=f"{name}_padding")(tensor)
        padding = "valid"
    layer = keras.layers.Conv2D(
        filters,
        kernel_size,
        strides=stride,
        padding=padding,
        name=name,
        **{"use_bias": False, "kernel_initializer": "he_normal", **settings},
    )
    return layer(tensor)


def biased_convolution(tensor: Tensor, filters: int, kernel_size: int, *, stride: int = 1, name: str) -> Tensor:
    """Convolve with bias, from kernels drawn by the number of outputs, N(0, sqrt(2 / (kernel_size^2 filters)))."""
    normal = keras.initializers.VarianceScaling(2.0, mode="fan_out", distribution="untruncated_normal")
    return convolution(tensor, filters, kernel_size, stride=stride, name=name, use_bias=True, kernel_initializer=normal)


def batch_normalisation(tensor: Tensor, *, name: str) -> Tensor:
    """Normalise by the statistics of the batch, over all replicas where there are several."""
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    layer = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5, synchronized=replicas > 1, name=name)
    return layer(tensor)


def synchronize_alike(copy: keras.Model, model: keras.Model) -> None:
    """Synchronize each batch normalisation of a copy over replicas where that of its name is.

    Keras leaves this out of a layer's configuration, and so out of copies made by it.
    """

    def normalisations(of: keras.Model) -> list[Any]:
        return [each for each in of.submodules if isinstance(each, keras.layers.BatchNormalization)]

    names = {layer.name for layer in normalisations(model) if layer.synchronized}
    for layer in normalisations(copy):
        if layer.name in names:
            layer.synchronized, layer.fused = True, False


def normalised_convolution(tensor: Tensor, filters: int, kernel_size: int, *, stride: int = 1, name: str) -> Tensor:
    """Convolve, then normalise by batch; no activation."""
    tensor = convolution(tensor, filters, kernel_size, stride=stride, name=f"{name}_conv")
    return batch_normalisation(tensor, name=f"{name}_bn")


def relu(tensor: Tensor, *, name: str) -> Tensor:
    """Rectify."""
    return keras.layers.ReLU(name=name)(tensor)
