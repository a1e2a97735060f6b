"""TFRecord files of tf.Examples, read in the order of their numbers whatever the order in the files."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf import message

from kerasdefense.data.headers import Header, read_header
from kerasdefense.data.records import first_line
from kerasdefense.types import InputError

LARGEST_INDEX = 10**8
"""Above it, a number is no place in a data set: tables of all numbers up to it are kept in memory."""

_KINDS = {"image": "bytes_list", "label": "int64_list", "index": "int64_list"}
_AHEAD = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Scan:
    """The examples of one split, found in files, by ascending number.

    Attributes:
        files: paths, sorted.
        file: int64 [examples], which of them holds an example.
        record: int64 [examples], its place in that file.
        index: int64 [examples], its number.
        label: int64 [examples].
        header: of each image.
    """

    files: tuple[str, ...]
    file: np.ndarray
    record: np.ndarray
    index: np.ndarray
    label: np.ndarray
    header: tuple[Header, ...]

    def name(self, place: int) -> str:
        """Say where the example at a place of these arrays was found."""
        return f"{self.files[self.file[place]]} record {self.record[place]}"

    def headers(self) -> Iterator[tuple[str, Header]]:
        """Iterate over the name and header of each image."""
        return ((self.name(place), header) for place, header in enumerate(self.header))

    def read(self) -> tf.data.Dataset:
        """Return a dataset of encoded images, by ascending number."""
        in_files = _records(self.files).map(_image, tf.data.AUTOTUNE, deterministic=True)
        in_order = (np.lexsort((self.record, self.file)) == np.arange(len(self.file))).all()
        return in_files if in_order else tf.data.TFRecordDataset(self._sorted)

    @functools.cached_property
    def _sorted(self) -> str:
        """Path of a copy of the images in order, written once and kept until the process ends."""
        folder = tempfile.mkdtemp(prefix="kerasdefense-examples-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        path, unsorted = os.path.join(folder, "images.tfrecord"), os.path.join(folder, "images")
        order = np.lexsort((self.record, self.file))
        start, size = np.zeros(len(order), np.int64), np.zeros(len(order), np.int64)
        with open(unsorted, "wb") as file:
            for place, image in zip(order, _records(self.files).map(_image).as_numpy_iterator()):
                start[place], size[place] = file.tell(), len(image)
                file.write(image)
        with open(unsorted, "rb") as file, tf.io.TFRecordWriter(path) as writer:
            for begin, length in zip(start.tolist(), size.tolist()):
                file.seek(begin)
                writer.write(file.read(length))
        os.remove(unsorted)
        return path


def scan(split: str, patterns: Sequence[str]) -> Scan:
    """Read labels, numbers and headers of all examples of a split.

    Args:
        split: what it is called.
        patterns: files, patterns of files, or folders that hold nothing else; gzipped where they end in .gz.

    Raises:
        InputError: as `examples.read_examples` says of its files.
    """
    files = tuple(sorted({path for pattern in patterns for path in _files(pattern)}))
    if not files:
        raise InputError(f"{', '.join(patterns)}: no such file; the split {split} needs TFRecord files of examples")
    columns = [row for number, path in enumerate(files) for row in _rows(number, path)]
    if not columns:
        raise InputError(f"{os.path.dirname(files[0])}: its files hold no examples; the split {split} is empty")
    file, record, label, index = (np.array(column, np.int64) for column in list(zip(*columns))[:4])
    scanned = Scan(files, file, record, index, label, tuple(row[4] for row in columns))
    return _in_order(scanned)


def _rows(number: int, path: str) -> Iterator[tuple[int, int, int, int, Header]]:
    """Iterate over file, record, label, index (-1 = none) and header of the examples in one file."""
    try:
        for place, record in enumerate(_records((path,)).prefetch(_AHEAD).as_numpy_iterator()):
            name = f"{path} record {place}"
            image, label, index = _features(record, name)
            yield number, place, label, index, read_header(io.BytesIO(image), name)
    except tf.errors.OpError as error:
        raise InputError(f"{path}: not a readable TFRecord file: {first_line(error)}") from error


def _features(record: bytes, name: str) -> tuple[bytes, int, int]:
    """Return image, label and index (-1 = none) of a serialized example."""
    try:
        feature = tf.train.Example.FromString(record).features.feature
    except message.DecodeError as error:
        raise InputError(f"{name}: not a tf.Example") from error
    values: dict[str, Any] = {}
    for key, kind in _KINDS.items():
        found = getattr(feature[key], kind).value if key in feature else ()
        if len(found) != 1 and (len(found) or key != "index"):
            raise InputError(f"{name}: needs one value of the feature {key!r} in its {kind}; it has {len(found)}")
        values[key] = found[0] if found else -1
    if "index" in feature and not 0 <= values["index"] <= LARGEST_INDEX:
        raise InputError(f"{name}: its index is {values['index']}, not a number from 0 to {LARGEST_INDEX}")
    return values["image"], values["label"], values["index"]


def _in_order(scanned: Scan) -> Scan:
    """Return the same examples by ascending number, numbered as they come where none has an index."""
    without = scanned.index < 0
    if without.all():
        return dataclasses.replace(scanned, index=np.arange(len(scanned.index)))
    if without.any():
        raise InputError(
            f"{scanned.name(int(np.flatnonzero(without)[0]))}: has no value of the feature 'index', which others have"
        )
    order = np.argsort(scanned.index, kind="stable")
    arrays = {name: getattr(scanned, name)[order] for name in ("file", "record", "index", "label")}
    ordered = dataclasses.replace(scanned, **arrays, header=tuple(scanned.header[place] for place in order))
    twice = np.flatnonzero(np.diff(ordered.index) == 0)
    if twice.size:
        place = int(twice[0])
        raise InputError(f"{ordered.name(place + 1)}: has index {ordered.index[place]}, as {ordered.name(place)} has")
    return ordered


def _records(files: Sequence[str]) -> tf.data.Dataset:
    """Return the records of files, one file after the other."""
    compression = ["GZIP" if path.endswith(".gz") else "" for path in files]
    return tf.data.Dataset.from_tensor_slices((list(files), compression)).flat_map(
        lambda path, kind: tf.data.TFRecordDataset(path, compression_type=kind)
    )


def _image(serialized: tf.Tensor) -> tf.Tensor:
    return tf.io.parse_single_example(serialized, {"image": tf.io.FixedLenFeature([], tf.string)})["image"]


def _files(pattern: str) -> list[str]:
    """Return the files that a path or a pattern names, without hidden ones."""
    if tf.io.gfile.isdir(pattern):
        paths = [os.path.join(pattern, name) for name in tf.io.gfile.listdir(pattern)]
    else:
        paths = [pattern] if tf.io.gfile.exists(pattern) else tf.io.gfile.glob(pattern)
    return [path for path in paths if not os.path.basename(path).startswith((".", "_")) and not tf.io.gfile.isdir(path)]
