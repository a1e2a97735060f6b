"""The bank of a run: which training images are in it, how they are augmented, and what it may take."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import config
from kerasdefense.attacks import seeds
from kerasdefense.data.augment import Augmentation
from kerasdefense.training.bank import check_bank, make_bank
from kerasdefense.types import UsageError

DRAWS = 400


def run_of(seed=0, **settings):
    return config.Run(defense=config.Defense(name="agkd_bml", **settings), train=config.Train(seed=seed))


def numbers_of(bank, splits):
    """Return the numbers of the training images that are in a bank."""
    batch = next(splits.train.grey_levels(splits.train.examples).as_numpy_iterator())
    numbers = {image.tobytes(): number for image, number in zip(batch["image"], batch["index"])}
    assert len(numbers) == splits.train.examples  # no two are alike
    return np.array([numbers[image.tobytes()] for image in bank.image.numpy()])


def test_bank_holds_every_training_image_and_no_other(digits):
    bank = make_bank(run_of(), digits)
    numbers = numbers_of(bank, digits)
    np.testing.assert_array_equal(np.sort(numbers), digits.train.index)
    assert not set(numbers) & set(digits.validation.index)
    np.testing.assert_array_equal(bank.label, digits.train.label[numbers])
    np.testing.assert_array_equal(bank.count, np.bincount(digits.train.label[digits.train.index]))


# agkd_bml 15: the same seed, the same pool
def test_pool_has_so_many_images_of_each_class_chosen_by_the_seed(digits):
    pools = [make_bank(run_of(seed, bank_per_class=5), digits) for seed in (0, 0, 1)]
    chosen = []
    for pool in pools:
        numbers = numbers_of(pool, digits)
        np.testing.assert_array_equal(pool.count, np.full(10, 5))
        np.testing.assert_array_equal(pool.label, digits.train.label[numbers])
        chosen.append(set(numbers))
        assert len(chosen[-1]) == 50 and chosen[-1] <= set(digits.train.index)
    assert chosen[0] == chosen[1] and len(chosen[0] & chosen[2]) < 20
    first = [digits.train.index[digits.train.label[digits.train.index] == each][:5] for each in range(10)]
    assert chosen[0] != set(np.concatenate(first))


def test_pool_larger_than_a_class_is_the_whole_class(digits):
    count = np.bincount(digits.train.label[digits.train.index])
    most = int(np.sort(count)[5])
    assert count.min() < most < count.max()
    bank = make_bank(run_of(bank_per_class=most), digits)
    np.testing.assert_array_equal(bank.count, np.minimum(count, most))


# agkd_bml 3: every image can be drawn
@pytest.mark.parametrize("flip", [False, True])
def test_draws_are_training_images_moved_and_mirrored_as_in_training(digits, flip):
    augmentation = Augmentation(1, flip=flip)
    splits = dataclasses.replace(digits, train=dataclasses.replace(digits.train, augmentation=augmentation))
    assert flip or augmentation == digits.train.augmentation
    bank = make_bank(run_of(bank_per_class=2), splits)
    label = np.arange(DRAWS) % 10
    drawn = bank.draw(tf.constant(label, tf.int32), seeds.per_example(0, 0, tf.range(DRAWS))).numpy()
    numbers, made = numbers_of(bank, digits), {}
    for image, number in zip(bank.image.numpy(), numbers):
        padded = np.pad(image, [(1, 1), (1, 1), (0, 0)], mode="reflect")
        for row, column in np.ndindex(3, 3):
            crop = padded[row : row + 8, column : column + 8]
            for mirrored in range(1 + flip):
                made[(crop[:, ::-1] if mirrored else crop).tobytes()] = (number, row, column, mirrored)
    found = [made[np.rint(image * 255).astype(np.uint8).tobytes()] for image in drawn]
    np.testing.assert_array_equal(digits.train.label[[number for number, *_ in found]], label)
    assert {number for number, *_ in found} == set(numbers)
    for place, values in ((1, 3), (2, 3), (3, 1 + flip)):
        times = np.bincount([each[place] for each in found], minlength=values)
        assert np.abs(times - DRAWS / values).max() < 4 * np.sqrt(DRAWS / values)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"bank_limit_mb": 1},
            r"takes 5 MB and exceeds --defense_bank_limit_mb=1: pass --defense_bank_per_class=24, a",
        ),
        ({"bank_limit_mb": 1, "bank_per_class": 25}, "takes 1 MB and exceeds --defense_bank_limit_mb=1: pass .*=24"),
        ({"bank_limit_mb": 0, "bank_per_class": 2}, "takes 0 MB and exceeds --defense_bank_limit_mb=0: pass a higher"),
        ({"bank_per_class": 1}, "--defense_bank_per_class=1 leaves nothing to draw; it must be 0 .* or at least 2"),
    ],
)
def test_bank_beyond_its_limit_or_of_single_images_is_refused(digits, settings, message):
    large = dataclasses.replace(digits, image_shape=(64, 64, 1))
    check_bank(run_of(bank_limit_mb=1, bank_per_class=24), large)
    for look in (check_bank, make_bank):
        with pytest.raises(UsageError, match=message):
            look(run_of(**settings), large)
