"""What lies in TFX's artifacts: the examples as data splits, the model in its two forms, folders that may be remote."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import tensorflow as tf
from kerasdefense.data.examples import read_examples, split_folders

from kerasdefense import config, data
from kerasdefense.data import Splits
from kerasdefense.training import MODEL

SERVING = "Format-Serving"
"""Where TFX's Trainer leaves the SavedModel; `model.keras`, which attacks need, lies beside it."""


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
    """Return where in an artifact of a model that lies which attacks look at."""
    return f"{uri.rstrip('/')}/{MODEL}"


def digest_of(splits: Splits) -> str:
    """Return a SHA-256 of all test images, known and unknown ones, with labels and numbers."""
    digest = hashlib.sha256()
    for split in filter(None, (splits.test, splits.unknown)):
        for batch in split.grey_levels(512).as_numpy_iterator():
            for part in ("image", "label", "index"):
                digest.update(batch[part].tobytes())
    return digest.hexdigest()


def copy_folder(source: Path, target: str) -> None:
    """Copy a folder of this machine with all that is in it; `target` may be remote."""
    for path in sorted(source.rglob("*")):
        place = f"{target.rstrip('/')}/{path.relative_to(source).as_posix()}"
        if path.is_dir():
            tf.io.gfile.makedirs(place)
        else:
            tf.io.gfile.makedirs(place.rsplit("/", 1)[0])
            tf.io.gfile.copy(str(path), place, overwrite=True)
