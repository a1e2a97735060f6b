"""tf.Examples in TFRecord files: what `pipelines.examples` writes of any data set, and what TFX hands to a trainer."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kerasdefense import config
from kerasdefense.data import record_files
from kerasdefense.data.headers import common_shape
from kerasdefense.data.record_files import Scan
from kerasdefense.data.records import Records, Source, decode
from kerasdefense.types import InputError, UsageError

LABELS = "labels.txt"
"""The file that names the classes, one a line, in label order."""
ABOUT = "examples.json"
"""The file that says which data set the examples were written of."""
SPLITS = ("train", "validation", "eval", "unknown")
"""The folders of a data set, also under the names that TFX gives them, Split-train and so on."""

_REQUIRED = ("train", "eval")


def read(data: config.Data) -> Source:
    """Open a folder of tf.Examples.

    The folder is what `pipelines.examples` writes: labels.txt; train/ with all training images, those included that
    `load` holds out for validation; eval/ with the test images of known classes. Where that validation cannot be found
    again by the training images alone (the set has validation images of its own, or its classes were divided into
    known and unknown ones), validation/ holds it and train/ the others. unknown/ holds images of unknown classes.
    Labels are those that a model sees.

    Args:
        data: `dir`, which may be remote, and `image_size`.

    Raises:
        UsageError: no folder was named, or an open-set split of classes that were divided before.
        InputError: as `read_examples`; no such folder, a split that is missing or strange, no class names.
    """
    if not data.dir:
        raise UsageError("--data_name=examples needs --data_dir, a folder with labels.txt, train/ and eval/")
    root = os.path.expanduser(data.dir)
    folders = split_folders(root)
    if data.open_set_split and "unknown" in folders:
        raise UsageError(
            f"--data_open_set_split={data.open_set_split}: the classes of {root} were divided when it was written "
            "(it has unknown images); leave the flag empty"
        )
    return read_examples(
        {split: [folder] for split, folder in folders.items()},
        labels=read_labels(f"{root}/{LABELS}"),
        name=_name(root),
        image_size=data.image_size,
    )


def read_examples(
    files: Mapping[str, Sequence[str]], *, labels: Sequence[str], name: str = "examples", image_size: int = 0
) -> Source:
    """Open tf.Examples in TFRecord files.

    Each has the features `image` (bytes of an encoded PNG, JPEG, BMP or GIF image), `label` (int64) and, all or none
    of a split, `index` (int64), its number in the split it was taken from. Whatever the order in the files, examples
    come in that of `index`, and by it they are keyed; without it, they are numbered file by file.

    Args:
        files: paths, patterns or folders of files by split: train and eval, perhaps validation and unknown, as in
            `read`.
        labels: class names, in label order.
        name: what the data set is called.
        image_size: side in pixels to which images are resized; 0 = all have one size.

    Raises:
        InputError: no such file, or one that is no TFRecord file; an example without its features, whose image cannot
            be read, whose label is none of the classes', or whose index another one has; images that differ in size.
    """
    scans = {split: record_files.scan(split, files[split]) for split in SPLITS if split in files}
    _check_classes(labels, name)
    for split, scanned in scans.items():
        _check_labels(split, scanned, len(labels))
    image_shape = common_shape((pair for scanned in scans.values() for pair in scanned.headers()), image_size)
    to_image = functools.partial(decode, image_shape=image_shape, resize=image_size > 0)
    records = {split: _records(scanned, to_image) for split, scanned in scans.items()}
    return Source(
        name,
        tuple(labels),
        image_shape,
        train=records["train"],
        validation=records.get("validation"),
        test=records["eval"],
        unknown=records.get("unknown"),
    )


def split_folders(root: str) -> dict[str, str]:
    """Return the folder of each split below `root`, named as in `SPLITS`.

    Raises:
        InputError: no such folder, or a split that is missing, strange or there under both of its names.
    """
    if not tf.io.gfile.isdir(root):
        raise InputError(f"{root}: no such folder; it must hold {LABELS}, train/ and eval/")
    found: dict[str, str] = {}
    for entry in sorted(each.rstrip("/") for each in tf.io.gfile.listdir(root)):
        split, folder = entry[len("Split-") :] if entry.startswith("Split-") else entry, f"{root}/{entry}"
        if entry.startswith((".", "_")) or not tf.io.gfile.isdir(folder):
            continue
        if split not in SPLITS:
            raise InputError(f"{folder}: beside train/ and eval/ only validation/ and unknown/ are expected")
        if split in found:
            raise InputError(f"{folder}: {found[split]} is there too; which one is meant?")
        found[split] = folder
    missing = [split for split in _REQUIRED if split not in found]
    if missing:
        raise InputError(f"{root}: has no {missing[0]}/; it must hold {LABELS}, train/ and eval/")
    return found


def read_labels(path: str) -> tuple[str, ...]:
    """Return the class names in a file, one a line.

    Raises:
        InputError: the file cannot be read, or a line is empty.
    """
    try:
        with tf.io.gfile.GFile(path) as file:
            names = tuple(line.strip() for line in file.read().splitlines())
    except (tf.errors.OpError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: no readable file of class names, one a line") from error
    if not all(names):
        raise InputError(f"{path}: line {names.index('') + 1} names no class")
    return names


def _name(root: str) -> str:
    """Return the name of the data set that examples were written of, else that of their folder."""
    path = f"{root}/{ABOUT}"
    if not tf.io.gfile.exists(path):
        return os.path.basename(os.path.abspath(root))
    try:
        with tf.io.gfile.GFile(path) as file:
            return str(json.loads(file.read())["name"])
    except (tf.errors.OpError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: does not name the data set as pipelines.examples does") from error


def _check_classes(labels: Sequence[str], name: str) -> None:
    if len(labels) < 2:
        raise InputError(f"{name}: has {len(labels)} class names; at least 2 are needed")
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if list(labels).count(label) > 1)
        raise InputError(f"{name}: two classes are called {twice!r}")


def _check_labels(split: str, scanned: Scan, classes: int) -> None:
    known = split != "unknown"
    wrong = (scanned.label < 0) | (scanned.label >= classes) if known else scanned.label != -1
    if wrong.any():
        place = int(np.flatnonzero(wrong)[0])
        right = (
            f"one of the labels 0..{classes - 1} of the {classes} classes" if known else "-1, as unknown images have"
        )
        raise InputError(f"{scanned.name(place)}: has label {scanned.label[place]}, not {right}")


def _records(scanned: Scan, to_image: Any) -> Records:
    place = dict(zip(scanned.index.tolist(), range(len(scanned.index))))
    label = np.full(scanned.index[-1] + 1, -1, np.int32)
    label[scanned.index] = scanned.label
    index = None if len(label) == len(scanned.index) else scanned.index
    return Records(label, scanned.read, to_image, lambda number: scanned.name(place[number]), index)
