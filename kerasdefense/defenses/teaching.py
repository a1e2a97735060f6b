"""Frozen networks beside those that a defense trains: a student's teacher, and a classifier behind a purifier."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import keras

from kerasdefense import backbones, config
from kerasdefense.defenses.stage import Stage
from kerasdefense.types import InputError, UsageError


def frozen_copy(network: keras.Model) -> keras.Model:
    """Return a copy of a backbone, weights included, that does not train."""
    copy = type(network).from_config(network.get_config())
    copy.set_weights(network.get_weights())
    copy.trainable = False
    return copy


def classifier_stage(run: config.Run) -> Stage:
    """Return the training, on clean images, of the classifier that a run puts a purifier before.

    Raises:
        UsageError: epochs are given for a classifier that is not trained.
    """
    own = run.defense
    if own.classifier and own.classifier_epochs:
        raise UsageError(
            "--defense_classifier_epochs is for a classifier that is trained; leave it or --defense_classifier out"
        )
    epochs = own.classifier_epochs or run.train.epochs
    of_classifier = dataclasses.replace(
        run,
        defense=config.Defense(),
        attack=config.Attack(norm=run.attack.norm, epsilon=run.attack.epsilon),
        train=dataclasses.replace(run.train, epochs=epochs, validate_every=min(run.train.validate_every, epochs)),
    )
    names = {"pooling_layer": run.backbone.pooling_layer, "logits_layer": run.backbone.logits_layer}
    take = functools.partial(backbones.as_backbone, **(names if own.classifier else {}))
    return Stage("classifier", of_classifier, take=take, saved=own.classifier, must_know=True)


def teacher_for(student: keras.Model, teacher: keras.Model) -> keras.Model:
    """Return a frozen copy of a teacher, for the images of its student.

    Raises:
        InputError: it takes other images, or has other classes.
    """
    image_shape, classes = tuple(student.input_shape[1:]), student.output_shape["logits"][-1]
    try:
        return frozen_copy(backbones.fitted(teacher, image_shape=image_shape, classes=classes))
    except InputError as error:
        raise InputError(f"the teacher does not fit its student: {error}") from error


def start_from(student: keras.Model, teacher: keras.Model) -> None:
    """Give the student its teacher's weights, or raise a UsageError where it is not built alike."""
    pairs = list(itertools.zip_longest(*(_weighted_layers(network) for network in (student, teacher))))
    shapes = [[layer and [tuple(each.shape) for each in layer.weights] for layer in pair] for pair in pairs]
    if any(own != of_teacher for own, of_teacher in shapes):
        raise UsageError(
            f"the student ({student.name}, {student.count_params():,} parameters) is not built as its teacher "
            f"({teacher.name}, {teacher.count_params():,}), so it cannot start from its weights: pass "
            "--nodefense_init_from_teacher, or a teacher of the same architecture and width"
        )
    for own, of_teacher in pairs:
        own.set_weights(of_teacher.get_weights())


def _weighted_layers(network: keras.Model) -> list[keras.layers.Layer]:
    """Return the layers that hold weights and no other layers, which do not change their order when frozen."""
    layers = [each for each in network.submodules if isinstance(each, keras.layers.Layer) and each.weights]
    return [each for each in layers if not any(isinstance(part, keras.layers.Layer) for part in each.submodules)]


def watched(network: keras.Model, layers: str) -> keras.Model:
    """Return a network that also gives `watched`, the feature maps of some of its layers.

    Args:
        network: backbone.
        layers: names, comma-separated; "" = what enters global pooling.

    Raises:
        UsageError: a name that none of its layers has that gives a feature map.
    """
    maps = {name: tensor for name, (_, tensor) in backbones.maps_of(network).items()} if layers else {}
    names = layer_names(layers)
    for name in names:
        if name not in maps:
            raise UsageError(f"{network.name} has no layer {name!r} that gives a feature map; it has {', '.join(maps)}")
    chosen = [maps[name] for name in names] or [network.output["feature_map"]]
    return keras.Model(network.input, {**network.output, "watched": chosen})


def layer_names(layers: str) -> list[str]:
    """Return the names in a list of them, comma-separated."""
    return [name.strip() for name in layers.split(",") if name.strip()]
