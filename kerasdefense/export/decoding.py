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
_GIF_BLOCKS = 1 << 17
"""Blocks of a GIF that are walked through; an image of LARGEST pixels has no more, of 255 bytes each."""
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM")


def files_as_images(files: tf.Tensor, image_shape: Sequence[int]) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the images of PNG, JPEG, BMP or GIF files, and which of these could be read.

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
    # Grey is made from colour, since BMP and GIF files are not decoded to one channel.
    image = tf.io.decode_image(_checked(file), channels=max(channels, 3), expand_animations=False)
    image = tf.ensure_shape(image, (None, None, max(channels, 3)))
    image = tf.image.rgb_to_grayscale(image) if channels == 1 else image
    resized = tf.image.resize(image, (height, width), antialias=True)
    return tf.ensure_shape(tf.clip_by_value(tf.round(resized), 0, 255) / 255, tuple(image_shape))


def _checked(file: tf.Tensor) -> tf.Tensor:
    """Return a file, a GIF up to its first frame; an empty one in place of one that is too large or of no known kind.

    What the decoder gets depends on the check, so that it cannot run before it.
    """
    starts = [tf.strings.substr(file, 0, len(magic)) == magic for magic in _MAGIC]
    kind = tf.argmax(tf.stack([*starts, True]))
    headers = (_jpeg, _png, _gif, _bmp, lambda file: ("", tf.constant([0, 0], tf.int64)))
    known, sides = tf.switch_case(tf.cast(kind, tf.int32), [lambda header=header: header(file) for header in headers])
    pairs = tf.reshape(sides, [-1, 2])
    fits = tf.reduce_all(pairs > 0) & tf.reduce_all(pairs[:, 0] <= LARGEST // pairs[:, 1])
    return tf.where(fits, known, "")


def _jpeg(file: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    return file, tf.cast(tf.image.extract_jpeg_shape(file)[:2], tf.int64)


def _png(file: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    return file, _numbers(file, 16, tf.int32, little_endian=False)


def _bmp(file: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    return file, tf.abs(_numbers(file, 18, tf.int32))  # a height below zero tells that rows go downwards


def _gif(file: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return a GIF up to its first frame, since the decoder unpacks all, and the sides of screen and frame [2 * 2]."""
    content = tf.io.decode_raw(file, tf.uint8)

    def at(place: tf.Tensor) -> tf.Tensor:
        return tf.cast(content[place], tf.int32)

    def table(flags: tf.Tensor) -> tf.Tensor:
        return tf.where(flags >= 128, 3 * tf.bitwise.left_shift(2, flags % 8), 0)

    def step(place: tf.Tensor, frame: tf.Tensor, inside: tf.Tensor) -> tuple[tf.Tensor, ...]:
        byte = at(place)
        is_extension, is_frame = ~inside & (byte == 0x21), ~inside & (byte == 0x2C)
        with tf.control_dependencies([tf.debugging.Assert(inside | is_extension | is_frame, ["no block of a GIF"])]):
            past_frame = place + 11 + tf.cond(is_frame, lambda: table(at(place + 9)), lambda: 0)
        after = tf.where(is_frame, past_frame, tf.where(is_extension, place + 2, place + 1 + byte))
        return after, tf.where(is_frame, place, frame), ~inside | (byte > 0)

    start = 13 + table(at(10))
    end, frame, inside = tf.while_loop(
        lambda place, frame, inside: inside | (frame == 0),
        step,
        (start, 0, False),
        maximum_iterations=_GIF_BLOCKS,
    )
    sides = tf.concat([_numbers(file, 6, tf.uint16), _numbers(file, frame + 5, tf.uint16)], axis=0)
    return tf.where(inside, "", tf.strings.substr(file, 0, end) + ";"), sides


def _numbers(file: tf.Tensor, place: tf.Tensor, dtype: tf.DType, *, little_endian: bool = True) -> tf.Tensor:
    """Return the two numbers that a file holds from a place on, int64 [2]."""
    field = tf.strings.substr(file, place, 2 * dtype.size)
    return tf.cast(tf.ensure_shape(tf.io.decode_raw(field, dtype, little_endian=little_endian), [2]), tf.int64)
