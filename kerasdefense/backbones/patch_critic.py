"""The patch critic: a spectrally normalised network that judges each place of an image, and where it was restored."""

from __future__ import annotations

import keras

from kerasdefense.backbones.blocks import ImageShape, Tensor
from kerasdefense.layers import SpectralConv2D
from kerasdefense.types import UsageError

_MULTIPLES = (1, 2, 4, 4, 4, 4)
"""Channels as multiples of the width; each layer halves the side."""
_SMALLEST = 8


def patch_critic(image_shape: ImageShape, *, width: int = 64) -> keras.Model:
    """Return a critic from an image, and where it was restored, to judgements, high where the image looks true.

    5x5 convolutions with stride 2, divided by their spectral norm, of `width, 2 width` and then `4 width` channels,
    with LeakyReLU after each: as many as leave a side of at least 2, at most six. Images of 8x8 pixels get two, of
    32x32 four, of 64x64 five, and from 65x65 on six. The outputs of the last one are the judgements.

    Args:
        image_shape: (height, width, channels), the sides at least 8; those that cannot be halved are rounded up.
        width: channels of the first layer, 64 in the paper, at least 1.

    Returns:
        Model from `[image, mask]`, float32 [batch, h, w, c] in [0, 1] and [batch, h, w, 1], 1 where the image was
        restored, to float32 [batch, places].

    Raises:
        UsageError: a width below 1, or an image too small.

    Source: Yu et al. 2019, "Free-form image inpainting with gated convolution", section 3.3 (SN-PatchGAN), as in the
    code released with AToP (Lin et al. 2024). Deviations: theirs always has six layers, for 256x256 images, which on
    64x64 or less would leave one place.
    """
    if width < 1:
        raise UsageError(f"the width of a critic must be at least 1, not {width}")
    if len(image_shape) != 3 or None in image_shape or min(image_shape[:2]) < _SMALLEST or image_shape[-1] < 1:
        raise UsageError(
            f"image_shape must be (height, width, channels), with sides of at least {_SMALLEST} pixels for a patch "
            f"critic, not {tuple(image_shape)}"
        )
    image = keras.Input(image_shape, dtype="float32", name="image")
    mask = keras.Input((*image_shape[:2], 1), dtype="float32", name="mask")
    scaled = keras.layers.Rescaling(2.0, -1.0, name="scaled")(image)
    tensor = keras.layers.Concatenate(name="both")([scaled, mask])
    for number, multiple in enumerate(_MULTIPLES[: _layers(min(image_shape[:2]))], start=1):
        tensor = _halved(tensor, multiple * width, name=f"layer{number}")
    judgements = keras.layers.Flatten(dtype="float32", name="judgements")(tensor)
    return keras.Model([image, mask], judgements, name="patch_critic")


def _layers(side: int) -> int:
    """Return how often a side can be halved, rounded up, and stay at least 2; at most six times."""
    count = 0
    while side > 2 and count < len(_MULTIPLES):
        side, count = (side + 1) // 2, count + 1
    return count


def _halved(tensor: Tensor, filters: int, *, name: str) -> Tensor:
    tensor = keras.layers.ZeroPadding2D(2, name=f"{name}_padding")(tensor)
    uniform = keras.initializers.VarianceScaling(2.0, mode="fan_out", distribution="uniform")
    layer = SpectralConv2D(filters, 5, strides=2, kernel_initializer=uniform, name=f"{name}_conv")
    return keras.layers.LeakyReLU(0.2, name=f"{name}_relu")(layer(tensor))
