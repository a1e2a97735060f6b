"""The image critic of a generative adversarial network: a plain network that tells clean from denoised images."""

from __future__ import annotations

from typing import Optional

import keras

from kerasdefense.backbones import blocks
from kerasdefense.backbones.blocks import ImageShape, Tensor
from kerasdefense.types import UsageError

_STAGES = (1, 2, 4, 4)
"""Channels as multiples of the width; each stage halves the side."""
_HIDDEN = 100


def critic(image_shape: ImageShape, *, width: int = 32, l2: float = 0.0) -> keras.Model:
    """Return a network in the style of VGG from an image to one logit, high where the image looks clean.

    A 3x3 and a 4x4 convolution, the second with stride 2, in each of four stages of `width, 2 width, 4 width, 4 width`
    channels, with batch normalisation but after the first, and LeakyReLU; then dense layers of 100 units and of one.

    Args:
        image_shape: (height, width, channels) of any size; sides that cannot be halved are rounded up.
        width: channels of the first stage, 32 in the authors' code.
        l2: factor of the squared kernels in the loss; 0 = none.

    Returns:
        Model from float32 [batch, h, w, c] in [0, 1] to float32 [batch, 1].

    Raises:
        UsageError: a width below 1.

    Source: the code released with CAFD (Zhou et al. 2021), after that of ESRGAN (Wang et al. 2018). Deviations: theirs
    takes 32x32 images only; kernels start he_normal.
    """
    if width < 1:
        raise UsageError(f"the width of a critic must be at least 1, not {width}")
    regulariser = keras.regularizers.L2(l2) if l2 else None
    image = keras.Input(image_shape, dtype="float32", name="image")
    tensor = image
    for number, multiple in enumerate(_STAGES, start=1):
        for size in (3, 4):
            is_first = (number, size) == (1, 3)
            tensor = _convolution(
                tensor, multiple * width, size, is_first, regulariser, name=f"stage{number}_{size}x{size}"
            )
    tensor = keras.layers.Flatten(name="flat")(tensor)
    tensor = keras.layers.Dense(_HIDDEN, kernel_initializer="he_normal", kernel_regularizer=regulariser, name="hidden")(
        tensor
    )
    tensor = keras.layers.LeakyReLU(0.2, name="hidden_relu")(tensor)
    last = keras.layers.Dense(1, kernel_regularizer=regulariser, dtype="float32", name="critic_logit")
    return keras.Model(image, last(tensor), name="critic")


def _convolution(
    tensor: Tensor, filters: int, size: int, is_first: bool, regulariser: Optional[object], *, name: str
) -> Tensor:
    """Convolve, 4x4 with stride 2, and rectify; normalise by batch between the two, but in the first layer."""
    layer = keras.layers.Conv2D(
        filters,
        size,
        strides=1 if size == 3 else 2,
        padding="same",
        use_bias=is_first,
        kernel_initializer="he_normal",
        kernel_regularizer=regulariser,
        name=f"{name}_conv",
    )
    tensor = layer(tensor)
    if not is_first:
        tensor = blocks.batch_normalisation(tensor, name=f"{name}_bn")
    return keras.layers.LeakyReLU(0.2, name=f"{name}_relu")(tensor)
