"""A bank of training images by class, from which a method draws one of any class while it trains."""

from __future__ import annotations

from typing import Callable, Optional

import numpy as np
import tensorflow as tf

from kerasdefense.attacks import seeds
from kerasdefense.types import InputError

AUGMENTATION_DRAWS = 3
"""Numbers from [0, 1) that an augmentation takes of each image."""
_DRAWS = 1 + AUGMENTATION_DRAWS

Augment = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
"""`augment(image [batch, h, w, c], uniform [batch, AUGMENTATION_DRAWS]) -> image`, of any type."""


class ExampleBank:
    """Training images, sorted by class, in the memory of the host: one copy per process, gathered in the graph.

    `image` and `label` are kept, in that order.

    Args:
        image: uint8 [n, h, w, c], grey levels.
        label: int [n], in [0, classes).
        classes: number of classes.
        augment: what is done to an image that is drawn; None = nothing.

    Raises:
        InputError: images or labels of another type or number, or a class with fewer than two images.
    """

    def __init__(
        self,
        image: np.ndarray,
        label: np.ndarray,
        *,
        classes: int,
        augment: Optional[Augment] = None,
    ) -> None:
        if image.dtype != np.uint8 or image.ndim != 4 or not np.issubdtype(label.dtype, np.integer):
            found = f"{image.dtype} {image.shape} and {label.dtype} labels"
            raise InputError(f"a bank holds uint8 images [n, h, w, c] and integer labels, not {found}")
        if label.shape != (len(image),) or (len(label) and not 0 <= label.min() <= label.max() < classes):
            raise InputError(f"a bank of {len(image)} images needs as many labels, in [0, {classes})")
        count = np.bincount(label, minlength=classes)
        check_counts(count, [str(each) for each in range(classes)])
        if (np.diff(label) < 0).any():
            order = np.argsort(label, kind="stable")
            image, label = image[order], label[order]
        with tf.device("CPU:0"):
            self.image, self.label = tf.constant(image), tf.constant(label)
        self.count = tf.constant(count, tf.int32)
        self.offset = tf.constant(np.cumsum(count) - count, tf.int32)
        self.augment = augment

    def rows(self, label: tf.Tensor, uniform: tf.Tensor) -> tf.Tensor:
        """Return for each class a row of the bank that is of it, int32 [batch].

        Args:
            label: int32 [batch], the classes.
            uniform: float32 [batch], in [0, 1); every image of a class has an equal part of that.
        """
        count = tf.gather(self.count, label)
        place = tf.cast(uniform * tf.cast(count, tf.float32), tf.int32)
        return tf.gather(self.offset, label) + tf.minimum(place, count - 1)

    def draw(self, label: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Return an image of each class, drawn with replacement and augmented, float32 [batch, h, w, c] in [0, 1].

        Args:
            label: int32 [batch], the classes.
            seed: int32 [batch, 2], one per example.
        """
        uniform = seeds.uniform(seed, tf.zeros_like(label), _DRAWS)
        rows = self.rows(label, uniform[:, 0])
        with tf.device("CPU:0"):
            image = tf.gather(self.image, rows)
        if self.augment is not None:
            image = self.augment(image, uniform[:, 1:])
        return tf.cast(image, tf.float32) / 255


def check_counts(count: np.ndarray, labels: list[str]) -> None:
    """Raise an InputError unless every class has two images at least.

    Args:
        count: int [classes], images of each class.
        labels: names of the classes.
    """
    few = np.flatnonzero(np.asarray(count) < 2)
    if few.size:
        name, there = labels[few[0]], int(count[few[0]])
        raise InputError(
            f"class {name!r} has {there} training image{'s' * (there != 1)}; a method that draws images of a class "
            "needs at least 2 of each"
        )
