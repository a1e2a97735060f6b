"""Image files and tf.Examples as images, in a graph of core TensorFlow operations, each row of a batch by itself.

TensorFlow's decoders fail for a whole batch. Here every row is an element of a dataset whose errors are ignored: a file
that cannot be read is missing in it, and the others are as they would be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable

import tensorflow as tf

LARGEST = 1 << 24
"""Pixels of a file's image, width * height as its header has them; files of larger images are not decoded."""
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
"""How JPEG and PNG files begin, a PNG with its header, which tells the size: behind another chunk it is not read."""


def files_as_images(files: tf.Tensor, image_shape: Sequence[int]) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the images of PNG or JPEG files, and which of these could be read.

    Args:
        files: string [batch].
        image_shape: (height, width, channels) that images are resized and converted to.

    Returns:
        Images float32 [batch, height, width, channels] in 256 levels of [0, 1], zeros where a file is broken or its
        header tells of more than LARGEST pixels; and bool [batch], false there.
    """
    return _by_row(files, lambda file: _image(file, image_shape), image_shape)


def examples_as_images(examples: tf.Tensor, image_shape: Sequence[int]) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the images of serialised `tf.train.Example` string [batch] with such a file as feature `image`, likewise.

    A row that is no such example is like one whose file is broken.
    """
    spec = {"image": tf.io.FixedLenFeature([], tf.string)}
    return _by_row(
        examples, lambda row: _image(tf.io.parse_single_example(row, spec)["image"], image_shape), image_shape
    )


def _by_row(
    rows: tf.Tensor, read: Callable[[tf.Tensor], tf.Tensor], image_shape: Sequence[int]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return `read(row)` of every row, zeros where it raises; and where it does not."""
    size = tf.size(rows, tf.int64)
    beyond = tf.data.Dataset.from_tensors((size, tf.zeros(image_shape)))  # so that there is one element
    read_rows = tf.data.Dataset.from_tensor_slices(rows).enumerate().map(lambda index, row: (index, read(row)))
    found = read_rows.ignore_errors().concatenate(beyond).batch(size + 1)
    index, image = found.get_single_element()
    images = tf.scatter_nd(index[:, None], image, tf.stack([size + 1, *image_shape]))
    valid = tf.scatter_nd(index[:, None], tf.ones_like(index), [size + 1]) > 0
    return tf.ensure_shape(images[:size], (None, *image_shape)), valid[:size]


def _image(file: tf.Tensor, image_shape: Sequence[int]) -> tf.Tensor:
    """Return one file's image [height, width, channels] in 256 levels of [0, 1]; the graph raises if it is broken."""
    height, width, channels = image_shape
    # Grey is made from colour here, so that both kinds are weighed alike.
    image = tf.io.decode_image(_checked(file), channels=max(channels, 3), expand_animations=False)
    image = tf.ensure_shape(image, (None, None, max(channels, 3)))
    image = tf.image.rgb_to_grayscale(image) if channels == 1 else image
    resized = tf.image.resize(image, (height, width), antialias=True)
    return tf.ensure_shape(tf.clip_by_value(tf.round(resized), 0, 255) / 255, tuple(image_shape))


def _checked(file: tf.Tensor) -> tf.Tensor:
    """Return a file, or an empty one in place of one that is too large or neither PNG nor JPEG.

    What the decoder gets depends on the check, so that it cannot run before it.
    """
    starts = [tf.strings.substr(file, 0, len(magic)) == magic for magic in _MAGIC]
    kind = tf.argmax(tf.stack([*starts, True]))
    headers = (_jpeg, _png, lambda file: tf.constant([0, 0], tf.int64))
    sides = tf.switch_case(tf.cast(kind, tf.int32), [lambda header=header: header(file) for header in headers])
    fits = tf.reduce_all(sides > 0) & (sides[0] <= LARGEST // sides[1])
    return tf.where(fits, file, "")


def _jpeg(file: tf.Tensor) -> tf.Tensor:
    """Return the sides of a JPEG's image in pixels, int64 [2]."""
    return tf.cast(tf.image.extract_jpeg_shape(file)[:2], tf.int64)


def _png(file: tf.Tensor) -> tf.Tensor:
    """Return the sides of a PNG's image in pixels, int64 [2]."""
    sides = tf.io.decode_raw(tf.strings.substr(file, 16, 8), tf.int32, little_endian=False)
    return tf.cast(tf.ensure_shape(sides, [2]), tf.int64)
