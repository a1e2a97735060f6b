"""A frozen teacher beside the student that a defense trains: what it must be, and where both of them look."""

from __future__ import annotations

from typing import Any

import keras

from kerasdefense.types import InputError, UsageError


def frozen_copy(backbone: keras.Model) -> keras.Model:
    """Return a copy of a backbone, weights included, that does not train."""
    copy = type(backbone).from_config(backbone.get_config())
    copy.set_weights(backbone.get_weights())
    copy.trainable = False
    return copy


def check_teacher(student: keras.Model, teacher: keras.Model) -> None:
    """Raise an InputError unless a teacher answers the student's images with its classes."""
    if tuple(teacher.input_shape) != tuple(student.input_shape):
        raise InputError(
            f"the teacher takes images {tuple(teacher.input_shape[1:])}, the student {tuple(student.input_shape[1:])}; "
            "they must be the same"
        )
    classes = [network.output_shape["logits"][-1] for network in (teacher, student)]
    if classes[0] != classes[1]:
        raise InputError(f"the teacher has {classes[0]} classes, the student {classes[1]}; they must be the same")


def start_from(student: keras.Model, teacher: keras.Model) -> None:
    """Give the student its teacher's weights, or raise a UsageError where it is not built alike."""
    shapes = [[tuple(weight.shape) for weight in network.weights] for network in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"the student ({student.name}, {student.count_params():,} parameters) is not built as its teacher "
            f"({teacher.name}, {teacher.count_params():,}), so it cannot start from its weights: pass "
            "--nodefense_init_from_teacher, or a teacher of the same architecture and width"
        )
    student.set_weights(teacher.get_weights())


def watched(network: keras.Model, layers: str) -> keras.Model:
    """Return a network that also gives `watched`, the feature maps of some of its layers.

    Args:
        network: backbone.
        layers: names, comma-separated; "" = what enters global pooling.

    Raises:
        UsageError: a name that none of its layers has that gives a feature map.
    """
    maps = {layer.name: layer.output for layer in network.layers if _is_map(layer)}
    for name in filter(None, layers.split(",")):
        if name not in maps:
            raise UsageError(f"{network.name} has no layer {name!r} that gives a feature map; it has {', '.join(maps)}")
    chosen = [maps[name] for name in layers.split(",")] if layers else [network.output["feature_map"]]
    return keras.Model(network.input, {**network.output, "watched": chosen})


def _is_map(layer: keras.layers.Layer) -> bool:
    if isinstance(layer, keras.layers.InputLayer) or len(getattr(layer, "_inbound_nodes", ())) != 1:
        return False
    output: Any = layer.output
    return keras.backend.is_keras_tensor(output) and output.shape.rank == 4
