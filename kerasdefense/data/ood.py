"""Images of unknown classes from elsewhere: arrays, folders and other sets, shaped as a model expects them."""

from __future__ import annotations

import functools
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from kerasdefense.data import folder, sets
from kerasdefense.data.digits import Digits
from kerasdefense.data.records import ImageShape, Records, decode, first_line
from kerasdefense.data.splits import Split
from kerasdefense.types import InputError, UsageError

GROUPS = ("near", "far")
_NEAR = ("tiny_imagenet", "tinyimagenet", "tinyimagenet_resize", "tin")
_FAR = ("mnist", "svhn_cropped", "svhn", "dtd", "textures", "texture", "places365_small", "places365")
_SHARED = {**dict.fromkeys(_NEAR, "near"), **dict.fromkeys(_FAR, "far")}
DIVISION = {"cifar10": {"cifar100": "near", **_SHARED}, "cifar100": {"cifar10": "near", **_SHARED}}
"""How OpenOOD v1.5 groups other sets by a known set, under their TFDS and their usual names."""

_SPLITS = ("test", "validation", "train")
_ORDER_SEED = 1797


class OODSet(NamedTuple):
    """A set of unknown images.

    Attributes:
        name: what it is called: the stem of a file, the name of a folder, or the name of a TFDS set.
        group: "near" or "far" from the known images, whose means it enters; "" = neither.
        split: its images, every label -1.
    """

    name: str
    group: str
    split: Split


def load(text: str, known_name: str, image_shape: ImageShape, *, data_dir: str = "") -> list[OODSet]:
    """Open every set of a comma-separated list.

    Args:
        text: as `parse` takes it.
        known_name: as `parse` takes it.
        image_shape: (height, width, channels) that the model expects.
        data_dir: as `read` takes it.

    Raises:
        UsageError: the list is malformed, or names no set.
        InputError: a set is missing, broken or empty.
    """
    return [
        OODSet(_name(source), group, read(source, image_shape, data_dir=data_dir))
        for group, source in parse(text, known_name)
    ]


def parse(text: str, known_name: str) -> list[tuple[str, str]]:
    """Return the (group, source) of every item of a comma-separated list of `[near:|far:]SOURCE`.

    Args:
        text: the list, with blanks or without; empty = no sets.
        known_name: the known data set, by which `DIVISION` gives the group of an item without one.

    Raises:
        UsageError: an item without a source, or two of one name.

    Source: the near and far sets of OpenOOD v1.5. Deviations: a set counts by its name, its images are unchecked.
    """
    division = DIVISION.get(_base(known_name), {})
    items, names = [], set()
    for item in text.split(",") if text.strip() else []:
        group, _, source = (part.strip() for part in item.partition(":"))
        if group not in GROUPS:
            group, source = "", item.strip()
        if not source:
            raise UsageError(f"unknown sets {text!r}: {item!r} names no set; write [near:|far:]SOURCE, ...")
        name = _name(source)
        if name in names:
            raise UsageError(f"unknown sets {text!r}: two are called {name!r}; every set needs a name of its own")
        names.add(name)
        items.append((group or division.get(_base(name), ""), source))
    return items


def read(source: str, image_shape: ImageShape, *, data_dir: str = "") -> Split:
    """Open a set of unknown images.

    Args:
        source: an .npz file with `images` uint8 [n, height, width] or [n, height, width, 1 or 3]; else a folder of
            images, in subfolders or not; else the name of a TFDS set, of which the test images are read (validation
            or training images where it has no others).
        image_shape: (height, width, channels) of every decoded image; colours are turned to grey or grey repeated,
            other sizes resized (bilinear, antialiased where they shrink).
        data_dir: TFDS data directory; empty = TFDS' own default.

    Returns:
        A stream of images whose labels are all -1; those of a file or folder, which may lie there class by class, come
        in one fixed mixed order.

    Raises:
        UsageError: no such TFDS set, or one without images.
        InputError: the source is missing, broken or empty.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        records = _folder(path, image_shape)
    elif path.suffix == ".npz" or path.is_file() or source.startswith(("/", ".", "~")):
        records = _file(path, image_shape)
    else:
        records = _set(source, image_shape, data_dir)
    count = len(records.label)
    if not count:
        raise InputError(f"{source}: holds no images")
    for place in range(count) if path.is_dir() else ():
        folder.header(records.name(place))
    return Split(records, np.arange(count), records.label, image_shape, cache="none")


def _name(source: str) -> str:
    path = Path(source).expanduser()
    if path.suffix == ".npz":
        return path.stem
    return path.resolve().name if path.is_dir() else source


def _base(name: str) -> str:
    return re.split("[/:]", name)[0]  # without the configuration and version of a TFDS set


def _file(path: Path, image_shape: ImageShape) -> Records:
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: neither a whole .npz file nor a folder of images")
    images = _images(path)
    order = _mixed(len(images))
    return Records(
        np.full(len(images), -1, np.int32),
        functools.partial(tf.data.Dataset.from_tensor_slices, images[order]),
        functools.partial(_fit, image_shape=image_shape),
        lambda place: f"{path} image {order[place]}",
    )


def _images(path: Path) -> np.ndarray:
    """Return uint8 [n, height, width, 1 or 3], the array `images` of a file."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = list(arrays)
            images = arrays["images"] if "images" in names else None
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a readable .npz file ({first_line(error)})") from error
    if images is None:
        raise InputError(f"{path}: has no array 'images'; it has {', '.join(sorted(names)) or 'none'}")
    if images.dtype != np.uint8:
        raise InputError(f"{path}: images are {images.dtype}; uint8 in 0..255 is expected")
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape[1:]:
        raise InputError(f"{path}: images have shape {images.shape}; [n, height, width, 1 or 3] is expected")
    return images


def _folder(root: Path, image_shape: ImageShape) -> Records:
    found = sorted(str(path) for path in root.rglob("*") if _is_image(path.relative_to(root)) and path.is_file())
    paths = [found[place] for place in _mixed(len(found))]
    return Records(
        np.full(len(paths), -1, np.int32),
        functools.partial(tf.data.Dataset.from_tensor_slices, paths),
        functools.partial(_decode_file, image_shape=image_shape),
        paths.__getitem__,
    )


def _is_image(path: Path) -> bool:
    """Return whether a file is an image by its name, and not hidden nor left by macOS."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in folder.SUFFIXES and not hidden


def _set(name: str, image_shape: ImageShape, data_dir: str) -> Records:
    builder = _builder(name, data_dir)
    image_key = _image_key(builder, name)
    if not builder.data_path.exists():
        sets._prepare(builder)
    split = next((split for split in _SPLITS if split in builder.info.splits), None)
    if split is None:
        raise UsageError(f"{name}: has no test, validation or train split; it has {', '.join(builder.info.splits)}")
    return Records(
        np.full(builder.info.splits[split].num_examples, -1, np.int32),
        functools.partial(sets._encoded, builder, split, image_key),
        functools.partial(_decode, image_shape=image_shape),
        f"{builder.data_path} {split} example {{}}".format,
    )


def _builder(name: str, data_dir: str) -> Any:
    if name == "digits":
        return Digits(data_dir=data_dir or None)
    try:
        return tfds.builder(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError as error:
        if "/" in name:
            raise InputError(f"{name}: no such file or folder") from error
        raise UsageError(f"{name}: no .npz file, folder or set of www.tensorflow.org/datasets/catalog") from error
    except (ValueError, AssertionError, ImportError) as error:
        raise UsageError(f"{name}: {first_line(error)}") from error


def _image_key(builder: Any, name: str) -> str:
    """Return the name of the feature that holds the image, the first one where there are several."""
    features = builder.info.features
    keys = [key for key in features if isinstance(features[key], tfds.features.Image)]
    key = "image" if "image" in keys else next(iter(keys), "")
    if not key or features[key].np_dtype != np.uint8:
        raise UsageError(f"{name}: not a set of uint8 images; its features are {', '.join(sorted(features))}")
    return key


def _mixed(count: int) -> np.ndarray:
    """Return a permutation of 0..count-1, always the same."""
    return np.random.RandomState(_ORDER_SEED).permutation(count)


def _decode_file(path: tf.Tensor, *, image_shape: ImageShape) -> tf.Tensor:
    return _decode(tf.io.read_file(path), image_shape=image_shape)


def _decode(encoded: tf.Tensor, *, image_shape: ImageShape) -> tf.Tensor:
    """Decode in colour, which every format can, then fit."""
    image = decode(encoded, (*image_shape[:2], 3), resize=False)
    return _fit(tf.ensure_shape(image, (None, None, 3)), image_shape=image_shape)


def _fit(image: tf.Tensor, *, image_shape: ImageShape) -> tf.Tensor:
    """Turn uint8 [any height, any width, 1 or 3] into uint8 `image_shape`."""
    level = tf.cast(image, tf.float32)  # so that grey is rounded once, with the resizing
    if image.shape[2] != image_shape[2]:
        level = tf.image.grayscale_to_rgb(level) if image_shape[2] == 3 else tf.image.rgb_to_grayscale(level)
    resized = tf.image.resize(level, image_shape[:2], antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)
