"""The search for the end of a classifier: global pooling, embedding, last dense layer."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Optional

import keras
import tensorflow as tf

from kerasdefense.backbones.blocks import Tensor
from kerasdefense.layers import Logits
from kerasdefense.types import InputError

NEEDED = "a backbone needs global pooling and one Dense at its end, with or without a softmax"

_GLOBAL_POOLING = (keras.layers.GlobalAveragePooling2D, keras.layers.GlobalMaxPooling2D)
_SOFTMAX = (keras.activations.softmax, keras.activations.linear)

Node = Any
"""A call of a layer in the graph of a functional model."""


class Names(NamedTuple):
    """The names by which a user points at layers; empty = find them."""

    pooling_layer: str = ""
    logits_layer: str = ""


def split(model: keras.Model, names: Names) -> tuple[keras.Model, keras.layers.Dense]:
    """Return the model from the image to (feature_map, embedding), and the Dense that takes the embedding.

    The model returned is made of the layers of `model`; where the end of `model` lies in nested models they
    are taken apart, and called as before.

    Raises:
        InputError: if the end is another one, or a name is needed.
    """
    if len(model.outputs) != 1:
        raise InputError(f"model {model.name!r} has {len(model.outputs)} outputs; {NEEDED}")
    tensor = model.outputs[0]
    while True:
        node, layer, source = step_back(tensor)
        if source is not None and isinstance(layer, keras.Model):
            trunk, dense = split(layer, names)
            return keras.Model(model.inputs, _call(node, trunk, source), name=model.name), dense
        if type(layer) is keras.layers.Dense:
            _check_dense(layer, source, names)
            return keras.Model(model.inputs, _features(source, names, [node]), name=model.name), layer
        if source is None or not _keeps_order(layer):
            raise InputError(f"the model ends in layer {layer.name!r} ({type(layer).__name__}); {NEEDED}")
        tensor = source


def without_softmax(model: keras.Model, output: Optional[Tensor] = None) -> Optional[keras.Model]:
    """Return a functional or Sequential classifier without the softmax at its end, made of its own layers.

    The softmax may be a layer, an activation or that of a Dense, in `model` or at the end of a model nested in it.

    Args:
        model: built classifier.
        output: the one of its outputs that is meant; None = it has one.

    Returns:
        The model from the inputs of `model` to the values that enter the softmax; None where it ends otherwise.
    """
    if output is None and not (model.outputs and len(model.outputs) == 1):
        return None
    tensor = model.outputs[0] if output is None else output
    if not keras.backend.is_keras_tensor(tensor):
        return None
    logits = _before_softmax(tensor)
    return None if logits is None else keras.Model(model.inputs, logits, name=model.name)


def weights(logits: Tensor) -> Optional[tuple[tf.Variable, Optional[tf.Variable]]]:
    """Return kernel [d, classes] and bias [classes] of the dense layer that gives symbolic logits.

    Returns:
        None for a bias that is not there, and for both where the logits come of another layer.
    """
    layer = layer_of(logits)
    if isinstance(layer, Logits) or (type(layer) is keras.layers.Dense and layer.activation in _SOFTMAX):
        return layer.kernel, layer.bias
    return None


def last_kernel(model: keras.Model) -> tf.Variable:
    """Return the kernel [d, classes] of the dense layer that gives a backbone's logits.

    Raises:
        InputError: the layer is of another kind.
    """
    found = weights(model.output["logits"])
    if found is None:
        kind = type(layer_of(model.output["logits"])).__name__
        raise InputError(
            f"the logits of model {model.name!r} are those of a {kind}; they must be those of a dense layer"
        )
    return found[0]


def pools_by_mean(model: keras.Model) -> bool:
    """Return whether a backbone's embedding is the mean of its feature map over places, on noise."""
    if model.output["feature_map"].shape[-1] != model.output["embedding"].shape[-1]:
        return False
    with tf.init_scope():
        outputs = model(tf.random.stateless_uniform([2, *model.input_shape[1:]], [0, 0]), training=False)
        mean = tf.reduce_mean(tf.cast(outputs["feature_map"], tf.float32), axis=(1, 2))
        embedding = tf.cast(outputs["embedding"], tf.float32)
        rounding = 1e-4 if outputs["embedding"].dtype == tf.float32 else 2e-2
        tolerance = rounding * tf.reduce_max(tf.abs(mean))
        return bool(tf.reduce_max(tf.abs(mean - embedding)) <= tolerance)


def maps_of(model: keras.Model) -> dict[str, tuple[keras.layers.Layer, Tensor]]:
    """Return the layers that give one feature map [batch, h, w, c], by name in order, and these in the model's graph.

    Of a functional model nested in it the layers too, which are then passed apart from those of `model`.
    """
    maps: dict[str, tuple[keras.layers.Layer, Tensor]] = {}
    for layer in model.layers:
        nodes = getattr(layer, "_inbound_nodes", ())
        if isinstance(layer, keras.layers.InputLayer) or not nodes:
            continue
        if isinstance(layer, keras.Model):
            inner, sources = maps_of(layer), nodes[-1].keras_inputs
            if inner and len(sources) == 1:
                passed = keras.Model(layer.inputs, [tensor for _, tensor in inner.values()])(sources[0])
                maps |= {name: (inner[name][0], each) for name, each in zip(inner, tf.nest.flatten(passed))}
        elif len(nodes) == 1 and _is_map(layer.output):
            maps[layer.name] = (layer, layer.output)
    return maps


def _is_map(output: Any) -> bool:
    return not isinstance(output, (tuple, list, dict)) and output.shape.rank == 4


def layer_of(logits: Tensor) -> keras.layers.Layer:
    """Return the layer that gives symbolic logits, in whatever model it is nested; casts of its result are passed."""
    node, layer, source = step_back(logits)
    if isinstance(layer, keras.Model):
        position = [each is logits for each in tf.nest.flatten(node.outputs)].index(True)
        return layer_of(tf.nest.flatten(layer.outputs)[position])
    is_cast = isinstance(layer, keras.layers.Activation) and layer.activation is keras.activations.linear
    return layer_of(source) if is_cast and source is not None else layer


def _before_softmax(tensor: Tensor) -> Optional[Tensor]:
    node, layer, source = step_back(tensor)
    if source is None:
        return None
    if isinstance(layer, keras.Model):
        inner = without_softmax(layer)
        return None if inner is None else _call(node, inner, source)
    if isinstance(layer, keras.layers.Softmax):
        return source if layer.axis in (-1, source.shape.rank - 1) else None
    activation = getattr(layer, "activation", None)
    if isinstance(layer, keras.layers.Activation):
        if activation is keras.activations.linear:  # it only changes the data type
            return _before_softmax(source)
        return source if _is_softmax(activation) else None
    if type(layer) is keras.layers.Dense and source.shape.rank == 2 and _is_softmax(activation):
        return Logits(layer, dtype=layer.variable_dtype, name=f"{layer.name}_without_softmax")(source)
    return None


def _is_softmax(activation: Any) -> bool:
    return activation in (keras.activations.softmax, tf.nn.softmax)


def _features(embedding: Tensor, names: Names, passed: list[Node]) -> tuple[Tensor, Tensor]:
    """Return the feature map and the embedding, in the graph of the embedding.

    Args:
        embedding: what enters the last dense layer.
        names: the layers a user points at.
        passed: calls from the output on down to the embedding, the last dense layer's first.
    """
    between: list[Node] = []
    tensor = embedding
    while True:
        node, layer, source = step_back(tensor)
        if source is None:
            raise InputError(_no_pooling(passed + between, names))
        if _is_pooling(layer, names):
            _check_pooling(node)
            _check_between(passed + between, names)
            return source, embedding
        if isinstance(layer, keras.Model):
            inner = keras.Model(layer.inputs, _features(layer.outputs[0], names, passed + between), name=layer.name)
            feature_map, embedding = _call(node, inner, source)
            for each in reversed(between):
                embedding = _call(each, each.layer, embedding)
            return feature_map, embedding
        between.append(node)
        tensor = source


def step_back(tensor: Tensor) -> tuple[Node, keras.layers.Layer, Tensor]:
    """Return the call that made `tensor`, its layer and its input; no input where it has none, or several."""
    node = tensor.node
    sources = node.keras_inputs
    return node, node.layer, sources[0] if len(sources) == 1 and not node.is_input else None


def _call(node: Node, layer: keras.layers.Layer, tensor: Tensor) -> Any:
    """Call `layer` on `tensor` with the other arguments of `node`, such as `training=False`."""
    return layer(tensor, *node.call_args[1:], **node.call_kwargs)


def _keeps_order(layer: keras.layers.Layer) -> bool:
    """Return whether a layer after the last dense one is a softmax or nothing at all."""
    if isinstance(layer, keras.layers.Activation):
        return layer.activation in _SOFTMAX
    return isinstance(layer, keras.layers.Softmax)


def _check_dense(layer: keras.layers.Dense, source: Tensor, names: Names) -> None:
    if names.logits_layer not in ("", layer.name):
        raise InputError(f"logits_layer={names.logits_layer}: the last dense layer is {layer.name!r}")
    if layer.units < 2:
        raise InputError(f"dense layer {layer.name!r} has a single output; a backbone needs one per class, at least 2")
    if layer.activation not in _SOFTMAX:
        activation = getattr(layer.activation, "__name__", type(layer.activation).__name__)
        raise InputError(f"dense layer {layer.name!r} ends in {activation}; it must end in softmax or nothing")
    if source.shape.rank != 2:
        raise InputError(
            f"dense layer {layer.name!r} takes {tuple(source.shape)}, not one vector per image; flatten it"
        )


def _is_pooling(layer: keras.layers.Layer, names: Names) -> bool:
    if names.pooling_layer:
        return layer.name == names.pooling_layer
    return isinstance(layer, _GLOBAL_POOLING)


def _pools(node: Node) -> bool:
    """Return whether a call takes a feature map [batch, h, w, c] and gives c values per image."""
    source, result = node.keras_inputs[0].shape, tf.nest.flatten(node.outputs)[0].shape
    return source.rank == 4 and None not in result[1:] and math.prod(result[1:]) == source[-1]


def _check_pooling(node: Node) -> None:
    if not _pools(node):
        shape = tuple(node.keras_inputs[0].shape)
        raise InputError(f"pooling_layer={node.layer.name} takes {shape} and does not give one value per channel")


def _check_between(passed: list[Node], names: Names) -> None:
    """Raise an InputError if other dense layers stand before the last one and the user has not named that."""
    last, *others = [node.layer.name for node in passed if isinstance(node.layer, keras.layers.Dense)]
    if others and not names.logits_layer:
        found = ", ".join([*reversed(others), last])
        raise InputError(
            f"{len(others) + 1} dense layers follow the global pooling ({found}): pass logits_layer={last}"
            " (--backbone_logits_layer) to take what enters it as the embedding"
        )


def _no_pooling(passed: list[Node], names: Names) -> str:
    """Return what to do where the straight way back from the last dense layer meets no pooling."""
    candidates = [
        node.layer.name for node in passed if _pools(node) and tuple(node.keras_inputs[0].shape[1:3]) != (1, 1)
    ]
    where = f"before dense layer {passed[0].layer.name!r}"
    what = f"no layer named {names.pooling_layer!r}" if names.pooling_layer else "no global pooling"
    if candidates:
        return f"{what} {where}: pass pooling_layer (--backbone_pooling_layer), one of: {', '.join(candidates)}"
    return f"{what} {where}; {NEEDED}"
