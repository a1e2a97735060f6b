from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_sample_image

from kerasdefense.attacks import CORRUPTIONS, norms, seeds
from kerasdefense.attacks.corruptions import SEVERITIES
from kerasdefense.types import UsageError

EVERY = pytest.mark.parametrize("name", CORRUPTIONS)
RANDOM = {"gaussian_noise", "impulse_noise", "motion_blur", "shot_noise"}
SEED = seeds.per_example(0, 0, tf.range(4))


@pytest.fixture(scope="module")
def photo():
    """Return four parts of a photo, 32x32 in colour."""
    whole = tf.image.resize(load_sample_image("china.jpg") / 255, [64, 64], antialias=True)
    return tf.stack([whole[top : top + 32, left : left + 32] for top in (0, 32) for left in (0, 32)])


def distance(name, image, severity):
    return np.mean(norms.length(CORRUPTIONS[name](image, severity, SEED) - image, "l2"))


@EVERY
def test_corruption_keeps_shape_range_and_its_input(name, photo):
    image = photo.numpy()
    for severity in (1, 5):
        corrupted = CORRUPTIONS[name](image, severity, SEED.numpy())
        assert corrupted.shape == photo.shape and corrupted.dtype == tf.float32
        assert np.isfinite(corrupted).all() and np.min(corrupted) >= 0 and np.max(corrupted) <= 1
    np.testing.assert_array_equal(image, photo)


@EVERY
def test_distance_rises_with_severity(name, photo):
    distances = [distance(name, photo, severity) for severity in SEVERITIES]
    assert distances[0] > 0.1 and (np.diff(distances) > 0.01).all()


@EVERY
def test_equal_seeds_give_equal_images(name, photo):
    corrupt = CORRUPTIONS[name]
    tf.random.uniform([3])
    first = corrupt(photo, 3, SEED)
    np.testing.assert_array_equal(corrupt(photo, 3, SEED), first)
    assert np.array_equal(corrupt(photo, 3, SEED + 1), first) is (name not in RANDOM)


@EVERY
def test_corruption_does_not_depend_on_the_place_in_the_batch(name, photo):
    rows = [3, 1]
    part = CORRUPTIONS[name](tf.gather(photo, rows), 3, tf.gather(SEED, rows))
    np.testing.assert_allclose(part, tf.gather(CORRUPTIONS[name](photo, 3, SEED), rows), atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - {"saturate"}))
def test_corruption_takes_small_gray_images(name):
    image = tf.random.stateless_uniform([2, 8, 8, 1], [0, 0])
    corrupted = CORRUPTIONS[name](image, 5, SEED[:2])
    assert corrupted.shape == image.shape and not np.array_equal(corrupted, image)


def test_noise_has_the_moments_of_its_kind():
    gray = tf.fill([4, 32, 32, 3], 0.5)
    normal, shot, impulse = (CORRUPTIONS[f"{kind}_noise"](gray, 1, SEED) for kind in ("gaussian", "shot", "impulse"))
    assert abs(np.mean(normal) - 0.5) < 2e-3 and abs(np.std(normal) - 0.04) < 2e-3
    assert abs(np.mean(shot) - 0.5) < 2e-3 and abs(np.std(shot) - np.sqrt(0.5 / 500)) < 2e-3
    assert abs(np.mean(impulse == 0.0) - 0.005) < 2e-3 and abs(np.mean(impulse == 1.0) - 0.005) < 2e-3


@pytest.mark.parametrize("name", ["gaussian_blur", "motion_blur", "pixelate", "contrast", "jpeg"])
def test_smoothing_corruptions_leave_a_plain_image_alone(name):
    plain = tf.fill([2, 16, 16, 3], 0.4)
    np.testing.assert_allclose(CORRUPTIONS[name](plain, 5, SEED[:2]), plain, atol=0.01)


@EVERY
@pytest.mark.parametrize("severity", [0, 6, 2.5])
def test_corruption_refuses_other_severities(name, severity, photo):
    with pytest.raises(UsageError, match=f"severity must be one of 1, 2, 3, 4, 5, not {severity}"):
        CORRUPTIONS[name](photo, severity, SEED)


def test_saturate_refuses_gray_images():
    with pytest.raises(UsageError, match="saturate needs images with 3 colour channels, not 1"):
        CORRUPTIONS["saturate"](tf.zeros([1, 8, 8, 1]), 1, SEED[:1])
