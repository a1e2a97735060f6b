"""VGG-19 with batch normalisation and one dense layer, as used on small images."""

from __future__ import annotations

from typing import Optional

import keras

from kerasdefense.backbones import blocks
from kerasdefense.backbones.blocks import ImageShape

_STAGES = ((1, 2), (2, 2), (4, 4), (8, 4), (8, 4))
"""Channels as multiples of the width, and convolutions, of each stage."""


def vgg19(
    image_shape: ImageShape,
    classes: int,
    *,
    width: int = 64,
    normalisation: Optional[keras.layers.Layer] = None,
) -> keras.Model:
    """Return VGG-19 with batch normalisation and a single dense layer: sixteen 3x3 convolutions in five stages.

    The stages have `width, 2 width, 4 width, 8 width, 8 width` channels; between them the side is halved.

    Args:
        image_shape: height, width and channels of the images.
        classes: number of classes, at least 2.
        width: channels of the first stage, 64 in the paper.
        normalisation: layer from [0, 1] to the network's range; None = `(image - 0.5) / 0.25`.

    Source: Simonyan and Zisserman 2015, table 1, column E. Deviations: batch normalisation after each convolution and
    one dense layer, as is usual for CIFAR; the last pooling is the mean over the whole map, where theirs is a maximum
    over 2x2 (of images of 32 pixels the same four numbers).
    """
    image, tensor = blocks.start(image_shape, width, normalisation)
    for stage, (multiple, convolutions) in enumerate(_STAGES, start=1):
        if stage > 1:
            tensor = keras.layers.MaxPooling2D(padding="same", name=f"stage{stage}_pooling")(tensor)
        for number in range(1, convolutions + 1):
            name = f"stage{stage}_{number}"
            tensor = blocks.biased_convolution(tensor, multiple * width, 3, name=f"{name}_conv")
            tensor = blocks.batch_normalisation(tensor, name=f"{name}_bn")
            is_last = (stage, number) == (len(_STAGES), convolutions)
            tensor = blocks.relu(tensor, name="feature_map" if is_last else f"{name}_relu")
    return blocks.finish(image, tensor, classes, name="vgg19")
