"""Residual networks of basic and of bottleneck blocks, as used on small images."""

from __future__ import annotations

from collections.abc import Sequence
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


def bottleneck_resnet(
    image_shape: ImageShape,
    classes: int,
    *,
    blocks_per_stage: Sequence[int],
    width: int = 64,
    normalisation: Optional[keras.layers.Layer] = None,
) -> keras.Model:
    """Return a ResNet of bottleneck blocks with a stem for small images: a 3x3 convolution without stride or pooling.

    Stage number s has `2^(s - 1) width` channels inside its blocks and four times as many between them.

    Args:
        image_shape: height, width and channels of the images.
        classes: number of classes, at least 2.
        blocks_per_stage: (3, 4, 6, 3) of ResNet-50.
        width: channels of the stem and inside the blocks of the first stage, 64 in the paper.
        normalisation: layer from [0, 1] to the network's range; None = `(image - 0.5) / 0.25`.

    Source: He et al. 2016, table 1 and figure 5; with the blocks (3, 4, 6) and width 16 the network that the code
    released with CAFD (Zhou et al. 2021) calls ResNet-50. Deviations: the stem, as is usual for CIFAR; a block halves
    the side in its 3x3 convolution.
    """
    image, tensor = blocks.start(image_shape, width, normalisation)
    tensor = stem(tensor, width)
    for stage, count in enumerate(blocks_per_stage, start=1):
        for block in range(1, count + 1):
            name = f"stage{stage}_block{block}"
            stride = 2 if stage > 1 and block == 1 else 1
            tensor = _bottleneck(tensor, 2 ** (stage - 1) * width, stride=stride, name=name)
            is_last = (stage, block) == (len(blocks_per_stage), count)
            tensor = blocks.relu(tensor, name="feature_map" if is_last else f"{name}_relu")
    return blocks.finish(image, tensor, classes, name=f"resnet{3 * sum(blocks_per_stage) + 2}")


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


def _bottleneck(tensor: Tensor, filters: int, *, stride: int, name: str) -> Tensor:
    """Return the sum of normalised convolutions, 1x1, 3x3 and 1x1, and the shortcut, before the block's last ReLU."""
    shortcut, expanded = tensor, 4 * filters
    if stride > 1 or tensor.shape[-1] != expanded:
        shortcut = blocks.normalised_convolution(tensor, expanded, 1, stride=stride, name=f"{name}_shortcut")
    for number, size in ((1, 1), (2, 3)):
        step = stride if size == 3 else 1
        tensor = blocks.normalised_convolution(tensor, filters, size, stride=step, name=f"{name}_{number}")
        tensor = blocks.relu(tensor, name=f"{name}_{number}_relu")
    tensor = blocks.normalised_convolution(tensor, expanded, 1, name=f"{name}_3")
    return keras.layers.Add(name=f"{name}_sum")([tensor, shortcut])
