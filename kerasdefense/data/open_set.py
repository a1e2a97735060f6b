"""Which classes a model is trained on, and which it first meets in the test."""

from __future__ import annotations

import re

import numpy as np

from kerasdefense.types import UsageError

PUBLISHED: dict[str, tuple[int, ...]] = {
    "0": (0, 1, 2, 4, 5, 9),
    "1": (0, 3, 5, 7, 8, 9),
    "2": (0, 1, 5, 6, 7, 8),
    "3": (3, 4, 5, 7, 8, 9),
    "4": (0, 1, 2, 3, 7, 8),
}
"""Known classes of the five trials on CIFAR-10 and SVHN; the other four classes are unknown."""


def known_classes(split: str, classes: int) -> tuple[int, ...]:
    """Return the original labels of the known classes, ascending.

    Args:
        split: empty (all are known), "0".."4" (a published split of a 10-class set), or "K:SEED" (the first
            K of a permutation of the classes seeded by SEED).
        classes: number of classes of the data set.

    Returns:
        Ascending labels; their places are the labels that a model sees.

    Raises:
        UsageError: not such a split, or one that leaves fewer than two known or no unknown classes.

    Source: Shao et al., Open-set Adversarial Defense with Clean-Adversarial Mutual Learning, IJCV 2022, the
    five CIFAR-10/SVHN trials of the authors' code. Deviations: none; the K:SEED splits are ours.
    """
    if not split:
        return tuple(range(classes))
    if split in PUBLISHED:
        if classes != 10:
            raise UsageError(
                f"--data_open_set_split={split} is a split of CIFAR-10 and SVHN, which have 10 classes; this "
                f"set has {classes}; pass K:SEED, for example {max(2, classes // 2)}:0"
            )
        return PUBLISHED[split]
    drawn = re.fullmatch(r"(\d+):(\d+)", split)
    if drawn is None or int(drawn[2]) >= 2**32:
        raise UsageError(f"--data_open_set_split={split!r}: must be empty, 0..4, or K:SEED such as 6:0")
    known = int(drawn[1])
    if not 2 <= known < classes:
        raise UsageError(
            f"--data_open_set_split={split}: {known} known classes of {classes}; at least 2 must be known "
            f"and at least 1 unknown"
        )
    permutation = np.random.RandomState(int(drawn[2])).permutation(classes)
    return tuple(sorted(int(label) for label in permutation[:known]))


def relabel(known: tuple[int, ...], classes: int) -> np.ndarray:
    """Return int32 [classes]: the label 0..K-1 that a model sees for each original one, -1 where unknown."""
    label = np.full(classes, -1, np.int32)
    label[list(known)] = np.arange(len(known))
    return label
