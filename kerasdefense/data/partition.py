"""What is held out of the training images: always the same examples, whatever the seed of a run."""

from __future__ import annotations

import dataclasses

import numpy as np

from kerasdefense.data.records import Records, Source
from kerasdefense.types import InputError, UsageError

TEST_FRACTION = 0.2
VALIDATION_SEED = 20_210_823
TEST_SEED = 20_200_221


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Some examples of a source split: `index` int64 [examples], ascending numbers of examples of `records`."""

    records: Records
    index: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Partition:
    """A source divided into parts that share no example; unknown images only where it has some apart."""

    train: Part
    validation: Part
    test: Part
    unknown: Part | None = None


def holdout(label: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose a share of the examples, spread evenly over the classes.

    The examples are permuted, sorted by class, and picked at equal distances, so that every class gives its
    share to within one example.

    Args:
        label: integer [examples].
        fraction: share to choose, in (0, 1).
        seed: seed of the permutation.

    Returns:
        int64 [round(fraction * examples)], ascending.
    """
    permutation = np.random.RandomState(seed).permutation(len(label))
    by_class = permutation[np.argsort(label[permutation], kind="stable")]
    held = round(fraction * len(label))
    place = (2 * np.arange(held) + 1) * len(label) // (2 * max(held, 1))
    return np.sort(by_class[place])


def partition(source: Source, validation_fraction: float) -> Partition:
    """Divide a source into training, validation and test examples.

    Its own test and validation images are used where it has them. Else a fifth of its images is held out for
    the test, and `validation_fraction` of what remains for validation: never from the test images.

    Raises:
        UsageError: `validation_fraction` leaves a part empty.
        InputError: too few images to hold out a test.
    """
    train = Part(source.train, source.train.numbers)
    test = _whole(source.test)
    if test is None:
        train, test = _take(train, TEST_FRACTION, TEST_SEED)
        if not len(test.index):
            raise InputError(f"{source.name}: {len(train.index)} images are too few to hold out a fifth for the test")
    validation = _whole(source.validation)
    if validation is None:
        available = len(train.index)
        train, validation = _take(train, validation_fraction, VALIDATION_SEED)
        if not (len(train.index) and len(validation.index)):
            raise UsageError(
                f"--data_validation_fraction={validation_fraction:g} of {available} training images leaves "
                f"{len(train.index)} for training and {len(validation.index)} for validation; both need some"
            )
    return Partition(train, validation, test, _whole(source.unknown))


def _whole(records: Records | None) -> Part | None:
    return None if records is None else Part(records, records.numbers)


def _take(part: Part, fraction: float, seed: int) -> tuple[Part, Part]:
    held = part.index[holdout(part.records.label[part.index], fraction, seed)]
    return Part(part.records, np.setdiff1d(part.index, held)), Part(part.records, held)
