"""Residual networks with denoising blocks between their stages, as open-set defense networks encode with."""

from __future__ import annotations

import re
from typing import Any, NamedTuple, Optional

import keras

from kerasdefense.backbones import blocks, resnet
from kerasdefense.backbones.blocks import ImageShape, Tensor
from kerasdefense.layers import DENOISERS
from kerasdefense.types import UsageError, look_up


class _Trunk(NamedTuple):
    stages: int
    blocks_per_stage: int


_TRUNKS = {8: _Trunk(3, 1), 14: _Trunk(3, 2), 18: _Trunk(4, 2), 20: _Trunk(3, 3)}


def denoising_resnet(
    image_shape: ImageShape,
    classes: int,
    *,
    depth: int = 18,
    width: int = 64,
    denoise: str = "cbam",
    places: Optional[tuple[int, ...]] = None,
    latent: Optional[int] = None,
) -> keras.Model:
    """Return a ResNet with denoising blocks, whose `embedding` is a dense layer on the pooled feature map.

    `embedding = ReLU(BN(Dense(mean_hw(feature_map))))`, [batch, latent], at least 0. Layer `denoise_0` follows the
    stem and `denoise_s` stage s, which has `2^(s - 1) width` channels. What enters them is called the same with and
    without blocks: `stem_relu`, and the last `stage<s>_block<n>_relu` of the stage.

    Args:
        image_shape: height, width and channels of the images.
        classes: number of classes, at least 2.
        depth: 18 (four stages of two blocks), or 8, 14, 20 (three stages of one to three).
        width: channels of the first stage, 64 in the paper.
        denoise: key of DENOISERS.
        places: where the blocks are, of 0 (stem), 1, ... (stages); None = everywhere, () = nowhere.
        latent: size of the embedding, at least 1; None = `8 width`, the paper's 512 at the paper's width.

    Source: the encoder and open-set classifier of the code released with OSDN-CAML (Shao, Perera, Yuen & Patel
        2022). Deviations: images are normalised as in the other backbones; dense layers and convolutions start
        he_normal, not Xavier-uniform and N(0, 0.02).
    """
    stages, blocks_per_stage = _trunk(depth)
    places = tuple(range(stages + 1)) if places is None else places
    _check(stages=stages, places=places, classes=classes, latent=latent)
    image, tensor = blocks.start(image_shape, width, None)
    tensor = _denoised(resnet.stem(tensor, width), 0, denoise, places)
    for number in range(1, stages + 1):
        filters = width * 2 ** (number - 1)
        tensor = resnet.stage(tensor, filters, number=number, blocks_per_stage=blocks_per_stage)
        tensor = _denoised(tensor, number, denoise, places)
    embedding = _embedding(tensor, 8 * width if latent is None else latent)
    logits = keras.layers.Dense(classes, kernel_initializer="he_normal", dtype="float32", name="logits")(embedding)
    outputs = {"feature_map": tensor, "embedding": embedding, "logits": logits}
    return keras.Model(image, outputs, name=f"denoising_resnet{depth}")


def denoising_places(backbone: keras.Model) -> dict[int, tuple[Tensor, Tensor]]:
    """Return what enters and what leaves each place of a ResNet's denoising blocks; the same where there is none.

    Args:
        backbone: functional model; of others than ResNets of this package nothing is returned.
    """
    layers = {layer.name: layer for layer in backbone.layers}
    matches = filter(None, (re.fullmatch(r"(stem)_relu|stage(\d+)_block\d+_relu", name) for name in layers))
    entering = {0 if match[1] else int(match[2]): layers[match[0]].output for match in matches}  # the last of a stage
    if entering and "feature_map" in layers:  # so ResNets that never have blocks call their last ReLU
        last = max(int(match[1]) for match in filter(None, (re.match(r"stage(\d+)_", name) for name in layers)))
        entering[last] = layers["feature_map"].output
    blocks_of = {place: layers[f"denoise_{place}"] for place in entering if f"denoise_{place}" in layers}
    return {
        place: (tensor, blocks_of[place].output if place in blocks_of else tensor) for place, tensor in entering.items()
    }


def plain_copy(backbone: keras.Model, *, name: str) -> keras.Model:
    """Return a backbone with new weights and the trunk of another, but no denoising blocks.

    Its `embedding` is the mean of its feature map, whatever that of the other is. All its layers are trained, also
    those that are frozen in the other; what the other's normalisation has learnt of the data is copied.

    Args:
        backbone: functional model with the outputs of a backbone; blocks in models nested in it stay.
        name: of the model returned.
    """
    denoisers: Any = tuple(DENOISERS.values())

    def copy(layer: keras.layers.Layer) -> keras.layers.Layer:
        if isinstance(layer, denoisers):
            return keras.layers.Activation("linear", name=layer.name, dtype=layer.dtype_policy)
        return type(layer).from_config(layer.get_config())

    trunk = keras.models.clone_model(backbone, clone_function=copy)
    trunk.trainable = True
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.Normalization):
            trunk.get_layer(layer.name).set_weights(layer.get_weights())
    blocks.synchronize_alike(trunk, backbone)
    classes = backbone.output_shape["logits"][-1]
    return blocks.finish(trunk.input, trunk.output["feature_map"], classes, name=name)


def _trunk(depth: int) -> _Trunk:
    if depth not in _TRUNKS:
        raise UsageError(f"the depth of denoising_resnet must be one of {', '.join(map(str, _TRUNKS))}, not {depth}")
    return _TRUNKS[depth]


def _check(*, stages: int, places: tuple[int, ...], classes: int, latent: Optional[int]) -> None:
    if not set(places) <= set(range(stages + 1)):
        raise UsageError(f"the places of denoising blocks must be from 0 (stem) to {stages}, not {tuple(places)}")
    if classes < 2:
        raise UsageError(f"a classifier needs at least 2 classes, not {classes}")
    if latent is not None and latent < 1:
        raise UsageError(f"latent must be at least 1, not {latent}")


def _denoised(tensor: Tensor, place: int, denoise: str, places: tuple[int, ...]) -> Tensor:
    """Return the tensor after the denoising block of this place, if it has one."""
    block = look_up(DENOISERS, denoise, "denoising block")
    return block(name=f"denoise_{place}")(tensor) if place in places else tensor


def _embedding(feature_map: Tensor, latent: int) -> Tensor:
    pooled = keras.layers.GlobalAveragePooling2D(name="pooling")(feature_map)
    tensor = keras.layers.Dense(latent, kernel_initializer="he_normal", name="latent")(pooled)
    return blocks.relu(blocks.batch_normalisation(tensor, name="latent_bn"), name="embedding")
