"""From a configuration to the streams that a run reads."""

from __future__ import annotations

import dataclasses

import numpy as np

from kerasdefense import config
from kerasdefense.data import augment, examples, folder, open_set, sets
from kerasdefense.data.partition import Part, partition
from kerasdefense.data.records import Source
from kerasdefense.data.splits import Split, Splits, TrainSplit
from kerasdefense.types import InputError, UsageError

_CACHES = ("memory", "disk", "none")
_READERS = {"folder": folder.read, "examples": examples.read}


def load(data: config.Data, *, source: Source | None = None) -> Splits:
    """Open a data set and divide it into training, validation and test images.

    The division depends on `data` alone, so that all runs on a set share their validation images. With an
    open-set split only known classes are left in the three of them, re-indexed 0..K-1 in the order of their
    original labels; a source that has unknown images divided its classes itself.

    Args:
        data: what to read and how.
        source: the same images from elsewhere, `examples.read_examples` of TFX's files for instance; None = open what
            `data` names.

    Raises:
        UsageError: the configuration cannot be carried out.
        InputError: the data is missing or broken.
    """
    _check(data)
    if source is None:
        source = _READERS.get(data.name, sets.read)(data)
    named = dataclasses.replace(data, name=source.name) if data.name == "examples" else data
    augmentation = augment.from_config(named, source.image_shape)
    divided = source.unknown is not None
    known = open_set.known_classes("" if divided else data.open_set_split, len(source.labels))
    label_of_class = np.append(open_set.relabel(known, len(source.labels)), -1)  # the last one is that of label -1
    parts = partition(source, data.validation_fraction)

    def members(part: Part, *, is_known: bool = True, cache: str = "none") -> Split:
        label = label_of_class[part.records.label]
        index = part.index[(label[part.index] >= 0) == is_known]
        return Split(part.records, index, label, source.image_shape, cache)

    unknown = members(parts.unknown or parts.test, is_known=False) if divided or data.open_set_split else None
    train = members(parts.train)
    splits = Splits(
        train=TrainSplit(
            train.records,
            train.index,
            train.label,
            train.image_shape,
            data.cache,
            augmentation,
            data.shuffle_buffer,
        ),
        validation=members(parts.validation, cache=data.cache),
        test=members(parts.test),
        unknown=unknown,
        labels=tuple(source.labels[label] for label in known),
        image_shape=source.image_shape,
        name=source.name,
    )
    _check_not_empty(splits)
    return splits


def _check(data: config.Data) -> None:
    if not 0 < data.validation_fraction < 1:
        raise UsageError(f"--data_validation_fraction={data.validation_fraction:g} must be above 0 and below 1")
    if data.image_size < 0:
        raise UsageError(f"--data_image_size={data.image_size} must be 0 (their own size) or a side in pixels")
    if data.shuffle_buffer < 1:
        raise UsageError(f"--data_shuffle_buffer={data.shuffle_buffer} must be at least 1")
    if data.cache not in _CACHES:
        raise UsageError(f"unknown --data_cache={data.cache}; valid: {', '.join(_CACHES)}")


def _check_not_empty(splits: Splits) -> None:
    missing = np.setdiff1d(np.arange(len(splits.labels)), splits.train.label[splits.train.index])
    if missing.size:
        raise InputError(f"{splits.name}: no training image of class {splits.labels[missing[0]]!r} is left")
    held_out = {"validation": splits.validation, "test": splits.test, "unknown": splits.unknown}
    for name, split in held_out.items():
        if split is not None and not split.examples:
            raise InputError(f"{splits.name}: no image is left for the {name} split")
