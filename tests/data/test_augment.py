from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from kerasdefense import config
from kerasdefense.data.augment import Augmentation, from_config
from kerasdefense.types import UsageError

SEED = tf.constant([3, 4], tf.int64)


@given(st.integers(2, 7), st.integers(2, 7), st.data())
def test_augmentation_equals_padding_cropping_and_flipping_in_numpy(height, width, data):
    padding = data.draw(st.integers(1, min(height, width) - 1))
    shift = st.integers(-padding, padding)
    draw = data.draw(st.lists(st.tuples(shift, shift, st.integers(0, 1)), min_size=3, max_size=3))
    image = np.random.RandomState(0).randint(0, 256, (3, height, width, 2), np.uint8)
    found = Augmentation(padding, flip=True)(tf.constant(image), tf.constant(draw)).numpy()
    for example, (row, column, flip) in enumerate(draw):
        padded = np.pad(image[example], [(padding, padding), (padding, padding), (0, 0)], mode="reflect")
        crop = padded[padding + row :, padding + column :][:height, :width]
        np.testing.assert_array_equal(found[example], crop[:, ::-1] if flip else crop)


def test_augmentation_draws_every_shift_and_flip_evenly():
    draw = Augmentation(2, flip=True).draw(10_000, SEED).numpy()
    for axis in (0, 1):
        np.testing.assert_allclose(np.bincount(draw[:, axis] + 2) / 10_000, [0.2] * 5, atol=0.02)
    np.testing.assert_allclose(np.bincount(draw[:, 2]) / 10_000, [0.5] * 2, atol=0.02)
    assert (np.abs(np.corrcoef(draw.T) - np.eye(3)) < 0.04).all()


def test_augmentation_without_flip_never_flips():
    assert not Augmentation(2, flip=False).draw(1000, SEED).numpy()[:, 2].any()


def test_augmentation_of_nothing_is_the_identity():
    image = tf.random.stateless_uniform([4, 5, 6, 1], [0, 0])
    draw = Augmentation(0, flip=False).draw(4, SEED)
    np.testing.assert_array_equal(Augmentation(0, flip=False)(image, draw), image)


@pytest.mark.parametrize(("padding", "flip"), [(2, True), (2, False), (0, True), (0, False)])
def test_augmented_moves_and_mirrors_by_numbers_drawn_elsewhere(padding, flip):
    augmentation, shifts = Augmentation(padding, flip=flip), 2 * padding + 1
    image = np.random.RandomState(0).randint(0, 256, (600, 5, 6, 1), np.uint8)
    edges = np.array([[0, 0, 0], [1 - 2**-24, 1 - 2**-24, 1 - 2**-24], [0.5, 0.5, 0.5]])
    uniform = np.concatenate([edges, np.random.RandomState(1).uniform(size=(597, 3))]).astype(np.float32)
    draw = np.floor(uniform * [shifts, shifts, 1 + flip]).astype(np.int32) - [padding, padding, 0]
    np.testing.assert_array_equal(draw[:2], [[-padding, -padding, 0], [padding, padding, flip]])
    assert [set(values) for values in draw.T] == [set(range(-padding, padding + 1))] * 2 + [set(range(1 + flip))]
    found = augmentation.augmented(tf.constant(image), tf.constant(uniform))
    assert found.dtype == tf.uint8
    np.testing.assert_array_equal(found, augmentation(tf.constant(image), tf.constant(draw, tf.int32)))


@pytest.mark.parametrize(
    ("name", "augment", "expected"),
    [
        ("cifar10", "auto", Augmentation(4, True)),
        ("folder", "auto", Augmentation(4, True)),
        ("mnist", "auto", Augmentation(4, False)),
        ("svhn_cropped:3.0.0", "auto", Augmentation(4, False)),
        ("emnist/letters", "auto", Augmentation(4, False)),
        ("mnist", "crop_flip", Augmentation(4, True)),
        ("cifar10", "crop", Augmentation(4, False)),
        ("cifar10", "none", Augmentation(0, False)),
    ],
)
def test_from_config_flips_what_may_be_flipped(name, augment, expected):
    assert from_config(config.Data(name=name, augment=augment), (32, 40, 3)) == expected


def test_from_config_takes_the_padding():
    assert from_config(config.Data(crop_padding=7), (8, 8, 1)).padding == 7
    with pytest.raises(UsageError, match=r"--data_crop_padding=8 .* below the images' side, 8"):
        from_config(config.Data(crop_padding=8), (8, 9, 1))
    with pytest.raises(UsageError, match="unknown --data_augment=blur; valid: auto, none, crop, crop_flip"):
        from_config(config.Data(augment="blur"), (8, 8, 1))
