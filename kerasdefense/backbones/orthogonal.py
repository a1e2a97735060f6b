"""Backbones whose classes are frozen orthonormal axes in place of the columns of a trained dense layer."""

from __future__ import annotations

from typing import Optional

import keras

from kerasdefense.backbones import head
from kerasdefense.backbones.blocks import Tensor
from kerasdefense.layers import OrthogonalHead


def with_orthogonal_head(backbone: keras.Model, *, use_abs: bool = True, seed: Optional[int] = None) -> keras.Model:
    """Return a backbone with its dense layer replaced by an OrthogonalHead, and the last ReLU before it left out.

    Axes have coordinates of either sign, which embeddings that are never negative cannot follow. So what is left out is
    a ReLU that gives the embedding, or else one that gives the feature map whose mean the embedding is; with it a batch
    normalisation of the sum of a residual block, as pre-activated networks end in. In other networks, such as those
    whose last convolution rectifies by itself, the embedding stays as it is. The layers that remain are those of
    `backbone`, with their weights.

    Args:
        backbone: functional model from image to `feature_map`, `embedding` and `logits`.
        use_abs: whether logits are the absolute cosines; otherwise the signed ones.
        seed: of the axes; None = drawn from Keras' global generator.

    Raises:
        UsageError: more classes than the embedding has dimensions.
    """
    feature_map, embedding = _signed(backbone.output["feature_map"], backbone.output["embedding"])
    axes = OrthogonalHead(backbone.output["logits"].shape[-1], use_abs=use_abs, seed=seed)
    outputs = {"feature_map": feature_map, "embedding": embedding, "logits": axes(embedding)}
    return keras.Model(backbone.input, outputs, name=backbone.name)


def orthogonal_head(backbone: keras.Model) -> Optional[OrthogonalHead]:
    """Return the head of a backbone whose classes are frozen axes, None where it has another."""
    layer = head.layer_of(backbone.output["logits"])
    return layer if isinstance(layer, OrthogonalHead) else None


def _signed(feature_map: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Return both without the last ReLU before the embedding, if one can be left out."""
    layer, source = _behind(embedding)
    if isinstance(layer, keras.Model) and _behind(feature_map)[0] is layer:  # the trunk of a user's own model
        inner = keras.Model(layer.inputs, _signed(*layer.outputs), name=layer.name)
        feature_map, embedding = inner(source)
    elif _is_relu(layer):
        embedding = source
    elif isinstance(layer, keras.layers.GlobalAveragePooling2D) and source is feature_map:
        feature_map = _without_rectifier(feature_map)
        embedding = type(layer).from_config(layer.get_config())(feature_map)
    return feature_map, embedding


def _is_relu(layer: keras.layers.Layer) -> bool:
    is_activation = isinstance(layer, keras.layers.Activation) and layer.activation is keras.activations.relu
    return isinstance(layer, keras.layers.ReLU) or is_activation


def _without_rectifier(feature_map: Tensor) -> Tensor:
    """Return what enters the last ReLU, or the batch normalisation of a sum before it; the same if there is none."""
    rectifier, tensor = _behind(feature_map)
    if not _is_relu(rectifier):
        return feature_map
    normalisation, total = _behind(tensor)
    if isinstance(normalisation, keras.layers.BatchNormalization) and isinstance(_behind(total)[0], keras.layers.Add):
        tensor = total
    return keras.layers.Activation("linear", dtype=rectifier.dtype_policy, name=rectifier.name)(tensor)


def _behind(tensor: Tensor) -> tuple[keras.layers.Layer, Tensor]:
    """Return the layer that gives a symbolic tensor, and what enters it; None where that is not one tensor."""
    _, layer, source = head.step_back(tensor)
    return layer, source
