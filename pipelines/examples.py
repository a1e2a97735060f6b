"""python -m pipelines.examples --flagfile=FILE --examples_dir=DIR: any data set as TFRecord files of tf.Examples.

    python -m pipelines.examples --flagfile=configs/digits/pgd_at.cfg --examples_dir=DIR [--examples_shards=N]
        [--data_... flags of kerasdefense.run]

DIR then holds labels.txt, examples.json and, as `--data_name=examples --data_dir=DIR` reads them with the same
validation fraction, train/, eval/ and perhaps validation/ and unknown/. Images are PNG of the pixels that a model sees.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from kerasdefense import data, flags
from kerasdefense.boundary import guarded
from kerasdefense.data import Split, Splits
from kerasdefense.data.examples import ABOUT, LABELS
from kerasdefense.files import replacing, write_json, write_text
from kerasdefense.types import InputError, UsageError
from pipelines.parser import Parser

PER_FILE = 5000
"""Images in a file, where their number is not given."""
UNKNOWN = "(unknown)"
"""Where the images of unknown classes are counted."""

_BATCH = 256
_SHOWN = 50


class Written(NamedTuple):
    """A folder of examples.

    Attributes:
        folder: where it is.
        about: what its examples.json holds: `name`, `labels`, `image_shape`, and of each of `splits` the number of
            `files` and `examples`, these also by class (`classes`), and a `sha256` of their pixels, labels and numbers.
        is_new: whether it was written just now; False = it had the same content already.
    """

    folder: Path
    about: dict[str, Any]
    is_new: bool


def write_examples(splits: Splits, folder: Path, *, shards: int = 0) -> Written:
    """Write a data set as TFRecord files, which appear all together or not at all.

    train/ holds all training images, also those held out for validation where these are found again by the training
    images alone; else they go to validation/. Examples have the features `image`, `label` and `index`, and come in the
    order of `index`.

    Args:
        splits: the data set.
        folder: does not exist, is empty, or has the same content, which is left as it is.
        shards: files of each split; 0 = one for each 5,000 images.

    Raises:
        InputError: the folder holds anything else.
    """
    parts = _parts(splits)
    files = {name: min(shards or -(-part.examples // PER_FILE), part.examples) for name, part in parts.items()}
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        _check_is_whole(folder)
        about = _about(splits, parts, files, {name: _digest(part) for name, part in parts.items()})
        if read_about(folder) != about:
            raise InputError(f"{folder}: holds other examples; remove it, or name another folder")
        return Written(folder, about, is_new=False)
    with replacing(folder) as temporary:
        digests = {name: _write(part, temporary / name, files[name]) for name, part in parts.items()}
        about = _about(splits, parts, files, digests)
        write_text(temporary / LABELS, "".join(f"{label}\n" for label in splits.labels))
        write_json(temporary / ABOUT, about)
    return Written(folder, about, is_new=True)


def read_about(folder: Path) -> dict[str, Any]:
    """Return what examples.json says of a folder of examples, as `Written.about`.

    Raises:
        InputError: there is none, or it is not what `write_examples` writes.
    """
    path = folder / ABOUT
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        complete = {"name", "labels", "image_shape", "splits"} <= set(about)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not readable; python -m pipelines.examples writes it") from error
    if not complete:
        raise InputError(f"{path}: says less than python -m pipelines.examples writes")
    return about


def show(written: Written, console: Console) -> None:
    """Print how many images of each class each split holds."""
    about = written.about
    state = "written" if written.is_new else "kept, it holds the same examples already"
    console.print(f"{written.folder}: {state}", highlight=False, soft_wrap=True)
    table = Table("class", *about["splits"], title=f"examples of {about['name']}")
    for column in table.columns[1:]:
        column.justify = "right"
    counts = [split["classes"] for split in about["splits"].values()]
    classes = [*about["labels"], UNKNOWN]
    if len(classes) > _SHOWN:
        classes = classes[-1:]
        for name, choose in (("(least of a class)", min), ("(most of a class)", max)):
            found = [[count.get(label, 0) for label in about["labels"]] for count in counts]
            table.add_row(name, *(f"{choose(each):,}" for each in found))
    for label in classes:
        if any(label in count for count in counts):
            table.add_row(label, *(f"{count.get(label, 0):,}" for count in counts))
    table.add_section()
    table.add_row("all", *(f"{split['examples']:,}" for split in about["splits"].values()))
    table.add_row("files", *(f"{split['files']:,}" for split in about["splits"].values()))
    console.print(table)


def _parts(splits: Splits) -> dict[str, Split]:
    """Return what goes into each folder, without a cache."""
    train, validation = splits.train, splits.validation
    index = train.index
    parts = {"validation": validation, "eval": splits.test}
    if validation.records is train.records and splits.unknown is None:
        index = np.union1d(train.index, parts.pop("validation").index)
    parts = {"train": Split(train.records, index, train.label, splits.image_shape, "none"), **parts}
    if splits.unknown is not None:
        parts["unknown"] = splits.unknown
    return {name: Split(part.records, part.index, part.label, part.image_shape, "none") for name, part in parts.items()}


def _about(splits: Splits, parts: dict[str, Split], files: dict[str, int], digests: dict[str, str]) -> dict[str, Any]:
    described = {}
    for name, part in parts.items():
        label, count = np.unique(part.label[part.index], return_counts=True)
        classes = [UNKNOWN if each < 0 else splits.labels[each] for each in label]
        described[name] = {
            "examples": part.examples,
            "files": files[name],
            "classes": dict(zip(classes, count.tolist())),
            "sha256": digests[name],
        }
    shape = list(splits.image_shape)
    return {"name": splits.name, "labels": list(splits.labels), "image_shape": shape, "splits": described}


def _check_is_whole(folder: Path) -> None:
    """Raise an InputError unless a folder holds all files that its examples.json counts, and no other."""
    if not (folder / ABOUT).is_file():
        raise InputError(f"{folder}: is there and holds no examples; remove it, or name another folder")
    splits = read_about(folder)["splits"]
    expected = {LABELS, ABOUT} | {
        f"{name}/{_file_name(place, split['files'])}"
        for name, split in splits.items()
        for place in range(split["files"])
    }
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if expected != found:
        differing = min(expected ^ found)
        raise InputError(
            f"{folder / differing}: {'missing' if differing in expected else 'unexpected'}; remove {folder}"
        )


def _write(part: Split, folder: Path, files: int) -> str:
    """Write the files of a split, and return the digest of its examples."""
    folder.mkdir(parents=True)
    digest, rows = hashlib.sha256(), _rows(part)
    ends = [part.examples * (place + 1) // files for place in range(files)]
    for place, (start, end) in enumerate(zip([0, *ends], ends)):
        with tf.io.TFRecordWriter(str(folder / _file_name(place, files)), "GZIP") as writer:
            for _, (image, label, index) in zip(range(start, end), rows):
                _count_in(digest, image, label, index)
                writer.write(_example(tf.io.encode_png(image).numpy(), label, index))
    return digest.hexdigest()


def _digest(part: Split) -> str:
    digest = hashlib.sha256()
    for image, label, index in _rows(part):
        _count_in(digest, image, label, index)
    return digest.hexdigest()


def _count_in(digest: Any, image: np.ndarray, label: int, index: int) -> None:
    digest.update(image.tobytes())
    digest.update(np.array([label, index], "<i8").tobytes())


def _rows(part: Split) -> Iterator[tuple[np.ndarray, int, int]]:
    """Iterate over uint8 image, label and index of each example."""
    for batch in part.grey_levels(_BATCH).prefetch(tf.data.AUTOTUNE).as_numpy_iterator():
        yield from zip(batch["image"], batch["label"].tolist(), batch["index"].tolist())


def _example(image: bytes, label: int, index: int) -> bytes:
    feature = {
        "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
        "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
        "index": tf.train.Feature(int64_list=tf.train.Int64List(value=[index])),
    }
    serialized: bytes = tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString(
        deterministic=True
    )
    return serialized


def _file_name(place: int, files: int) -> str:
    return f"examples-{place:05d}-of-{files:05d}.tfrecord.gz"


def _parser() -> Parser:
    parser = Parser("python -m pipelines.examples", __doc__)
    parser.add_argument("--examples_dir", default="", help="folder to write, which must not exist or be empty")
    parser.add_argument("--examples_shards", type=int, default=0, help="files of each split; 0 = one per 5,000 images")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Write the examples of the data set that the flags name, and print what they are."""
    own, rest = _parser().parse_known_args(arguments)
    if not own.examples_dir or "://" in own.examples_dir:
        raise UsageError("--examples_dir must name a folder of this machine, where the examples are written")
    if own.examples_shards < 0:
        raise UsageError(f"--examples_shards={own.examples_shards} must be at least 0")
    splits = data.load(flags.parse(rest).data)
    show(write_examples(splits, Path(own.examples_dir).expanduser(), shards=own.examples_shards), Console())
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:]), verbosity=flags.verbosity(sys.argv[1:])))
