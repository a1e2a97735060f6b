"""The training images of a run by class, for methods that draw from them while they train."""

from __future__ import annotations

import numpy as np

from kerasdefense import config
from kerasdefense.data import Splits
from kerasdefense.defenses import ExampleBank
from kerasdefense.defenses.bank import check_counts
from kerasdefense.types import UsageError

_READ = 1024


def make_bank(run: config.Run, splits: Splits) -> ExampleBank:
    """Return the training images that a run's method draws from, augmented as all training images are.

    Raises:
        InputError, UsageError: as `check_bank`.
    """
    check_bank(run, splits)
    train, chosen = splits.train, _chosen(run, splits)
    label = np.sort(train.label[chosen])
    place = np.full(len(train.label), -1)
    place[chosen[np.argsort(train.label[chosen], kind="stable")]] = np.arange(len(chosen))
    image = np.empty((len(chosen), *splits.image_shape), np.uint8)
    for batch in train.grey_levels(_READ).as_numpy_iterator():
        rows = place[batch["index"]]
        image[rows[rows >= 0]] = batch["image"][rows >= 0]
    return ExampleBank(image, label, classes=len(splits.labels), augment=train.augmentation.augmented)


def check_bank(run: config.Run, splits: Splits) -> None:
    """Raise an error for a bank that cannot be made, before anything is trained.

    Raises:
        InputError: a class with fewer than two training images.
        UsageError: more megabytes than `run.defense.bank_limit_mb`, or one image per class.
    """
    train, wanted = splits.train, run.defense
    check_counts(np.bincount(train.label[train.index], minlength=len(splits.labels)), list(splits.labels))
    if wanted.bank_per_class == 1:
        raise UsageError("--defense_bank_per_class=1 leaves nothing to draw; it must be 0 (all images) or at least 2")
    per_image = int(np.prod(splits.image_shape))
    needed, limit = len(_chosen(run, splits)) * per_image, wanted.bank_limit_mb * 10**6
    if needed > limit:
        most = limit // (per_image * len(splits.labels))
        pool = f"--defense_bank_per_class={most}, a pool of so many images of each class, " if most >= 2 else ""
        raise UsageError(
            f"{wanted.name} keeps its training images in memory, which takes {needed / 1e6:,.0f} MB and exceeds "
            f"--defense_bank_limit_mb={wanted.bank_limit_mb}: pass {pool}{'or ' if pool else ''}a higher limit"
        )


def _chosen(run: config.Run, splits: Splits) -> np.ndarray:
    """Return the numbers of the images in the bank: all, or so many of each class, chosen by the seed."""
    train, most = splits.train, run.defense.bank_per_class
    if not most:
        return train.index
    random = np.random.default_rng(run.train.seed)
    shuffled = random.permutation(train.index)
    label = train.label[shuffled]
    return np.concatenate([shuffled[label == each][:most] for each in range(len(splits.labels))])
