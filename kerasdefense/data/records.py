"""Labelled images still in their encoded form, and how they are decoded to one shape."""

from __future__ import annotations

import dataclasses
import re
from typing import Callable

import numpy as np
import tensorflow as tf

from kerasdefense.types import InputError

ImageShape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """The images of one split of a source, in an order that never changes.

    Attributes:
        label: int32 [highest index + 1], each in [0, classes), or -1 where the class is not known or no example is.
        read: returns a dataset of all examples in ascending order: an encoded image, the path of a file, or uint8
            pixels.
        decode: turns one such element into uint8 [height, width, channels].
        name: says where the example of an index was found.
        index: int64 [examples], ascending: the number of each example; None = they are numbered without a gap.
    """

    label: np.ndarray
    read: Callable[[], tf.data.Dataset]
    decode: Callable[[tf.Tensor], tf.Tensor]
    name: Callable[[int], str]
    index: np.ndarray | None = None

    @property
    def numbers(self) -> np.ndarray:
        """Return int64 [examples], ascending: the number of each example."""
        return np.arange(len(self.label)) if self.index is None else self.index

    def numbered(self) -> tf.data.Dataset:
        """Return a dataset of (int64 number, element) of all examples."""
        if self.index is None:
            return self.read().enumerate()
        return tf.data.Dataset.zip((tf.data.Dataset.from_tensor_slices(self.index), self.read()))


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A data set as it was found, before anything is held out.

    Attributes:
        name: what it is called.
        labels: class names, in label order.
        image_shape: (height, width, channels) of every decoded image.
        train: the training images.
        validation: its own validation images, if it has any beside test images.
        test: its test images, if it has any.
        unknown: images of unknown classes, label -1, if it has divided its classes itself.
    """

    name: str
    labels: tuple[str, ...]
    image_shape: ImageShape
    train: Records
    validation: Records | None = None
    test: Records | None = None
    unknown: Records | None = None


def decode(encoded: tf.Tensor, image_shape: ImageShape, resize: bool) -> tf.Tensor:
    """Decode a PNG, JPEG, BMP or (its first frame) GIF image.

    Args:
        encoded: string scalar, the bytes of an image file.
        image_shape: (height, width, channels) of the result.
        resize: whether to resize an image of another size (bilinear, antialiased where it shrinks).

    Returns:
        uint8 [height, width, channels]; without `resize` the image's own height and width.
    """
    image = tf.io.decode_image(encoded, channels=image_shape[2], expand_animations=False)
    if not resize:
        return image
    resized = tf.image.resize(tf.ensure_shape(image, (None, None, image_shape[2])), image_shape[:2], antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)


def check_labels(label: np.ndarray, classes: int, where: str) -> None:
    """Raise an InputError that names the first label outside [0, classes) of the split called `where`."""
    wrong = np.flatnonzero((label < 0) | (label >= classes))
    if wrong.size:
        raise InputError(
            f"{where}: example {wrong[0]} has label {label[wrong[0]]}, not one of the labels "
            f"0..{classes - 1} of its {classes} classes"
        )


def first_line(error: Exception) -> str:
    """Return what an error says, cut to its first line and without TensorFlow's names of nodes."""
    message = re.sub(r"\{\{.*?\}\}\s*", "", getattr(error, "message", None) or str(error)).strip()
    return message.splitlines()[0].rstrip(":") if message else type(error).__name__
