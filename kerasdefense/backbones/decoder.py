"""The decoder of open-set defense networks: from an embedding back to an image."""

from __future__ import annotations

from typing import NamedTuple

import keras

from kerasdefense.backbones import blocks
from kerasdefense.backbones.blocks import ImageShape
from kerasdefense.types import UsageError


class _Plan(NamedTuple):
    """The side at which a decoder starts, and its channels: at the start, then after each hidden stage."""

    side: int
    channels: tuple[int, ...]


_PAPER_WIDTH = 512
_PLANS = {
    8: _Plan(2, (256, 128)),
    28: _Plan(7, (256, 128)),
    32: _Plan(2, (512, 512, 256, 128)),
    64: _Plan(2, (512, 512, 256, 128, 128)),
}


def decoder(latent: int, image_shape: ImageShape, *, width: int = _PAPER_WIDTH) -> keras.Model:
    """Return the model from `latent` [batch, latent] to an image [batch, height, width, channels] in [-1, 1].

    A dense layer without bias gives 2 x 2 pixels of `width` channels. Each stage is a transposed convolution of
    kernel 4, stride 2, which doubles the side; hidden ones have no bias and end in batch normalisation and LeakyReLU
    0.2, the last has a bias and ends in tanh, in float32 under any precision. The image it stands for is
    `(output + 1) / 2`. Channels, at width 512:

        32 x 32: dense 512 -> 512 -> 256 -> 128 -> image
        64 x 64: dense 512 -> 512 -> 256 -> 128 -> 128 -> image
         8 x  8: dense 256 -> 128 -> image
        28 x 28: dense 256 -> 128 -> image, from 7 x 7 pixels

    Args:
        latent: size of the embedding, at least 1.
        image_shape: height, width and channels of the images; 8x8, 28x28, 32x32 or 64x64 pixels.
        width: the widest stage of the 32x32 decoder, at least 1; the others in proportion, at least one channel each.

    Raises:
        UsageError: if the images have another size.

    Source: the decoder of the code released with OSDN-CAML (Shao, Perera, Yuen & Patel 2022). Deviations: 8x8 and
        28x28, of which the authors have none, take the last two stages of 32x32.
    """
    _check(latent, image_shape, width)
    side, paper_channels = _PLANS[image_shape[0]]
    first, *hidden = [max(1, width * each // _PAPER_WIDTH) for each in paper_channels]
    code = keras.Input((latent,), dtype="float32", name="latent")
    dense = keras.layers.Dense(side * side * first, use_bias=False, kernel_initializer="he_normal", name="dense")
    tensor = keras.layers.Reshape((side, side, first), name="reshape")(dense(code))
    for number, filters in enumerate(hidden, start=1):
        tensor = _doubling(filters, use_bias=False, name=f"stage{number}_conv")(tensor)
        tensor = blocks.batch_normalisation(tensor, name=f"stage{number}_bn")
        tensor = keras.layers.LeakyReLU(0.2, name=f"stage{number}_relu")(tensor)
    image = _doubling(image_shape[-1], activation="tanh", dtype="float32", name="image")(tensor)
    return keras.Model(code, image, name="decoder")


def _check(latent: int, image_shape: ImageShape, width: int) -> None:
    if len(image_shape) != 3 or image_shape[0] not in _PLANS or image_shape[0] != image_shape[1] or image_shape[2] < 1:
        sizes = ", ".join(f"{side}x{side}" for side in _PLANS)
        raise UsageError(f"the decoder draws images of {sizes} pixels and 1 or more channels, not {tuple(image_shape)}")
    if latent < 1 or width < 1:
        raise UsageError(f"latent and width of the decoder must be at least 1, not {latent} and {width}")


def _doubling(filters: int, **kwargs: object) -> keras.layers.Layer:
    """Return a transposed convolution that doubles the side.

    Its kernel starts as Keras' own: he_normal would count the outputs as inputs and begin with tanh saturated.
    """
    return keras.layers.Conv2DTranspose(filters, 4, strides=2, padding="same", **kwargs)
