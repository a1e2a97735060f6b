"""The residual U-Net that undoes a perturbation, and the purifier that it makes."""

from __future__ import annotations

import keras

from kerasdefense.backbones import blocks
from kerasdefense.backbones.blocks import ImageShape, Tensor
from kerasdefense.types import UsageError

_ENCODER = ((1, 2), (2, 3), (4, 3), (4, 3), (4, 3))
"""Channels as multiples of the width, and units, of each stage; all but the first halve the side."""
_DECODER = ((4, 3), (4, 3), (2, 3), (1, 2))


def residual_unet(
    image_shape: ImageShape, *, width: int = 64, legacy_stride: bool = False, l2: float = 0.0
) -> keras.Model:
    """Return a U-Net from an image to what is to be added to it, which is zero until it is trained.

    Five stages down, of `width, 2 width, 4 width, 4 width, 4 width` channels, and four up; on the way up a stage takes
    the one below, resized bilinearly, beside that of its own size on the way down. A unit is a 3x3 convolution with
    bias, batch normalisation and ReLU.

    Args:
        image_shape: (height, width, channels) of any size; sides that cannot be halved are rounded up.
        width: channels of the first stage, 64 in the paper.
        legacy_stride: whether the first unit of the stages up, but the last, halves the side too, as in the authors'
            code, so that the next one is enlarged fourfold.
        l2: factor of the squared kernels in the loss, half of what PyTorch calls weight decay; 0 = none.

    Returns:
        Model from float32 [batch, h, w, c] in [0, 1] to float32 of that shape.

    Raises:
        UsageError: a width below 1, or an illegal shape.

    Source: the code released with CAFD (Zhou et al. 2021), after the denoiser of Liao et al. 2018 (HGD). Deviations:
    without `legacy_stride` no stage up halves the side, as in HGD; the running statistics of batch normalisation keep
    0.9 of themselves at a step, theirs 0.1; the last convolution starts at zero; kernels start he_normal.
    """
    if width < 1:
        raise UsageError(f"the width of a denoiser must be at least 1, not {width}")
    if len(image_shape) != 3 or None in image_shape or min(image_shape) < 1:
        raise UsageError(f"image_shape must be (height, width, channels), each at least 1, not {tuple(image_shape)}")
    regulariser = keras.regularizers.L2(l2) if l2 else None
    image = keras.Input(image_shape, dtype="float32", name="image")
    tensor, skips = image, []
    for number, (multiple, units) in enumerate(_ENCODER, start=1):
        tensor = _stage(tensor, multiple * width, units, regulariser, halves=number > 1, name=f"down{number}")
        skips.append(tensor)
    for number, ((multiple, units), skip) in enumerate(zip(_DECODER, reversed(skips[:-1])), start=1):
        name = f"up{number}"
        tensor = keras.layers.Resizing(*skip.shape[1:3], interpolation="bilinear", name=f"{name}_resize")(tensor)
        tensor = keras.layers.Concatenate(name=f"{name}_concat")([tensor, skip])
        halves = legacy_stride and units == 3
        tensor = _stage(tensor, multiple * width, units, regulariser, halves=halves, name=name)
    last = keras.layers.Conv2D(
        image_shape[-1],
        1,
        kernel_initializer="zeros",
        kernel_regularizer=regulariser,
        dtype="float32",
        name="residual",
    )
    return keras.Model(image, last(tensor), name="denoiser")


def purifier(denoiser: keras.Model) -> keras.Model:
    """Return the model `clip(image + denoiser(image))` from images to images in [0, 1], of Keras' own layers."""
    image = keras.Input(denoiser.input_shape[1:], dtype="float32", name="image")
    whole = keras.layers.Add(dtype="float32", name="sum")([image, denoiser(image)])
    clipped = keras.layers.ReLU(max_value=1.0, dtype="float32", name="clip")(whole)
    return keras.Model(image, clipped, name="purifier")


def _stage(tensor: Tensor, filters: int, units: int, regulariser: object, *, halves: bool, name: str) -> Tensor:
    for unit in range(1, units + 1):
        stride = 2 if halves and unit == 1 else 1
        settings = {"use_bias": True, "kernel_regularizer": regulariser}
        tensor = blocks.convolution(tensor, filters, 3, stride=stride, name=f"{name}_{unit}_conv", **settings)
        tensor = blocks.batch_normalisation(tensor, name=f"{name}_{unit}_bn")
        tensor = blocks.relu(tensor, name=f"{name}_{unit}_relu")
    return tensor
