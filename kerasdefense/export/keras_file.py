"""The defended path as a Keras model that loads with no import of ours, and models of ours as Keras loads them."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union

import keras
import numpy as np
import tensorflow as tf

from kerasdefense.backbones.own import read
from kerasdefense.defenses import Defense
from kerasdefense.export.plain_layers import NotPlainError, in_plain_layers
from kerasdefense.export.saved_model import TOLERANCE
from kerasdefense.export.signatures import is_randomised
from kerasdefense.files import replacing
from kerasdefense.types import InputError

CLASSIFIER = "classifier.keras"


def load_model(path: Union[str, Path]) -> keras.Model:
    """Return the Keras model of a run directory, a published folder or a file, uncompiled.

    Where a card goes with the file, its SHA-256 must be the card's. Python code in the file is not run.

    Args:
        path: a run directory or published folder with `model.keras`, or a .keras or .h5 file.

    Returns:
        The defense, with `call(image)` its whole defended path, or another Keras model as it was stored.

    Raises:
        InputError: there is none, Keras cannot load it, or it was changed since its card was written.
    """
    try:
        return read(path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


@contextlib.contextmanager
def classifier_file(defense: Defense, folder: Path) -> Iterator[dict[str, Any]]:
    """Put `classifier.keras` into a folder when the block ends well: the defended path in layers of Keras alone.

    It takes images float32 [batch, height, width, channels] in [0, 1] and gives logits [batch, classes]. It is loaded
    back and must give those of the defense to 1e-5. Where there can be none, one that is there is removed.

    Args:
        defense: what is exported.
        folder: the model's folder.

    Yields:
        `keras_import` of the card: the name of the file or None, and why there is none.
    """
    try:
        model = _classifier(defense)
    except NotPlainError as error:
        yield {"file": None, "reason": str(error)}
        (folder / CLASSIFIER).unlink(missing_ok=True)
        return
    with replacing(folder / CLASSIFIER) as temporary:
        _save(model, temporary)
        _compare(defense, temporary)
        yield {"file": CLASSIFIER, "reason": None}


def _classifier(defense: Defense) -> keras.Model:
    """Return the defended path as one functional model of layers of Keras alone."""
    if is_randomised(defense):
        raise NotPlainError("it draws at random for each image, which no layer of Keras does in inference")
    backbone, purifier = defense.backbone, defense.purification()
    if purifier is None and type(defense).call is not Defense.call:
        raise NotPlainError(f"{type(defense).__name__} computes logits in a way of its own, not by its backbone alone")
    classifier = keras.Model(backbone.inputs, backbone.output["logits"], name="classifier")
    return in_plain_layers(*([] if purifier is None else [purifier]), classifier)


def _save(model: keras.Model, file: Path) -> None:
    """Save a functional model so that Keras 3 loads it as well.

    That does not know the module that Keras 2 names for functional models, takes a number for the axis of a batch
    normalisation, and where inputs are a list of one asks for such a list.
    """
    model.save(file)
    with zipfile.ZipFile(file) as stored:
        contents = {info.filename: stored.read(info) for info in stored.infolist()}
    whole = json.loads(contents["config.json"])
    whole |= {"module": "keras.models", "class_name": "Model", "registered_name": None}
    for ends in ("input_layers", "output_layers"):
        (whole["config"][ends],) = whole["config"][ends]
    for each in whole["config"]["layers"]:
        if isinstance(each["config"].get("axis"), list) and each["class_name"] == "BatchNormalization":
            (each["config"]["axis"],) = each["config"]["axis"]
    contents["config.json"] = json.dumps(whole).encode()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as compressed:
        for name, content in contents.items():
            compressed.writestr(name, content)


def _compare(defense: Defense, file: Path) -> None:
    image = tf.constant(np.random.default_rng(0).random((4, *defense.backbone.input_shape[1:]), np.float32))
    found = keras.models.load_model(file, compile=False)(image).numpy()
    expected = tf.cast(defense(image, training=False), tf.float32).numpy()
    difference = float(np.max(np.abs(found - expected)) / max(1.0, np.max(np.abs(expected))))
    if not difference <= TOLERANCE:
        raise InputError(f"{CLASSIFIER} differs from the model by {difference:.1e} in logits; it was not kept")
