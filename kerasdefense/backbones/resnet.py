"""Residual networks of basic blocks, as used on small images."""

from __future__ import annotations

from typing import Optional

import keras

from kerasdefense.backbones import blocks
from kerasdefense.backbones.blocks import ImageShape, Tensor
from kerasdefense.types import UsageError


def cifar_resnet(
    image_shape: ImageShape,
    classes: int,
    *,
    depth: int,
    width: int = 16,
    normalisation: Optional[keras.layers.Layer] = None,
) -> keras.Model:
    """Return the CIFAR ResNet of `depth = 6n + 2` layers, in three stages of n blocks.

    The stages have `width, 2 width, 4 width` channels.

    Args:
        image_shape: height, width and channels of the images.
        classes: number of classes, at least 2.
        depth: 8, 14, 20, ...
        width: channels of the first stage.
        normalisation: layer from [0, 1] to the network's range; None = `(image - 0.5) / 0.25`.

    Source: He et al. 2016, section 4.2. Deviations: shortcuts that change shape are 1x1 convolutions with
    batch normalisation (the paper's option B; its CIFAR networks pad with zeros, option A).
    """
    if depth < 8 or (depth - 2) % 6:
        raise UsageError(f"the depth of a CIFAR ResNet must be 6n + 2 (8, 14, 20, ...), not {depth}")
    image, tensor = blocks.start(image_shape, width, normalisation)
    tensor = _stages(tensor, widths=(width, 2 * width, 4 * width), blocks_per_stage=(depth - 2) // 6)
    return blocks.finish(image, tensor, classes, name=f"resnet{depth}")


def resnet18(
    image_shape: ImageShape,
    classes: int,
    *,
    width: int = 64,
    normalisation: Optional[keras.layers.Layer] = None,
) -> keras.Model:
    """Return ResNet-18 with a stem for small images: a 3x3 convolution without stride or pooling.

    Four stages of two blocks, `width, 2 width, 4 width, 8 width` channels.

    Args:
        image_shape: height, width and channels of the images.
        classes: number of classes, at least 2.
        width: channels of the first stage, 64 in the paper.
        normalisation: layer from [0, 1] to the network's range; None = `(image - 0.5) / 0.25`.

    Source: He et al. 2016, table 1. Deviations: the stem, as is usual for CIFAR; shortcuts of option B.
    """
    image, tensor = blocks.start(image_shape, width, normalisation)
    tensor = _stages(tensor, widths=(width, 2 * width, 4 * width, 8 * width), blocks_per_stage=2)
    return blocks.finish(image, tensor, classes, name="resnet18")


def stem(tensor: Tensor, filters: int) -> Tensor:
    """Return a normalised and rectified 3x3 convolution of the image."""
    return blocks.relu(blocks.normalised_convolution(tensor, filters, 3, name="stem"), name="stem_relu")


def stage(tensor: Tensor, filters: int, *, number: int, blocks_per_stage: int, end: Optional[str] = None) -> Tensor:
    """Return stage `number` = 1, 2, ... of basic blocks, whose last ReLU is named `end`; later ones halve the side."""
    for block in range(1, blocks_per_stage + 1):
        name = f"stage{number}_block{block}"
        tensor = _residual(tensor, filters, stride=2 if number > 1 and block == 1 else 1, name=name)
        tensor = blocks.relu(tensor, name=end if end and block == blocks_per_stage else f"{name}_relu")
    return tensor


def _stages(tensor: Tensor, *, widths: tuple[int, ...], blocks_per_stage: int) -> Tensor:
    """Return the feature map after a stem and stages of basic blocks."""
    tensor = stem(tensor, widths[0])
    for number, filters in enumerate(widths, start=1):
        end = "feature_map" if number == len(widths) else None
        tensor = stage(tensor, filters, number=number, blocks_per_stage=blocks_per_stage, end=end)
    return tensor


def _residual(tensor: Tensor, filters: int, *, stride: int, name: str) -> Tensor:
    """Return the sum of two normalised 3x3 convolutions and the shortcut, before the block's last ReLU."""
    shortcut = tensor
    if stride > 1 or tensor.shape[-1] != filters:
        shortcut = blocks.normalised_convolution(tensor, filters, 1, stride=stride, name=f"{name}_shortcut")
    tensor = blocks.normalised_convolution(tensor, filters, 3, stride=stride, name=f"{name}_1")
    tensor = blocks.relu(tensor, name=f"{name}_1_relu")
    tensor = blocks.normalised_convolution(tensor, filters, 3, name=f"{name}_2")
    return keras.layers.Add(name=f"{name}_sum")([tensor, shortcut])
