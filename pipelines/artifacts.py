"""What lies in TFX's artifacts: the examples as data splits, the model in its two forms, folders that may be remote."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import tensorflow as tf

from kerasdefense import config, data
from kerasdefense.data import Splits
from kerasdefense.data.examples import ABOUT, LABELS, read_examples, read_labels, split_folders
from kerasdefense.data.headers import read_header
from kerasdefense.training import MODEL
from kerasdefense.types import InputError
from pipelines.examples import read_about

_LOOKED_AT = 100
"""Images of a file whose headers tell what size is usual."""


@dataclasses.dataclass(frozen=True)
class Images:
    """The examples that a pipeline starts from, and what is known of them.

    Attributes:
        folder: what `python -m pipelines.examples` wrote.
        splits: the folders in it.
        name: of the data set.
        labels: class names, in label order.
        shape: (height, width, channels).
    """

    folder: str
    splits: tuple[str, ...]
    name: str
    labels: tuple[str, ...]
    shape: tuple[int, int, int]


def images_in(folder: Path) -> Images:
    """Return what a pipeline must know of a folder of examples, which may hold broken ones.

    Raises:
        InputError: a split or the class names are missing, or not one image can be read.
    """
    splits = split_folders(str(folder))
    for split, path in splits.items():
        if not tf.io.gfile.glob(f"{path}/*"):
            raise InputError(f"{path}: has no files; the split {split} needs TFRecord files of examples")
    labels = read_labels(str(folder / LABELS))
    if (folder / ABOUT).is_file():
        about = read_about(folder)
        name, shape = str(about["name"]), tuple(about["image_shape"])
    else:
        name, shape = folder.resolve().name, _usual_shape(splits["train"])
    return Images(str(folder), tuple(Path(each).name for each in splits.values()), name, labels, shape)


def _usual_shape(folder: str) -> tuple[int, int, int]:
    """Return the shape that most of the first images have, whose header can be read."""
    found: Counter[tuple[int, int, int]] = Counter()
    for path in sorted(tf.io.gfile.glob(f"{folder}/*")):
        for record in tf.data.TFRecordDataset(path, "GZIP" if path.endswith(".gz") else "").take(_LOOKED_AT):
            image = tf.train.Example.FromString(record.numpy()).features.feature["image"].bytes_list.value
            with contextlib.suppress(InputError):
                header = read_header(io.BytesIO(image[0] if image else b""), path)
                found[header.height, header.width, 3 if header.colour else 1] += 1
        if found:
            return found.most_common(1)[0][0]
    raise InputError(f"{folder}: holds no example with a readable image")


def read_splits(run: config.Run, root: str, *, labels: Sequence[str], name: str) -> Splits:
    """Return the data of a run from an artifact of examples.

    Args:
        run: says how they are divided and augmented; its own data set is not opened.
        root: the artifact, with Split-train/ and Split-eval/.
        labels: class names, in label order.
        name: of the data set.
    """
    files = {split: [f"{folder}/*"] for split, folder in split_folders(root).items()}
    source = read_examples(files, labels=labels, name=name, image_size=run.data.image_size)
    return data.load(dataclasses.replace(run.data, open_set_split=""), source=source)  # divided when they were written


def model_file(uri: str) -> str:
    """Return where in an artifact of a model that lies which attacks look at, beside TFX's Format-Serving/."""
    return f"{uri.rstrip('/')}/{MODEL}"


def digest_of(splits: Splits) -> str:
    """Return a SHA-256 of all test images, known and unknown ones, with labels and numbers."""
    digest = hashlib.sha256()
    for split in filter(None, (splits.test, splits.unknown)):
        for batch in split.grey_levels(512).as_numpy_iterator():
            for part in ("image", "label", "index"):
                digest.update(batch[part].tobytes())
    return digest.hexdigest()


def copy_folder(source: str, target: str) -> None:
    """Copy a folder with all that is in it; both may be remote."""
    source, target = source.rstrip("/"), target.rstrip("/")
    for folder, _, files in tf.io.gfile.walk(source):
        place = f"{target}{folder.rstrip('/')[len(source) :]}"
        tf.io.gfile.makedirs(place)
        for file in files:
            tf.io.gfile.copy(f"{folder.rstrip('/')}/{file}", f"{place}/{file}", overwrite=True)
