"""From a configuration to the streams that a run reads."""

from __future__ import annotations

import numpy as np

from kerasdefense import config
from kerasdefense.data import augment, folder, open_set, sets
from kerasdefense.data.partition import Part, partition
from kerasdefense.data.splits import Split, Splits, TrainSplit
from kerasdefense.types import InputError, UsageError

_CACHES = ("memory", "disk", "none")


def load(data: config.Data) -> Splits:
    """Open a data set and divide it into training, validation and test images.

    The division depends on `data` alone, so that all runs on a set share their validation images. With an
    open-set split only known classes are left in the three of them, re-indexed 0..K-1 in the order of their
    original labels.

    Args:
        data: what to read and how.

    Raises:
        UsageError: the configuration cannot be carried out.
        InputError: the data is missing or broken.
    """
    _check(data)
    source = folder.read(data) if data.name == "folder" else sets.read(data)
    augmentation = augment.from_config(data, source.image_shape)
    known = open_set.known_classes(data.open_set_split, len(source.labels))
    label_of_class = open_set.relabel(known, len(source.labels))
    parts = partition(source, data.validation_fraction)

    def members(part: Part, *, is_known: bool = True, cache: str = "none") -> Split:
        label = label_of_class[part.records.label]
        index = part.index[(label[part.index] >= 0) == is_known]
        return Split(part.records, index, label, source.image_shape, cache)

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
        unknown=members(parts.test, is_known=False) if data.open_set_split else None,
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
