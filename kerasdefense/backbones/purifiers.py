"""The purifiers by name: networks from an image with missing blocks, and where they are, to whole images."""

from __future__ import annotations

from typing import Callable

import keras

from kerasdefense.backbones.blocks import ImageShape
from kerasdefense.backbones.gated import gated_unet
from kerasdefense.backbones.inpainter import gated_inpainter
from kerasdefense.backbones.masked_autoencoder import masked_autoencoder
from kerasdefense.types import UsageError, look_up

PURIFIERS: dict[str, Callable[..., keras.Model]] = {
    "gated_inpainter": gated_inpainter,
    "gated_unet": gated_unet,
    "masked_autoencoder": masked_autoencoder,
}


def build_purifier(name: str, image_shape: ImageShape, *, width: int = 0) -> keras.Model:
    """Return one of PURIFIERS.

    Args:
        name: one of PURIFIERS.
        image_shape: (height, width, channels) of the data.
        width: its width; 0 = its own default.

    Returns:
        Model from `[image, mask]` to `coarse` and `refined`, as `gated.begin` and `gated.end` describe it.

    Raises:
        UsageError: an unknown name, or a width or shape that this purifier refuses.
    """
    make = look_up(PURIFIERS, name, "purifier")
    if width < 0:
        raise UsageError(f"the width of a purifier must be at least 1, or 0 for its default, not {width}")
    return make(image_shape, width=width) if width else make(image_shape)
