"""Functional models in layers of Keras alone: each layer of ours by what it computes in inference, weights included."""

from __future__ import annotations

from typing import Any, Callable, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import layers as own

from kerasdefense.layers import DualAttention, Logits, NonLocal, OrthogonalHead

_UNSAFE = ("Lambda", "TFOpLambda", "SlicingOpLambda", "ClassMethod", "InstanceProperty", "InstanceMethod")
_OF_TRAINING = (own.Dropout, own.SpatialDropout2D, own.GaussianDropout, own.GaussianNoise, own.AlphaDropout)
_TRAINING = ("kernel_regularizer", "bias_regularizer", "activity_regularizer", "beta_regularizer", "gamma_regularizer")


class NotPlainError(Exception):
    """A model holds what layers of Keras alone do not compute; the message says what."""


def in_plain_layers(*models: keras.Model) -> keras.Model:
    """Return one functional model for inference of layers that Keras itself brings, none nested in another.

    It computes in float32 what the given models do, each on what the one before it gives.

    Args:
        models: functional models of one input and one output; the first takes the images.

    Raises:
        NotPlainError: a layer is neither one of Keras that can be stored without Python code nor one of ours that is
            known here.
    """
    image = keras.Input(models[0].input_shape[1:], dtype="float32", name="image")
    tensor, known, weights = image, dict[int, Any](), list[Any]()
    for model in models:
        tensor = _Part(known, weights, f"{model.name}_" if len(models) > 1 else "").replayed(model, tensor)
    plain = keras.Model(image, tensor, name="classifier")
    for layer, values in weights:
        layer.set_weights(values)
    plain.trainable = False  # so that no batch normalisation takes the statistics of a batch, whoever calls it how
    return plain


class _Part(NamedTuple):
    """A model that is being made of the graph of another.

    Attributes:
        known: the new layers by the ids of the old.
        weights: new layers, and the weights that they take over once all is built.
        prefix: of the names of layers.
    """

    known: dict[int, keras.layers.Layer]
    weights: list[tuple[keras.layers.Layer, list[np.ndarray]]]
    prefix: str

    def replayed(self, model: keras.Model, given: Any) -> Any:
        """Return what a functional model gives for `given`, by new layers."""
        if not getattr(model, "_is_graph_network", False) or len(model.inputs) != 1:
            raise NotPlainError(f"{type(model).__name__} {model.name!r} is no functional model of one input")
        tensors = {id(model.inputs[0]): given}
        for depth in sorted(model._nodes_by_depth, reverse=True):
            for node in model._nodes_by_depth[depth]:
                if node.is_input:
                    continue
                if len(node.call_args) != 1:
                    raise NotPlainError(f"its layer {node.layer.name!r} is called with more than one argument")
                taken = _looked_up(tensors, node.call_args[0])
                made = tf.nest.flatten(self._applied(node.layer, taken))
                tensors |= {id(old): new for old, new in zip(tf.nest.flatten(node.outputs), made)}
        return _looked_up(tensors, model.output)

    def _applied(self, layer: keras.layers.Layer, given: Any) -> Any:
        part = self._replace(prefix=f"{self.prefix}{layer.name}_")
        if isinstance(layer, keras.Model):
            return part.replayed(layer, given)
        if type(layer) in _OURS:
            return _OURS[type(layer)](layer, given, part)
        if isinstance(layer, _OF_TRAINING):
            return given
        return self.copy(layer)(given)

    def copy(self, layer: keras.layers.Layer, **changes: Any) -> keras.layers.Layer:
        """Return a layer of Keras with the settings that count in inference, which takes over the weights."""
        kind = type(layer)
        if not kind.__module__.startswith("keras.") or kind.__name__ in _UNSAFE:
            raise NotPlainError(f"its layer {layer.name!r} is a {kind.__name__}, which Keras alone cannot load")
        if id(layer) not in self.known:
            config = {**layer.get_config(), "dtype": "float32", "name": f"{self.prefix}{layer.name}"}
            config |= {name: None for name in _TRAINING if name in config}
            self.known[id(layer)] = kind.from_config({**config, **changes})
            self.weights.append((self.known[id(layer)], layer.get_weights()))
        return self.known[id(layer)]

    def new(self, kind: type, name: str, *settings: Any, **more: Any) -> keras.layers.Layer:
        """Return a layer of Keras without weights."""
        return kind(*settings, name=f"{self.prefix}{name}", dtype="float32", **more)


def _looked_up(tensors: dict[int, Any], nest: Any) -> Any:
    return tf.nest.map_structure(lambda each: tensors[id(each)], nest)


def _logits(layer: Logits, embedding: Any, part: _Part) -> Any:
    return part.copy(layer.dense, activation="linear")(embedding)


def _orthogonal(layer: OrthogonalHead, embedding: Any, part: _Part) -> Any:
    """Return `|direction(embedding) @ kernel|`, where |x| = max(x, -x)."""
    direction = part.new(own.UnitNormalization, "direction")(embedding)
    axes = part.new(own.Dense, "axes", layer.classes, use_bias=False)
    part.weights.append((axes, layer.get_weights()))
    scores = axes(direction)
    if not layer.use_abs:
        return scores
    return part.new(own.Maximum, "absolute")([scores, part.new(own.Rescaling, "negative", -1.0)(scores)])


def _dual_attention(layer: DualAttention, inputs: Any, part: _Part) -> Any:
    """Return the formula in the docstring of the layer; places are rows of a matrix where channels are pooled."""
    height, width, channels = inputs.shape[1:]
    features = part.copy(layer.normalisation)(part.copy(layer.convolution)(inputs))
    features = part.new(own.ReLU, "features")(features)
    pooled = [
        part.new(own.GlobalAveragePooling2D, "mean")(features),
        part.new(own.GlobalMaxPooling2D, "largest")(features),
    ]
    both = part.new(own.Add, "pooled")([part.copy(layer.expand)(part.copy(layer.squeeze)(each)) for each in pooled])
    channel = part.new(own.Reshape, "channel", (1, 1, channels))(part.new(own.Activation, "gate", "sigmoid")(both))
    features = part.new(own.Multiply, "by_channel")([features, channel])
    places = part.new(own.Reshape, "places", (height * width, channels))(features)
    places = part.new(own.Permute, "channels_first", (2, 1))(places)
    pooled = [
        part.new(own.GlobalMaxPooling1D, "largest_channel")(places),
        part.new(own.GlobalAveragePooling1D, "mean_channel")(places),
    ]
    maps = [part.new(own.Reshape, f"map_{place}", (height, width, 1))(each) for place, each in enumerate(pooled)]
    spatial = part.copy(layer.spatial_convolution)(part.new(own.Concatenate, "maps")(maps))
    spatial = part.new(own.Activation, "spatial", "sigmoid")(part.copy(layer.spatial_normalisation)(spatial))
    gated = part.new(own.Multiply, "gated")([features, spatial])
    return part.new(own.ReLU, "output")(part.new(own.Add, "sum")([inputs, gated]))


def _non_local(layer: NonLocal, inputs: Any, part: _Part) -> Any:
    """Return the formula in the docstring of the layer."""

    def rows(of: keras.layers.Layer, tensor: Any) -> Any:
        places = tensor.shape[1] * tensor.shape[2]
        return part.new(own.Reshape, f"{of.name}_rows", (places, of.filters))(part.copy(of)(tensor))

    pooled, halved = inputs, 0
    while pooled.shape[1] * pooled.shape[2] > layer.max_positions:
        halved += 1
        pooled = part.new(own.AveragePooling2D, f"pooled_{halved}", 2, padding="same")(pooled)
    alike = part.new(own.Dot, "products", (2, 2))([rows(layer.theta, inputs), rows(layer.phi, pooled)])
    attention = part.new(own.Softmax, "attention")(alike)
    average = part.new(own.Dot, "average", (2, 1))([attention, rows(layer.g, pooled)])
    average = part.new(own.Reshape, "map", (*inputs.shape[1:3], layer.g.filters))(average)
    return part.new(own.Add, "sum")([inputs, part.copy(layer.normalisation)(part.copy(layer.projection)(average))])


_OURS: dict[type, Callable[[Any, Any, _Part], Any]] = {
    DualAttention: _dual_attention,
    Logits: _logits,
    NonLocal: _non_local,
    OrthogonalHead: _orthogonal,
}
