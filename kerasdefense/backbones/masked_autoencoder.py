"""The masked autoencoder: a transformer on patches that restores images with missing blocks."""

from __future__ import annotations

import keras

from kerasdefense.backbones.blocks import ImageShape, Tensor
from kerasdefense.backbones.gated import begin, end
from kerasdefense.layers import MaskToken, Positions
from kerasdefense.types import UsageError

_HEAD = 64
"""Channels for each head of the attention."""


def masked_autoencoder(
    image_shape: ImageShape, *, width: int = 192, patch: int = 4, depth: int = 6, decoder_depth: int = 2
) -> keras.Model:
    """Return a vision transformer from an image with missing blocks, and where they are, to a whole image.

    Each patch, with the mask of its pixels, becomes a token; a learnt one takes its place in proportion to what is
    missing of it. A block is attention and an MLP four times as wide, each normalised before and added. Encoder and
    decoder learn positions each, and the last tokens become patches again.

    Args:
        image_shape: (height, width, channels); `patch` must divide height and width.
        width: channels of a token, at least 2. Attention has as many heads as divide it, one for 64 of them at most.
        patch: pixels along the side of a patch.
        depth: blocks of the encoder, at least 1.
        decoder_depth: blocks of the decoder, at least 1.

    Returns:
        Model as `gated.begin` and `gated.end` describe it.

    Raises:
        UsageError: an illegal width, depth or shape, or a patch that does not divide it.

    Source: Wu et al. 2023, "Denoising masked autoencoders help robust classification" (DMAE), after He et al. 2022,
    which AToP (Lin et al. 2024) takes as its second purifier. Deviations: patches that are missing pass through the
    encoder too, as the learnt token, because blocks may be smaller than a patch and images miss different numbers of
    them; positions are learnt, theirs are sines; the decoder is as wide as the encoder; tokens know which of their
    pixels are missing; there is no class token, and patches are pixels in [0, 1], not normalised each; the sizes are
    for small images, theirs are ViT-B/16.
    """
    _check_sizes(width, patch, depth, decoder_depth)
    inputs, tensor = begin(image_shape)
    height, across, channels = image_shape
    if height % patch or across % patch:
        raise UsageError(f"patches of {patch} pixels do not divide images of {height} x {across}")
    tensor = keras.layers.Conv2D(width, patch, strides=patch, name="patches")(tensor)
    share = keras.layers.AveragePooling2D(patch, name="missing_share")(inputs[1])
    tensor = MaskToken(name="mask_token")([tensor, share])
    grid = tensor.shape[1:]
    tensor = keras.layers.Reshape([grid[0] * grid[1], width], name="tokens")(tensor)
    tensor = _blocks(tensor, depth, name="encoder")
    tensor = keras.layers.Dense(width, name="decoder_input")(tensor)
    tensor = _blocks(tensor, decoder_depth, name="decoder")
    tensor = keras.layers.Reshape(grid, name="grid")(tensor)
    settings = {"activation": "sigmoid", "dtype": "float32", "name": "restored"}
    restored = keras.layers.Conv2DTranspose(channels, patch, strides=patch, **settings)(tensor)
    return end(inputs, restored, restored, name="masked_autoencoder")


def _check_sizes(width: int, patch: int, depth: int, decoder_depth: int) -> None:
    if width < 2:
        raise UsageError(f"the width of a masked autoencoder must be at least 2, not {width}")
    if patch < 1:
        raise UsageError(f"the size of a patch must be at least 1 pixel, not {patch}")
    if min(depth, decoder_depth) < 1:
        raise UsageError(f"encoder and decoder need at least 1 block each, not {depth} and {decoder_depth}")


def _blocks(tensor: Tensor, depth: int, *, name: str) -> Tensor:
    """Add positions, and apply blocks and a last normalisation."""
    tensor = Positions(name=f"{name}_positions")(tensor)
    for number in range(1, depth + 1):
        tensor = _block(tensor, name=f"{name}{number}")
    return _normalised(tensor, name=f"{name}_norm")


def _block(tensor: Tensor, *, name: str) -> Tensor:
    width = tensor.shape[-1]
    heads = next(count for count in range(max(1, width // _HEAD), 0, -1) if width % count == 0)
    normalised = _normalised(tensor, name=f"{name}_norm1")
    attention = keras.layers.MultiHeadAttention(heads, width // heads, name=f"{name}_attention")
    tensor = keras.layers.Add(name=f"{name}_sum1")([tensor, attention(normalised, normalised)])
    hidden = _normalised(tensor, name=f"{name}_norm2")
    hidden = keras.layers.Dense(4 * width, activation="gelu", name=f"{name}_hidden")(hidden)
    hidden = keras.layers.Dense(width, name=f"{name}_output")(hidden)
    return keras.layers.Add(name=f"{name}_sum2")([tensor, hidden])


def _normalised(tensor: Tensor, *, name: str) -> Tensor:
    return keras.layers.LayerNormalization(epsilon=1e-6, name=name)(tensor)
