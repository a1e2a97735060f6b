"""A training batch, and the checks it passes before anything is trained on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from kerasdefense.types import UsageError

IMAGE_ADV = "image_adv"
"""What a dict of a batch calls its images as they were attacked before training, where a method asks for that."""


class Batch(NamedTuple):
    """A training batch: image float32 [batch, h, w, c] in [0, 1], label int32 [batch], index int32 [batch]."""

    image: tf.Tensor
    label: tf.Tensor
    index: tf.Tensor


def unpack(data: Any, classes: int) -> Batch:
    """Return the batch in `data`: a dict with image, label and index, or a plain `(image, label)`.

    Plain data carry no index; an example's place in the global batch stands in for it. Images outside [0, 1] or
    labels outside [0, classes) stop the step.
    """
    if isinstance(data, Mapping):
        image, label, index = data["image"], data["label"], data["index"]
    else:
        image, label, weight = keras.utils.unpack_x_y_sample_weight(data)
        if weight is not None:
            raise UsageError("sample and class weights are not used by any defense; pass plain (image, label)")
        size = tf.shape(image)[0]
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        index = tf.range(size) + size * tf.cast(replica, tf.int32)
    image, label = tf.cast(image, tf.float32), tf.cast(label, tf.int32)
    if label.shape.rank == 2 and label.shape[1] == 1:
        label = label[:, 0]
    if label.shape.rank != 1:
        raise UsageError(f"labels must be class numbers of shape [batch], not {label.shape}, not one-hot")
    checks = [
        tf.debugging.Assert(
            tf.reduce_all((image >= 0) & (image <= 1)),
            ["images must be in [0, 1] and not NaN; scale them before training"],
        ),
        tf.debugging.Assert(
            tf.reduce_all((label >= 0) & (label < classes)),
            [f"labels must be in [0, {classes}), one class of the model each"],
        ),
    ]
    with tf.control_dependencies([check for check in checks if check is not None]):
        return Batch(tf.identity(image), tf.identity(label), tf.cast(index, tf.int32))


def is_labelled(data: Any) -> bool:
    """Return whether a batch holds labels."""
    if isinstance(data, Mapping):
        return "label" in data
    return keras.utils.unpack_x_y_sample_weight(data)[1] is not None


def with_labels(data: Any) -> Any:
    """Return a batch without labels with labels of no meaning."""
    if isinstance(data, Mapping):
        return {**data, "label": tf.zeros_like(data["index"])}
    image, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    return image, tf.zeros([tf.shape(image)[0]], tf.int32)
