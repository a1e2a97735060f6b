"""Image-classification sets of TensorFlow Datasets, by name."""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from kerasdefense import config
from kerasdefense.data.digits import Digits
from kerasdefense.data.records import ImageShape, Records, Source, check_labels, decode, first_line
from kerasdefense.types import InputError, UsageError

_SPLITS = ("train", "validation", "test")


def read(data: config.Data) -> Source:
    """Open a set, preparing (digits) or downloading it (any other) where it is not there yet.

    Args:
        data: its `name`, `dir` (empty = TFDS' own default) and `image_size`.

    Raises:
        UsageError: not the name of an image-classification set.
        InputError: it cannot be downloaded or read, or its images differ in size and `image_size` is 0.
    """
    builder = _builder(data)
    image_key, label_key = _keys(builder)
    if not builder.data_path.exists():
        _prepare(builder)
    labels = tuple(builder.info.features[label_key].names)
    image_shape = _image_shape(builder, image_key, data.image_size)
    to_image = functools.partial(decode, image_shape=image_shape, resize=data.image_size > 0)
    found = {}
    for split in _SPLITS:
        label = _labels(builder, split, label_key)
        # The test labels of some sets are kept secret: all are -1.
        if (label >= 0).any():
            check_labels(label, len(labels), f"{builder.info.full_name} {split}")
            encoded = functools.partial(_encoded, builder, split, image_key)
            found[split] = Records(label, encoded, to_image, f"{builder.data_path} {split} example {{}}".format)
    if "train" not in found:
        raise UsageError(f"--data_name={data.name} has no labelled train split; it has {_listed(builder.info.splits)}")
    if "test" not in found and "validation" in found:
        found["test"] = found.pop("validation")
    return Source(data.name, labels, image_shape, **found)


def _builder(data: config.Data) -> Any:
    if data.name == "digits":
        return Digits(data_dir=data.dir or None)
    try:
        return tfds.builder(data.name, data_dir=data.dir or None)
    except tfds.core.DatasetNotFoundError as error:
        names = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(data.name, names, n=3)
        advice = f"did you mean {' or '.join(close)}? " if close else ""
        raise UsageError(
            f"--data_name={data.name} is not a TFDS set; {advice}valid: digits, folder, examples, or a name of "
            f"https://www.tensorflow.org/datasets/catalog"
        ) from error
    except (ValueError, AssertionError, ImportError) as error:
        raise UsageError(f"--data_name={data.name}: {first_line(error)}") from error


def _keys(builder: Any) -> tuple[str, str]:
    """Return the names of the features that hold the image and its class."""
    features = builder.info.features
    supervised = builder.info.supervised_keys
    pairs = [("image", "label")] + ([supervised] if supervised and len(supervised) == 2 else [])
    for image_key, label_key in pairs:
        known = isinstance(image_key, str) and image_key in features and label_key in features
        if not known or not isinstance(features[image_key], tfds.features.Image):
            continue
        if isinstance(features[label_key], tfds.features.ClassLabel) and features[label_key].num_classes:
            return image_key, label_key
    raise UsageError(
        f"--data_name={builder.name} is not an image-classification set (an image and a class label); "
        f"its features are {_listed(features)}"
    )


def _prepare(builder: Any) -> None:
    """Write the set to its data directory, where TFDS will find it from then on."""
    bundled = isinstance(builder, Digits)
    silence = io.StringIO()
    errors = silence if bundled else sys.stderr
    try:
        if not bundled:
            _announce_download(builder)
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(errors):
            builder.download_and_prepare()
    except Exception as error:
        # Another process may have finished the same set meanwhile.
        if not builder.data_path.exists():
            raise InputError(
                f"cannot prepare {builder.info.full_name} in {builder.data_path}: {first_line(error)}; "
                f"pass the TFDS folder that holds it, or can be written, as --data_dir"
            ) from error


def _announce_download(builder: Any) -> None:
    """Say what is downloaded to where; raise at once, not after minutes of retries, where there is no network."""
    files = builder.url_infos or {}
    size = builder.info.download_size or sum(info.size for info in files.values())
    shown = f"{size / 2**20:,.0f} MiB" if size else "size unknown"
    print(f"downloading {builder.info.full_name} ({shown}) into {builder.data_path}", flush=True)
    for url in [url for url in files if url.startswith("http")][:1]:
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=20).close()


def _image_shape(builder: Any, image_key: str, image_size: int) -> ImageShape:
    feature = builder.info.features[image_key]
    height, width, channels = feature.shape
    channels = channels or 3
    if channels not in (1, 3) or feature.np_dtype != np.uint8:
        raise UsageError(
            f"--data_name={builder.name}: its images have {channels} channels of "
            f"{np.dtype(feature.np_dtype)}; only uint8 images of 1 or 3 channels can be read"
        )
    if image_size:
        return image_size, image_size, channels
    if height is None or width is None:
        height, width = _common_size(builder, image_key)
    return height, width, channels


def _common_size(builder: Any, image_key: str) -> tuple[int, int]:
    """Return the one (height, width) of all images of a set that does not declare it."""
    first: tuple[str, int, int, int] | None = None
    for split in sorted(set(_SPLITS) & set(builder.info.splits)):
        sizes = _encoded(builder, split, image_key).map(_size, tf.data.AUTOTUNE)
        for place, (height, width) in enumerate(_arrays(sizes, builder, split)):
            first = first or (split, place, int(height), int(width))
            if (height, width) != first[2:]:
                raise InputError(
                    f"--data_name={builder.name}: its images differ in size: {first[0]} example {first[1]} "
                    f"({first[2]}x{first[3]}) and {split} example {place} ({height}x{width}); "
                    f"pass --data_image_size=N to resize all images to N x N"
                )
    if first is None:
        raise InputError(f"--data_name={builder.name} holds no images")
    return first[2:]


def _encoded(builder: Any, split: str, image_key: str) -> tf.data.Dataset:
    return _read(builder, split).map(lambda example: example[image_key])


def _labels(builder: Any, split: str, label_key: str) -> np.ndarray:
    """Read the labels of a split, none where there is no such split."""
    if split not in builder.info.splits:
        return np.zeros(0, np.int32)
    batches = _read(builder, split).map(lambda example: example[label_key]).batch(4096)
    return np.concatenate([np.zeros(0, np.int32), *_arrays(batches, builder, split)]).astype(np.int32)


def _read(builder: Any, split: str) -> tf.data.Dataset:
    """Return the examples of a split, in the one order of its files, images still encoded."""
    features = builder.info.features
    images = [key for key in features if isinstance(features[key], tfds.features.Image)]
    return builder.as_dataset(
        split=split,
        shuffle_files=False,
        read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
        decoders={key: tfds.decode.SkipDecoding() for key in images},
    )


def _size(encoded: tf.Tensor) -> tf.Tensor:
    return tf.shape(tf.io.decode_image(encoded, expand_animations=False))[:2]


def _arrays(examples: tf.data.Dataset, builder: Any, split: str) -> Iterator[np.ndarray]:
    """Iterate over what is read of a split, or raise an InputError that names it."""
    try:
        yield from examples.as_numpy_iterator()
    except tf.errors.OpError as error:
        raise InputError(f"cannot read {split} in {builder.data_path}: {first_line(error)}") from error


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"
