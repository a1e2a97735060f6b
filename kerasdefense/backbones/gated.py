"""A small gated U-Net that restores images with missing blocks, and what such purifiers share."""

from __future__ import annotations

import keras

from kerasdefense.backbones import blocks
from kerasdefense.backbones.blocks import ImageShape, Tensor
from kerasdefense.layers import Gate
from kerasdefense.types import UsageError

_SCALE_OF_GATES = 5.3
"""One over the mean of (ELU(a) sigmoid(b))^2, a and b drawn from N(0, 1)."""


def gated_unet(image_shape: ImageShape, *, width: int = 20) -> keras.Model:
    """Return a U-Net of gated convolutions from an image with missing blocks, and where they are, to a whole image.

    All features are at half the image's size, `width` channels, and at a quarter of it, `2 width`: a 5x5 convolution
    with stride 2 and a 3x3 one; the same again, both 3x3; on the way up one of what is below, resized to the nearest,
    to which what passed down there is added, and one of the sum. A transposed 4x4 convolution with stride 2 and a
    sigmoid make the image.

    Args:
        image_shape: (height, width, channels) of any size; sides that cannot be halved are rounded up.
        width: channels at half the image's size, at least 1.

    Returns:
        Model as `begin` and `end` describe it.

    Raises:
        UsageError: an illegal width or shape.

    Source: none; gates as in Yu et al. 2019, "Free-form image inpainting with gated convolution". Deviations: does not
    apply.
    """
    if width < 1:
        raise UsageError(f"the width of a purifier must be at least 1, not {width}")
    inputs, tensor = begin(image_shape)
    half = gated(gated(tensor, width, 5, stride=2, name="down1_1"), width, name="down1_2")
    low = gated(gated(half, 2 * width, stride=2, name="down2_1"), 2 * width, name="down2_2")
    up = gated(resized(low, half, name="up_resize"), width, name="up_1")
    up = gated(keras.layers.Add(name="up_sum")([up, half]), width, name="up_2")
    last = keras.layers.Conv2DTranspose(image_shape[-1], 4, strides=2, padding="same", name="restored_conv")(up)
    rows, columns = (made - side for made, side in zip(last.shape[1:3], image_shape))
    if rows or columns:
        last = keras.layers.Cropping2D(((0, rows), (0, columns)), name="restored_crop")(last)
    restored = keras.layers.Activation("sigmoid", dtype="float32", name="restored")(last)
    return end(inputs, restored, restored, name="gated_unet")


def begin(image_shape: ImageShape) -> tuple[list[Tensor], Tensor]:
    """Return the inputs of a purifier, and image and mask as one tensor in [-1, 1].

    The inputs are `image` float32 [batch, h, w, c] in [0, 1], with missing blocks, and `mask` [batch, h, w, 1], 1 where
    those are. The tensor holds, besides, one channel of ones, by which a convolution sees where the image ends.
    """
    if len(image_shape) != 3 or None in image_shape or min(image_shape) < 1:
        raise UsageError(f"image_shape must be (height, width, channels), each at least 1, not {tuple(image_shape)}")
    image = keras.Input(image_shape, dtype="float32", name="image")
    mask = keras.Input((*image_shape[:2], 1), dtype="float32", name="mask")
    scaled = keras.layers.Rescaling(2.0, -1.0, name="scaled")(image)
    ones = keras.layers.Rescaling(0.0, 1.0, name="ones")(mask)
    return [image, mask], keras.layers.Concatenate(name="both")([scaled, ones, mask])


def end(inputs: list[Tensor], coarse: Tensor, refined: Tensor, *, name: str) -> keras.Model:
    """Return the purifier from `[image, mask]` to `coarse` and `refined`, whole images [batch, h, w, c] in [0, 1].

    Those of a purifier of one stage are the same.
    """
    return keras.Model(inputs, {"coarse": coarse, "refined": refined}, name=name)


def gated(
    tensor: Tensor,
    filters: int,
    kernel_size: int = 3,
    *,
    stride: int = 1,
    name: str,
    dilation: int = 1,
    activation: str = "elu",
    keeps_scale: bool = False,
) -> Tensor:
    """Convolve with bias, and gate.

    Kernels are drawn he_uniform by the number of outputs, by which features lose more than half of their scale in each
    gate; or, where `keeps_scale`, by the number of inputs, so that normal features keep it through many of them.
    """
    scale, mode = (_SCALE_OF_GATES, "fan_in") if keeps_scale else (2.0, "fan_out")
    uniform = keras.initializers.VarianceScaling(scale, mode=mode, distribution="uniform")
    settings = {"use_bias": True, "kernel_initializer": uniform, "dilation_rate": dilation}
    tensor = blocks.convolution(tensor, 2 * filters, kernel_size, stride=stride, name=f"{name}_conv", **settings)
    return Gate(activation, name=f"{name}_gate")(tensor)


def head(tensor: Tensor, channels: int, *, name: str) -> Tensor:
    """Return an image in [0, 1], float32, by a 3x3 convolution and a sigmoid, which is tanh in [-1, 1]."""
    layer = keras.layers.Conv2D(channels, 3, padding="same", activation="sigmoid", dtype="float32", name=name)
    return layer(tensor)


def resized(tensor: Tensor, like: Tensor, *, name: str) -> Tensor:
    """Return features resized to the nearest, to the size of others."""
    return keras.layers.Resizing(*like.shape[1:3], interpolation="nearest", name=name)(tensor)
