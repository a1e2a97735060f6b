"""A small convolutional network without shortcuts."""

from __future__ import annotations

from typing import Optional

import keras

from kerasdefense.backbones import blocks
from kerasdefense.backbones.blocks import ImageShape


def small_cnn(
    image_shape: ImageShape,
    classes: int,
    *,
    width: int = 16,
    normalisation: Optional[keras.layers.Layer] = None,
) -> keras.Model:
    """Return five 3x3 convolutions, each with batch normalisation and ReLU, for images of 8 to 32 pixels.

    Channels `width, 2 width, 2 width, 4 width, 4 width`; the second and the fourth halve the side. A pixel of
    the feature map sees 21 x 21 pixels of the image.

    Args:
        image_shape: height, width and channels of the images.
        classes: number of classes, at least 2.
        width: channels of the first convolution.
        normalisation: layer from [0, 1] to the network's range; None = `(image - 0.5) / 0.25`.
    """
    image, tensor = blocks.start(image_shape, width, normalisation)
    layers = [(width, 1), (2 * width, 2), (2 * width, 1), (4 * width, 2), (4 * width, 1)]
    for number, (filters, stride) in enumerate(layers, start=1):
        tensor = blocks.normalised_convolution(tensor, filters, 3, stride=stride, name=f"block{number}")
        tensor = blocks.relu(tensor, name="feature_map" if number == len(layers) else f"block{number}_relu")
    return blocks.finish(image, tensor, classes, name="small_cnn")
