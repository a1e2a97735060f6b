"""What a classifier takes and returns: checks of its inputs and outputs, and logits out of probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import keras
import tensorflow as tf

from kerasdefense.types import InputError, PathFn, UsageError

OUTPUTS = ("logits", "probabilities")
"""What a classifier may return; also the key of its output where it returns several."""
Shape = tuple[Optional[int], ...]
"""Height, width and channels; None where any will do, or where it is not known."""
UNKNOWN: Shape = (None, None, None)
_LEAST, _TOLERANCE = 1e-30, 1e-3


def check_outputs(outputs: str) -> None:
    """Raise a UsageError for a word that is not in OUTPUTS."""
    if outputs not in OUTPUTS:
        raise UsageError(f"outputs must be one of {', '.join(OUTPUTS)}, not {outputs!r}")


def inputs_of(model: keras.Model) -> Optional[Sequence[Any]]:
    """Return what stands for a Keras model's inputs, None where a subclassed model has not been called yet."""
    if model.inputs:
        return list(model.inputs)
    called = model.save_spec() if hasattr(model, "save_spec") else None
    return None if called is None else tf.nest.flatten(called)


def output_of(model: keras.Model) -> Any:
    """Return what stands for a Keras model's outputs, None where it is no graph of layers."""
    is_graph = bool(model.outputs) and all(keras.backend.is_keras_tensor(each) for each in model.outputs)
    return model.output if is_graph else None


def image_shape_of(inputs: Optional[Sequence[Any]]) -> Shape:
    """Return the shape of the images that a model takes, whose inputs must be one batch of float images."""
    if inputs is None:
        return UNKNOWN
    if len(inputs) == 1 and inputs[0].dtype.is_floating and inputs[0].shape.rank in (None, 4):
        return UNKNOWN if inputs[0].shape.rank is None else tuple(inputs[0].shape[1:])
    found = " and ".join(f"{each.dtype.name} {in_words(each.shape)}" for each in inputs) or "nothing"
    raise InputError(f"it takes {found}, not one batch of float images (batch, height, width, channels)")


def selected(output: Any, key: str) -> Any:
    """Return the one output that counts: that of the name `key` in a dict, or the only one there is."""
    if isinstance(output, Mapping):
        if key not in output:
            found = ", ".join(sorted(map(str, output)))
            raise InputError(f"it returns {found}; the output that counts must have the name {key}")
        return output[key]
    if isinstance(output, (list, tuple)):
        if len(output) != 1:
            raise InputError(f"it returns {len(output)} outputs; return one, or a dict with the key {key}")
        return output[0]
    return output


def classes_of(output: Any) -> Optional[int]:
    """Return how many classes an output tells apart, None where that is not known."""
    if output is None or output.shape.rank is None:
        return None
    if output.shape.rank != 2 or output.shape[1] == 1:
        raise InputError(f"it returns {in_words(output.shape)}, not (batch, classes) with at least 2 classes")
    return output.shape[1]


def logarithm(path: PathFn) -> PathFn:
    """Return a path to logits out of one to probabilities, `log(max(p, 1e-30))`.

    Wherever it runs eagerly it raises an InputError if what it gets are no probabilities.
    """

    def logits(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        probabilities = tf.cast(path(image, seed), tf.float32)
        if tf.executing_eagerly():
            in_range = tf.reduce_all((probabilities >= -_TOLERANCE) & (probabilities <= 1 + _TOLERANCE))
            sums_to_one = tf.reduce_all(tf.abs(tf.reduce_sum(probabilities, axis=-1) - 1) < _TOLERANCE)
            if not bool(in_range & sums_to_one):
                raise InputError("it does not return probabilities that sum to 1; use outputs='logits'")
        return tf.math.log(tf.maximum(probabilities, _LEAST))

    return logits


def check_gradient(path: PathFn, image_shape: Shape) -> None:
    """Raise an InputError if no gradient of a path's output with respect to the image can be had."""
    found: list[Optional[tf.Tensor]] = []

    def gradient(image: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(image)
            output = path(image, tf.zeros([tf.shape(image)[0], 2], tf.int32))
        found.append(tape.gradient(output, image))
        return output

    reason = "no differentiable operations lead from the image to its output"
    try:
        tf.function(gradient, autograph=False).get_concrete_function(tf.TensorSpec([None, *image_shape]))
    except LookupError as error:  # an operation without a gradient, or one that was saved without it
        reason = " ".join(str(error).split())
    if not found or found[-1] is None:
        raise InputError(f"it has no gradient for attacks to follow: {reason}")


def in_words(shape: Any) -> str:
    """Return a shape as people write it."""
    return "of unknown shape" if getattr(shape, "rank", 0) is None else str(tuple(shape))
