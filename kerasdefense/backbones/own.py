"""A user's own Keras classifier as a backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Optional, Union

import keras
from keras.src.saving.serialization_lib import SafeModeScope

from kerasdefense import config, integrity
from kerasdefense.backbones import head
from kerasdefense.backbones.blocks import ImageShape
from kerasdefense.layers import Logits
from kerasdefense.types import InputError

_PUBLISHED = "model.keras"
"""The model in a run directory or a published folder."""


def as_backbone(
    keras_model: keras.Model,
    *,
    pooling_layer: str = "",
    logits_layer: str = "",
    preprocess: Optional[keras.layers.Layer] = None,
) -> keras.Model:
    """Return a functional or Sequential Keras classifier as a backbone, to be trained on from its weights.

    The backbone is made of the model's own layers: no weight is copied, and training one trains the other.
    Its outputs are `feature_map` (what enters global pooling), `embedding` (what enters the last Dense) and
    `logits` (what that Dense gives before any softmax). Models nested in the model are searched too.
    BatchNormalization layers keep their settings: over several replicas each takes its own replica's
    statistics, unless the layer says `synchronized=True`.

    Args:
        keras_model: built classifier of float images [batch, height, width, channels] that ends in global
            pooling and one Dense, with or without a softmax; Dropout, Flatten, Reshape or normalisation
            between the two are fine. A model that has the outputs of a backbone is returned as it is, and of a
            defense its backbone.
        pooling_layer: name of the layer that pools, where it is none of Keras' global pooling layers.
        logits_layer: name of the last Dense, where others stand between it and the pooling.
        preprocess: layer from images in [0, 1] to what the model was trained on, for instance
            `keras.layers.Rescaling(2, offset=-1)` for MobileNetV2; None = the model takes images in [0, 1],
            or begins with such a layer. Nothing is guessed.

    Raises:
        InputError: if the model is of another kind, or the name of a layer is needed.
    """
    if hasattr(keras_model, "attack_paths"):
        keras_model = keras_model.backbone
    _check_graph(keras_model)
    if isinstance(keras_model.output, dict) and {"feature_map", "embedding", "logits"} <= set(keras_model.output):
        if preprocess is not None:
            raise InputError(f"model {keras_model.name!r} is a backbone, which takes [0, 1]; leave preprocess out")
        return keras_model
    trunk, dense = head.split(keras_model, head.Names(pooling_layer, logits_layer))
    image = keras.Input(keras_model.inputs[0].shape[1:], dtype="float32", name="image")
    feature_map, embedding = trunk(image if preprocess is None else preprocess(image))
    logits = Logits(dense, dtype=dense.variable_dtype, name="logits")(embedding)
    outputs = {"feature_map": feature_map, "embedding": embedding, "logits": logits}
    return keras.Model(image, outputs, name=keras_model.name)


def load(backbone: config.Backbone, *, image_shape: ImageShape, classes: int) -> keras.Model:
    """Return the user's model in `backbone.path` (.keras, .h5, SavedModel folder) as a backbone for the data.

    The model must take images in [0, 1], and so hold its preprocessing. Python code in the file is not run;
    custom layers must be registered with Keras.

    Raises:
        InputError: if there is no such model, or it does not fit images of `image_shape` or the number of
            `classes`.
    """
    flag = f"--backbone_path={backbone.path}"
    try:
        model = as_backbone(
            read(backbone.path), pooling_layer=backbone.pooling_layer, logits_layer=backbone.logits_layer
        )
    except InputError as error:
        raise InputError(f"{flag}: {error}") from error
    try:
        return fitted(model, image_shape=image_shape, classes=classes)
    except InputError as error:
        raise InputError(f"{flag}: {error}") from error


def fitted(backbone: keras.Model, *, image_shape: ImageShape, classes: int) -> keras.Model:
    """Return a backbone for images of one shape: itself, or where it takes any size, one that is made of it.

    Raises:
        InputError: it does not take images of `image_shape`, or has another number of `classes`.
    """
    shape = tuple(backbone.inputs[0].shape[1:])
    if any(side not in (None, given) for side, given in zip(shape, image_shape)):
        raise InputError(f"the model takes images of {shape}, but those of the data are {tuple(image_shape)}")
    outputs = backbone.output["logits"].shape[-1]
    if outputs != classes:
        raise InputError(f"the model has {outputs} classes, but the data has {classes}")
    if shape == tuple(image_shape):
        return backbone
    image = keras.Input(image_shape, dtype="float32", name="image")
    return keras.Model(image, backbone(image), name=backbone.name)


def read(path: Union[str, Path]) -> keras.Model:
    """Return the Keras model in a file or folder (.keras, .h5, SavedModel, or a folder with model.keras), uncompiled.

    Python code in the file is not run; custom layers must be registered with Keras.

    Raises:
        InputError: if there is none, Keras cannot load it, or it is not what the card of its folder was written of.
    """
    file = Path(path).expanduser()
    if not file.exists():
        raise InputError("no such file or folder")
    if (file / _PUBLISHED).is_file():
        file = file / _PUBLISHED
    integrity.check(file)
    try:
        with SafeModeScope(True):  # the safe_mode of load_model holds for .keras only
            return keras.models.load_model(file, compile=False)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"Keras cannot load it: {reason}") from error


def _check_graph(model: keras.Model) -> None:
    """Raise an InputError unless the model is a graph of layers from one batch of float images."""
    if not isinstance(model, keras.Model):
        raise InputError(f"{type(model).__name__} is no Keras model; {head.NEEDED}")
    if not model.inputs or not all(keras.backend.is_keras_tensor(tensor) for tensor in model.outputs or [None]):
        if isinstance(model, keras.Sequential):
            raise InputError(f"model {model.name!r} is not built: begin it with keras.Input(shape)")
        raise InputError(f"model {model.name!r} is a subclassed model; a backbone needs a functional or Sequential one")
    found = " and ".join(f"{each.dtype.name} {tuple(each.shape)}" for each in model.inputs)
    if len(model.inputs) > 1 or model.inputs[0].shape.rank != 4 or not model.inputs[0].dtype.is_floating:
        raise InputError(f"model {model.name!r} takes {found}, not float images (batch, height, width, channels)")
