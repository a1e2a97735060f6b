"""The purifiers by name: networks from an image with missing blocks, and where they are, to whole images."""

from __future__ import annotations

from typing import Any, Callable, Optional

import keras
import tensorflow as tf

from kerasdefense.backbones.blocks import ImageShape
from kerasdefense.backbones.gated import gated_unet
from kerasdefense.backbones.inpainter import gated_inpainter
from kerasdefense.backbones.masked_autoencoder import masked_autoencoder
from kerasdefense.types import InputError, UsageError, look_up

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


def purifier_in(model: keras.Model) -> keras.Model:
    """Return the purifier in an AToP model or in what it exports, or the model itself if it is one.

    Raises:
        InputError: there is none, or its images leave [0, 1].
    """
    found = getattr(model, "purifier", model)
    check_purifier(found)
    image, mask = (tf.random.stateless_uniform([8, *shape[1:]], [0, 0]) for shape in found.input_shape)
    made = found([image, tf.round(mask)], training=False)["refined"]
    low, high = float(tf.reduce_min(made)), float(tf.reduce_max(made))
    if not 0 <= low <= high <= 1:  # NaN too
        raise InputError(f"purifier {found.name!r} makes pixels from {low:.3g} to {high:.3g}, not in [0, 1]")
    return found


def check_purifier(purifier: keras.Model, image_shape: Optional[ImageShape] = None) -> None:
    """Raise an InputError unless a model is a purifier, of images of this shape if one is given."""
    shapes: Any = getattr(purifier, "input_shape", None)
    outputs: Any = getattr(purifier, "output_shape", None)
    takes_both = isinstance(shapes, list) and len(shapes) == 2 and tuple(shapes[1][1:]) == (*shapes[0][1:3], 1)
    if not takes_both or not isinstance(outputs, dict) or not {"coarse", "refined"} <= set(outputs):
        raise InputError(
            f"model {purifier.name!r} is no purifier, which takes [image, mask] and returns coarse and refined images"
        )
    takes, gives = tuple(shapes[0][1:]), tuple(outputs["refined"][1:])
    if image_shape is not None and (takes, gives) != (tuple(image_shape), tuple(image_shape)):
        raise InputError(f"the purifier makes images {gives} of {takes}, but those of the data are {image_shape}")
