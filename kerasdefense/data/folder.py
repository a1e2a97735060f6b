"""A user's own images, one folder per class."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import tensorflow as tf

from kerasdefense import config
from kerasdefense.data.headers import Header, common_shape, read_header
from kerasdefense.data.records import ImageShape, Records, Source, decode
from kerasdefense.types import InputError, UsageError

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif"))

_SPLITS = ("train", "validation", "test")
_ORDER_SEED = 1797


def read(data: config.Data) -> Source:
    """Open a folder of images and check every file in it.

    Args:
        data: `dir` is `<class>/*.png` (or jpg, jpeg, bmp, gif), or `train/<class>/*.png` beside `test/` and
            `validation/` of the same form, each of which may be absent; `image_size` as in the flag.

    Returns:
        A source whose class names are the sorted folder names; its examples are in one fixed mixed order.

    Raises:
        UsageError: no folder was named.
        InputError: a missing or empty folder, an unreadable image, or images that differ in size while
            `image_size` is 0.
    """
    if not data.dir:
        raise UsageError("--data_name=folder needs --data_dir, a folder with one subfolder of images per class")
    root = Path(data.dir).expanduser()
    split_folders = _split_folders(root)
    labels = tuple(folder.name for folder in _subfolders(split_folders["train"]))
    if len(labels) < 2:
        raise InputError(f"{split_folders['train']}: has {len(labels)} subfolders of classes; at least 2 are needed")
    files = {split: _files(folder, labels) for split, folder in split_folders.items()}
    image_shape = _image_shape([path for paths, _ in files.values() for path in paths], data.image_size)
    to_image = functools.partial(_decode_file, image_shape=image_shape, resize=data.image_size > 0)
    records = {
        split: Records(label, functools.partial(tf.data.Dataset.from_tensor_slices, paths), to_image, paths.__getitem__)
        for split, (paths, label) in files.items()
    }
    return Source(root.resolve().name, labels, image_shape, **records)


def _split_folders(root: Path) -> dict[str, Path]:
    """Return the folder of each split; the root itself is "train" where it holds the classes."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; --data_dir must hold one subfolder of images per class")
    folders = {folder.name: folder for folder in _subfolders(root)}
    if "train" not in folders or not _subfolders(folders["train"]):
        return {"train": root}
    strange = sorted(set(folders) - set(_SPLITS))
    if strange:
        raise InputError(f"{folders[strange[0]]}: beside train/ only test/ and validation/ are expected")
    return folders


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _files(folder: Path, labels: tuple[str, ...]) -> tuple[list[str], np.ndarray]:
    """List the images of one split in a fixed order that mixes the classes, with their labels."""
    paths: list[str] = []
    label: list[int] = []
    for class_folder in _subfolders(folder):
        if class_folder.name not in labels:
            raise InputError(f"{class_folder}: no such class in the training images, which have {', '.join(labels)}")
        images = sorted(str(path) for path in class_folder.iterdir() if path.suffix.lower() in SUFFIXES)
        if not images:
            raise InputError(f"{class_folder}: holds no image ({', '.join(sorted(SUFFIXES))})")
        paths += images
        label += [labels.index(class_folder.name)] * len(images)
    if not paths:
        raise InputError(f"{folder}: holds no class folders")
    order = np.random.RandomState(_ORDER_SEED).permutation(len(paths))
    return [paths[place] for place in order], np.array(label, np.int32)[order]


def _image_shape(paths: list[str], image_size: int) -> ImageShape:
    """Check every file and return the shape that all images get, in colour if one of them is."""
    headers = [(path, header(path)) for path in paths]
    return common_shape(headers, image_size)


def header(path: str) -> Header:
    """Read the size of an image, or raise an InputError that names a file that cannot be decoded."""
    try:
        with open(path, "rb") as file:
            return read_header(file, path)
    except OSError as error:
        raise InputError(f"{path}: not a readable image ({error})") from error


def _decode_file(path: tf.Tensor, *, image_shape: ImageShape, resize: bool) -> tf.Tensor:
    return decode(tf.io.read_file(path), image_shape=image_shape, resize=resize)
