"""The gated inpainter: a coarse network restores images, and a second one refines what it restored."""

from __future__ import annotations

import functools

import keras

from kerasdefense.backbones.blocks import ImageShape, Tensor
from kerasdefense.backbones.gated import begin, end, gated, head, resized
from kerasdefense.types import UsageError

_DILATIONS = (2, 4, 8, 16)

_gated = functools.partial(gated, keeps_scale=True)


def gated_inpainter(image_shape: ImageShape, *, width: int = 48) -> keras.Model:
    """Return two gated networks from an image with missing blocks, and where they are, to two whole images.

    Both halve the side twice and go up again by resizing to the nearest, with dilated convolutions between. The first
    gives `coarse`. The second sees `coarse * mask + image * (1 - mask)` through two branches, one dilated and one not,
    which it joins, and gives `refined`.

    Args:
        image_shape: (height, width, channels) of any size; sides that cannot be halved are rounded up.
        width: channels at half the image's size, 48 in the authors' code, at least 4; twice as many at a quarter of it.

    Returns:
        Model as `gated.begin` and `gated.end` describe it.

    Raises:
        UsageError: an illegal width or shape.

    Source: Yu et al. 2019, "Free-form image inpainting with gated convolution" (DeepFill v2), as in the code released
    with AToP (Lin et al. 2024). Deviations: no contextual attention, which has no weights: its branch goes on without;
    no pretrained weights, and so kernels start larger, drawn by the number of inputs: by theirs, he_uniform by the
    number of outputs, what a new network restores of different images differs by 1e-7; a sigmoid in [0, 1] for tanh in
    [-1, 1], the same function of twice the argument; dilations are at most half the shorter side at a quarter of the
    image's size, which changes nothing from 128x128 on; heads start glorot_uniform.
    """
    if width < 4:
        raise UsageError(f"the width of a purifier of two stages must be at least 4, not {width}")
    inputs, tensor = begin(image_shape)
    channels = image_shape[-1]
    coarse = _coarse(tensor, channels, width)
    refined = _refined(_composite(inputs, coarse), channels, width)
    return end(inputs, coarse, refined, name="gated_inpainter")


def _coarse(tensor: Tensor, channels: int, width: int) -> Tensor:
    sizes = _down(tensor, width, (width, 2 * width), name="coarse_down")
    low = _dilated(sizes[-1], 2 * width, name="coarse_low")
    low = _plain(low, 2 * width, name="coarse_plain")
    return head(_up(low, sizes, width, name="coarse_up"), channels, name="coarse")


def _refined(tensor: Tensor, channels: int, width: int) -> Tensor:
    sizes = _down(tensor, width, (width // 2, width), name="dilated_down")
    dilated = _dilated(sizes[-1], 2 * width, name="dilated_low")
    low = _down(tensor, width, (width // 2, 2 * width), name="plain_down")[-1]
    low = _gated(low, 2 * width, activation="relu", name="plain_low")
    low = _plain(low, 2 * width, name="plain")
    both = keras.layers.Concatenate(name="branches")([dilated, low])
    both = _plain(both, 2 * width, name="refined_plain")
    return head(_up(both, sizes, width, name="refined_up"), channels, name="refined")


def _composite(inputs: list[Tensor], coarse: Tensor) -> Tensor:
    """Return `coarse` where pixels are missing and the image elsewhere, in [-1, 1]."""
    image, mask = inputs
    visible = keras.layers.Rescaling(-1.0, 1.0, name="visible")(mask)
    seen = keras.layers.Multiply(name="seen")([image, visible])
    restored = keras.layers.Multiply(name="filled")([coarse, mask])
    whole = keras.layers.Add(name="composite")([seen, restored])
    return keras.layers.Rescaling(2.0, -1.0, name="scaled_composite")(whole)


def _down(tensor: Tensor, width: int, hidden: tuple[int, int], *, name: str) -> list[Tensor]:
    """Return features at the image's size, at half and at a quarter of it; `hidden` channels where a side is halved."""
    full = _gated(tensor, width // 2, 5, name=f"{name}1_1")
    half = _gated(full, hidden[0], stride=2, name=f"{name}2_1")
    half = _gated(half, width, name=f"{name}2_2")
    low = _gated(half, hidden[1], stride=2, name=f"{name}3_1")
    return [full, half, _gated(low, 2 * width, name=f"{name}3_2")]


def _dilated(tensor: Tensor, filters: int, *, name: str) -> Tensor:
    most = max(1, min(tensor.shape[1:3]) // 2)
    tensor = _gated(tensor, filters, name=f"{name}1")
    for number, dilation in enumerate(_DILATIONS, start=2):
        tensor = _gated(tensor, filters, dilation=min(dilation, most), name=f"{name}{number}")
    return tensor


def _plain(tensor: Tensor, filters: int, *, name: str) -> Tensor:
    return _gated(_gated(tensor, filters, name=f"{name}_1"), filters, name=f"{name}_2")


def _up(low: Tensor, sizes: list[Tensor], width: int, *, name: str) -> Tensor:
    full, half, _ = sizes
    tensor = _gated(resized(low, half, name=f"{name}2_resize"), width, name=f"{name}2_1")
    tensor = _gated(tensor, width, name=f"{name}2_2")
    tensor = _gated(resized(tensor, full, name=f"{name}1_resize"), width // 2, name=f"{name}1_1")
    return _gated(tensor, width // 4, name=f"{name}1_2")
