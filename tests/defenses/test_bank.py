"""The bank of training images by class: what is drawn, how evenly, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from kerasdefense.attacks import seeds
from kerasdefense.data.augment import Augmentation
from kerasdefense.defenses import ExampleBank
from kerasdefense.defenses.bank import AUGMENTATION_DRAWS
from kerasdefense.types import InputError

COUNTS = np.array([3, 2, 7, 4])
LABEL = np.random.default_rng(0).permutation(np.repeat(np.arange(4), COUNTS))
IMAGE = np.broadcast_to(np.arange(16, dtype=np.uint8)[:, None, None, None], (16, 4, 4, 1)).copy()
"""Images whose grey level is their place."""
HIGHEST = np.float32(1 - 2**-24)
"""The highest number that is drawn from [0, 1)."""


def make(label=LABEL, **settings):
    return ExampleBank(IMAGE, label, **{"classes": 4, **settings})


def drawn(bank, label, *, seed=0, step=0):
    """Return the places of the images drawn for labels, one key per example."""
    keys = seeds.per_example(seed, step, tf.range(len(label)))
    return np.rint(bank.draw(tf.constant(label, tf.int32), keys)[:, 0, 0, 0] * 255).astype(int)


# agkd_bml 3: labels are those asked for, every image can be reached, and labels keep their type
@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_every_image_of_a_class_is_reached_and_no_other(kind):
    bank = make(LABEL.astype(kind))
    assert bank.label.dtype == kind
    for of_class, count in enumerate(COUNTS):
        uniform = np.append(np.arange(count) / count + 0.5 / count, [0, HIGHEST]).astype(np.float32)
        rows = bank.rows(np.full(count + 2, of_class, np.int32), uniform).numpy()
        np.testing.assert_array_equal(tf.gather(bank.label, rows), np.full(count + 2, of_class))
        np.testing.assert_array_equal(
            np.sort(bank.image.numpy()[rows[:-2], 0, 0, 0]), np.flatnonzero(of_class == LABEL)
        )
        assert rows[-2] == rows[0] and rows[-1] == rows[-3]


def test_every_image_has_an_equal_part_of_what_is_drawn_from():
    uniform = np.linspace(0, HIGHEST, 4200, dtype=np.float32)
    for of_class, count in enumerate(COUNTS):
        rows = make().rows(np.full(len(uniform), of_class, np.int32), uniform)
        times = np.unique(rows, return_counts=True)[1]
        assert len(times) == count and np.abs(times - 4200 / count).max() <= 1


# agkd_bml 3: an image of the class, every one as often as the others
def test_draws_are_of_the_class_asked_for_and_uniform():
    label = np.arange(8000) % 4
    place = drawn(make(), label)
    np.testing.assert_array_equal(LABEL[place], label)
    for of_class, count in enumerate(COUNTS):
        times = np.bincount(place[label == of_class], minlength=16)[of_class == LABEL]
        deviation = np.sqrt(2000 / count * (1 - 1 / count))
        assert np.abs(times - 2000 / count).max() < 4 * deviation


# agkd_bml 15: the same seed draws the same images
def test_draws_are_keyed_by_seed_step_and_example():
    label, bank = np.tile(2, 200), make()
    first = drawn(bank, label)
    np.testing.assert_array_equal(drawn(make(), label), first)
    np.testing.assert_array_equal(drawn(bank, label[:50]), first[:50])
    for other in ({"seed": 1}, {"step": 1}):
        assert np.mean(drawn(bank, label, **other) == first) < 0.4  # a seventh by chance
    assert len(set(first)) == 7  # with replacement, and not one image for all


def test_images_are_kept_by_class_and_drawn_as_floats_in_the_unit_range():
    for label in (LABEL, np.sort(LABEL)):
        bank = make(label)
        np.testing.assert_array_equal(bank.label, np.sort(LABEL))
        np.testing.assert_array_equal(bank.image, IMAGE[np.argsort(label, kind="stable")])
    image = ExampleBank(255 * (IMAGE > 7).astype(np.uint8), LABEL, classes=4).draw(
        tf.range(100) % 4, seeds.per_example(0, 0, tf.range(100))
    )
    assert image.dtype == tf.float32 and image.shape == (100, 4, 4, 1) and set(np.unique(image)) == {0, 1}


def test_augmentation_gets_numbers_of_its_own_for_each_image():
    given = []

    def augment(image, uniform):
        given.append((image.numpy(), uniform.numpy()))
        return 16 + image

    label = np.arange(4000) % 4
    place = drawn(make(augment=augment), label) - 16
    ((image, uniform),) = given
    np.testing.assert_array_equal(place, drawn(make(), label))  # the image does not depend on it
    np.testing.assert_array_equal(image[:, 0, 0, 0], place)
    assert uniform.shape == (4000, AUGMENTATION_DRAWS) and (uniform >= 0).all() and (uniform < 1).all()
    own = np.array([np.flatnonzero(np.flatnonzero(LABEL[each] == LABEL) == each)[0] for each in place])
    together = np.corrcoef(np.column_stack([own, uniform]), rowvar=False)
    assert np.abs(together - np.eye(4)).max() < 0.07  # four standard deviations


def test_augmentation_of_training_images_can_be_given():
    pattern = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1)
    bank = ExampleBank(
        np.repeat(pattern, 2, axis=0), np.zeros(2, int), classes=1, augment=Augmentation(1, True).augmented
    )
    image = bank.draw(tf.zeros(500, tf.int32), seeds.per_example(0, 0, tf.range(500))).numpy()
    found = {tuple(each) for each in np.rint(image * 255).astype(int).reshape(500, 16)}
    shifted = np.pad(pattern[0, ..., 0], 1, mode="reflect")
    crops = [shifted[row : row + 4, column : column + 4] for row in range(3) for column in range(3)]
    assert found == {tuple(each.ravel()) for crop in crops for each in (crop, crop[:, ::-1])}


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (IMAGE / 255, LABEL, r"holds uint8 images \[n, h, w, c\] and integer labels, not float64 \(16, 4, 4, 1\) and"),
        (IMAGE[0], LABEL, r"not uint8 \(4, 4, 1\) and int64 labels"),
        (IMAGE, LABEL / 1, "and float64 labels"),
        (IMAGE, LABEL[:-1], r"a bank of 16 images needs as many labels, in \[0, 4\)"),
        (IMAGE, LABEL + 1, r"needs as many labels, in \[0, 4\)"),
        (IMAGE, LABEL - 1, r"needs as many labels, in \[0, 4\)"),
        (IMAGE, np.repeat([0, 1, 2, 3], [5, 6, 4, 1]), "class '3' has 1 training image; a method that draws images"),
        (IMAGE, np.repeat([0, 1, 2], [5, 6, 5]), "class '3' has 0 training images; .* needs at least 2 of each"),
    ],
)
def test_bank_refuses(image, label, message):
    with pytest.raises(InputError, match=message):
        ExampleBank(image, label, classes=4)
