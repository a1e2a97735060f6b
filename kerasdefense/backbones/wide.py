"""Wide residual networks of pre-activation blocks."""

from __future__ import annotations

from typing import Optional

import keras

from kerasdefense.backbones import blocks
from kerasdefense.backbones.blocks import ImageShape, Tensor
from kerasdefense.types import UsageError


def wide_resnet(
    image_shape: ImageShape,
    classes: int,
    *,
    depth: int = 28,
    width: int = 10,
    normalisation: Optional[keras.layers.Layer] = None,
    late_stride: bool = False,
) -> keras.Model:
    """Return WideResNet-depth-width: three stages of n blocks, `16 width, 32 width, 64 width` channels.

    Args:
        image_shape: height, width and channels of the images.
        classes: number of classes, at least 2.
        depth: `6n + 4`: 10, 16, 22, 28, 34, ...
        width: the widening factor.
        normalisation: layer from [0, 1] to the network's range; None = `(image - 0.5) / 0.25`.
        late_stride: whether a block halves the side in its second convolution, its 1x1 shortcut takes what enters the
            block, convolutions have biases and start from N(0, sqrt(2 / (9 filters))), as in the network of DFA.

    Source: Zagoruyko and Komodakis 2016, table 1 and their code (batch normalisation and ReLU before each
    convolution, those before the first one shared with a 1x1 shortcut); with `late_stride` the code released with DFA
    (Liu et al. 2022). Deviations: none, dropout 0; theirs has no batch normalisation and ReLU before the pooling, and
    so has this one `with_orthogonal_head`.
    """
    if depth < 10 or (depth - 4) % 6:
        raise UsageError(f"the depth of wide_resnet must be 6n + 4 (10, 16, 22, 28, ...), not {depth}")
    image, tensor = blocks.start(image_shape, width, normalisation)
    convolution = blocks.biased_convolution if late_stride else blocks.convolution
    tensor = convolution(tensor, 16, 3, name="stem_conv")
    for stage, filters in enumerate((16 * width, 32 * width, 64 * width), start=1):
        for block in range(1, (depth - 4) // 6 + 1):
            stride = 2 if stage > 1 and block == 1 else 1
            name = f"stage{stage}_block{block}"
            if late_stride:
                tensor = _late_residual(tensor, filters, stride=stride, name=name)
            else:
                tensor = _residual(tensor, filters, stride=stride, name=name)
    tensor = blocks.relu(blocks.batch_normalisation(tensor, name="final_bn"), name="feature_map")
    name = f"{'dfa_' if late_stride else ''}wide_resnet_{depth}_{width}"
    return blocks.finish(image, tensor, classes, name=name)


def _residual(tensor: Tensor, filters: int, *, stride: int, name: str) -> Tensor:
    """Return the sum of two pre-activated 3x3 convolutions and the shortcut."""
    shortcut = tensor
    tensor = blocks.relu(blocks.batch_normalisation(tensor, name=f"{name}_1_bn"), name=f"{name}_1_relu")
    if stride > 1 or tensor.shape[-1] != filters:
        shortcut = blocks.convolution(tensor, filters, 1, stride=stride, name=f"{name}_shortcut_conv")
    tensor = blocks.convolution(tensor, filters, 3, stride=stride, name=f"{name}_1_conv")
    tensor = blocks.relu(blocks.batch_normalisation(tensor, name=f"{name}_2_bn"), name=f"{name}_2_relu")
    tensor = blocks.convolution(tensor, filters, 3, name=f"{name}_2_conv")
    return keras.layers.Add(name=f"{name}_sum")([tensor, shortcut])


def _late_residual(tensor: Tensor, filters: int, *, stride: int, name: str) -> Tensor:
    """Return the same, with biases, the stride on the second convolution and the shortcut from the block's input."""
    shortcut = tensor
    if stride > 1 or tensor.shape[-1] != filters:
        shortcut = blocks.biased_convolution(tensor, filters, 1, stride=stride, name=f"{name}_shortcut_conv")
    for number, each in ((1, 1), (2, stride)):
        tensor = blocks.relu(
            blocks.batch_normalisation(tensor, name=f"{name}_{number}_bn"), name=f"{name}_{number}_relu"
        )
        tensor = blocks.biased_convolution(tensor, filters, 3, stride=each, name=f"{name}_{number}_conv")
    return keras.layers.Add(name=f"{name}_sum")([tensor, shortcut])
