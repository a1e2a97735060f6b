"""A small gated U-Net that restores images with missing blocks, and what such purifiers share."""

from __future__ import annotations

import keras

from kerasdefense.backbones import blocks
from kerasdefense.backbones.blocks import ImageShape, Tensor
from kerasdefense.layers import Gate
from kerasdefense.types import UsageError


def gated_unet(image_shape: ImageShape, *, width: int = 24) -> keras.Model:
    """Return a U-Net of gated convolutions from an image with missing blocks, and where they are, to a whole image.

    Five levels' worth of 3x3 convolutions: `width // 3` channels at the image's size, `width` at half and `2 width` at
    a quarter of it, two convolutions each on the way down, and on the way up one of the level below, resized to the
    nearest, and added to what passed down there.

    Args:
        image_shape: (height, width, channels) of any size; sides that cannot be halved are rounded up.
        width: channels at half the image's size, at least 3.

    Returns:
        Model as `begin` and `end` describe it.

    Raises:
        UsageError: an illegal width or shape.

    Source: none; gates as in Yu et al. 2019, "Free-form image inpainting with gated convolution". Deviations: does not
    apply.
    """
    if width < 3:
        raise UsageError(f"the width of a purifier must be at least 3, not {width}")
    inputs, tensor = begin(image_shape)
    full = gated(tensor, width // 3, name="down1_1")
    half = gated(gated(full, width, stride=2, name="down2_1"), width, name="down2_2")
    low = gated(gated(half, 2 * width, stride=2, name="down3_1"), 2 * width, name="down3_2")
    half = _up(low, half, width, name="up2")
    full = _up(half, full, width // 3, name="up1")
    restored = head(full, image_shape[-1], name="restored")
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
    tensor: Tensor, filters: int, kernel_size: int = 3, *, stride: int = 1, name: str, dilation: int = 1
) -> Tensor:
    """Convolve with bias, from kernels drawn he_uniform by the number of outputs, and gate."""
    uniform = keras.initializers.VarianceScaling(2.0, mode="fan_out", distribution="uniform")
    settings = {"use_bias": True, "kernel_initializer": uniform, "dilation_rate": dilation}
    tensor = blocks.convolution(tensor, 2 * filters, kernel_size, stride=stride, name=f"{name}_conv", **settings)
    return Gate(name=f"{name}_gate")(tensor)


def head(tensor: Tensor, channels: int, *, name: str) -> Tensor:
    """Return an image in [0, 1], float32, by a 3x3 convolution and a sigmoid, which is tanh in [-1, 1]."""
    layer = keras.layers.Conv2D(channels, 3, padding="same", activation="sigmoid", dtype="float32", name=name)
    return layer(tensor)


def resized(tensor: Tensor, like: Tensor, *, name: str) -> Tensor:
    """Return features resized to the nearest, to the size of others."""
    return keras.layers.Resizing(*like.shape[1:3], interpolation="nearest", name=name)(tensor)


def _up(tensor: Tensor, skip: Tensor, filters: int, *, name: str) -> Tensor:
    tensor = gated(resized(tensor, skip, name=f"{name}_resize"), filters, name=name)
    return keras.layers.Add(name=f"{name}_sum")([tensor, skip])
