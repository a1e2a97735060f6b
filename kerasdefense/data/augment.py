"""Random crops and flips of whole batches, drawn per example and epoch."""

from __future__ import annotations

import dataclasses
import re

import tensorflow as tf

from kerasdefense import config
from kerasdefense.data.records import ImageShape
from kerasdefense.types import UsageError

NOT_FLIPPED = (
    "binarized_mnist",
    "binary_alpha_digits",
    "cmaterdb",
    "digits",
    "emnist",
    "kmnist",
    "mnist",
    "mnist_corrupted",
    "omniglot",
    "svhn_cropped",
)
"""Sets of characters, which mean something else in a mirror."""


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """A random crop of an image reflected at its borders, and a random horizontal flip.

    Attributes:
        padding: pixels by which a crop moves at most, in each direction; 0 = no crop.
        flip: whether half of the images are mirrored left to right.
    """

    padding: int
    flip: bool

    def draw(self, examples: int, seed: tf.Tensor) -> tf.Tensor:
        """Draw for every example of a split at once, so that a draw depends on nothing but seed and index.

        Args:
            examples: number of examples of the source split.
            seed: int64 [2].

        Returns:
            int32 [examples, 3]: shifts of rows and of columns in [-padding, padding], and 1 where flipped.
        """
        shift = tf.random.stateless_uniform([examples, 2], seed, -self.padding, self.padding + 1, tf.int32)
        flip = tf.random.stateless_uniform([examples, 1], seed + 1, 0, 1 + int(self.flip), tf.int32)
        return tf.concat([shift, flip], axis=1)

    def augmented(self, image: tf.Tensor, uniform: tf.Tensor) -> tf.Tensor:
        """Move and mirror each image of a batch by numbers that are drawn elsewhere.

        Args:
            image: any type, [batch, height, width, channels].
            uniform: float32 [batch, 3] in [0, 1): for the shifts of rows and columns, and for the flip.
        """
        shift = tf.cast(uniform[:, :2] * (2 * self.padding + 1), tf.int32) - self.padding
        flip = tf.cast(uniform[:, 2:] * (1 + int(self.flip)), tf.int32)
        return self(image, tf.concat([shift, flip], axis=1))

    def __call__(self, image: tf.Tensor, draw: tf.Tensor) -> tf.Tensor:
        """Move and mirror each image of a batch.

        Args:
            image: any type, [batch, height, width, channels].
            draw: int32 [batch, 3], rows of `draw()`.

        Returns:
            Images of the same type and shape.
        """
        if self.padding:
            image = tf.gather(image, _reflected(image.shape[1], draw[:, 0]), axis=1, batch_dims=1)
        if self.padding or self.flip:
            column = _reflected(image.shape[2], draw[:, 1])
            column = tf.where(draw[:, 2:] == 1, column[:, ::-1], column)
            image = tf.gather(image, column, axis=2, batch_dims=1)
        return image


def from_config(data: config.Data, image_shape: ImageShape) -> Augmentation:
    """Return the augmentation that a configuration asks for.

    Args:
        data: its `augment`, `crop_padding` and, for "auto", `name`.
        image_shape: (height, width, channels).

    Raises:
        UsageError: an unknown augmentation, or a padding that is no smaller than the image.
    """
    if data.augment not in ("auto", "none", "crop", "crop_flip"):
        raise UsageError(f"unknown --data_augment={data.augment}; valid: auto, none, crop, crop_flip")
    side = min(image_shape[:2])
    if not 0 <= data.crop_padding < side:
        raise UsageError(
            f"--data_crop_padding={data.crop_padding} must be at least 0 and below the images' side, {side}"
        )
    base_name = re.split("[/:]", data.name)[0]
    flip = data.augment == "crop_flip" or (data.augment == "auto" and base_name not in NOT_FLIPPED)
    if data.augment == "none":
        return Augmentation(padding=0, flip=False)
    return Augmentation(padding=data.crop_padding or side // 8, flip=flip)


def _reflected(side: int, shift: tf.Tensor) -> tf.Tensor:
    """Return int32 [batch, side]: the places `shift` .. `shift + side - 1`, reflected into [0, side)."""
    place = tf.abs(shift[:, None] + tf.range(side))
    return tf.minimum(place, 2 * (side - 1) - place)
