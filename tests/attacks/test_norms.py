from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from kerasdefense.attacks import norms, seeds
from kerasdefense.types import UsageError

NORMS = st.sampled_from(norms.NORMS)
EPSILONS = st.sampled_from([0.0, 1e-3, 8 / 255]) | st.floats(0.01, 2)
DRAWS = st.integers(0, 2**32 - 1)
SCALES = st.sampled_from([1e-3, 0.1, 1.0, 100.0])


def images(seed, scale=1.0):
    """Return images in [0, 1], some pixels at the box, and points anywhere around them."""
    random = np.random.default_rng(seed)
    shape = random.integers(1, 5, size=4)
    image = np.clip(random.uniform(-0.2, 1.2, size=shape), 0, 1).astype(np.float32)
    point = (image + scale * random.normal(size=shape)).astype(np.float32)
    return tf.constant(image), tf.constant(point)


def lengths(delta, norm):
    flat = np.reshape(delta, [delta.shape[0], -1]).astype(np.float64)
    return np.abs(flat).max(axis=1) if norm == "linf" else np.sqrt(np.sum(flat**2, axis=1))


def assert_feasible(image_adv, image, *, epsilon, norm):
    image_adv, image = np.asarray(image_adv, np.float64), np.asarray(image, np.float64)
    assert (image_adv >= 0).all() and (image_adv <= 1).all()
    assert (lengths(image_adv - image, norm) <= epsilon * (1 + 1e-5) + 1e-7).all()


@given(NORMS, EPSILONS, DRAWS, SCALES)
def test_projection_is_feasible(norm, epsilon, seed, scale):
    image, point = images(seed, scale)
    projected = norms.project(point, image, epsilon=epsilon, norm=norm)
    assert_feasible(projected, image, epsilon=epsilon, norm=norm)


@given(NORMS, EPSILONS, DRAWS, SCALES)
def test_projection_is_idempotent(norm, epsilon, seed, scale):
    image, point = images(seed, scale)
    once = norms.project(point, image, epsilon=epsilon, norm=norm)
    np.testing.assert_allclose(norms.project(once, image, epsilon=epsilon, norm=norm), once, rtol=0, atol=1e-6)


@given(EPSILONS, DRAWS, SCALES)
def test_projection_on_linf_is_the_nearest_feasible_point(epsilon, seed, scale):
    image, point = images(seed, scale)
    nearest = np.clip(point, np.maximum(image.numpy() - epsilon, 0), np.minimum(image.numpy() + epsilon, 1))
    np.testing.assert_allclose(norms.project(point, image, epsilon=epsilon, norm="linf"), nearest, rtol=0, atol=1e-6)


@given(EPSILONS, DRAWS, SCALES)
def test_projection_on_l2_shrinks_and_clips(epsilon, seed, scale):
    image, point = images(seed, scale)
    delta = point.numpy().astype(np.float64) - image.numpy()
    factor = np.minimum(1, epsilon / lengths(delta, "l2")).reshape(-1, 1, 1, 1)
    expected = np.clip(image + delta * factor, 0, 1)
    projected = norms.project(point, image, epsilon=epsilon, norm="l2")
    np.testing.assert_allclose(projected, expected, rtol=0, atol=1e-5)


@given(NORMS, DRAWS)
def test_projection_keeps_points_inside(norm, seed):
    image, point = images(seed)
    point = tf.clip_by_value(point, 0, 1)
    epsilon = 1.01 * float(lengths(point - image, norm).max()) + 1e-6
    np.testing.assert_allclose(norms.project(point, image, epsilon=epsilon, norm=norm), point, rtol=0, atol=1e-6)


@given(NORMS, DRAWS, SCALES)
def test_projection_with_epsilon_zero_is_the_image(norm, seed, scale):
    image, point = images(seed, scale)
    np.testing.assert_array_equal(norms.project(point, image, epsilon=0.0, norm=norm), image)


@given(NORMS, DRAWS, SCALES)
def test_length_matches_numpy(norm, seed, scale):
    _, point = images(seed, scale)
    np.testing.assert_allclose(norms.length(point, norm), lengths(point, norm), rtol=1e-5)


@given(DRAWS, st.sampled_from([1e-37, 1e-20, 1e-3, 1.0, 1e20]))
def test_direction_has_unit_length_however_small_or_large_the_gradient(seed, scale):
    image, point = images(seed)
    gradient = (point - image) * np.float32(scale)
    np.testing.assert_allclose(lengths(norms.direction(gradient, "l2"), "l2"), 1, rtol=1e-5)
    np.testing.assert_array_equal(norms.direction(gradient, "linf"), np.sign(gradient))


@pytest.mark.parametrize("norm", norms.NORMS)
def test_direction_of_a_zero_gradient_is_zero(norm):
    np.testing.assert_array_equal(norms.direction(tf.zeros([2, 3, 3, 1]), norm), np.zeros([2, 3, 3, 1]))


@given(NORMS, EPSILONS, DRAWS)
def test_random_point_is_feasible(norm, epsilon, seed):
    image, _ = images(seed)
    keys = seeds.per_example(seed % 1000, 0, tf.range(image.shape[0]))
    assert_feasible(norms.random_point(image, epsilon=epsilon, norm=norm, seed=keys), image, epsilon=epsilon, norm=norm)


@pytest.mark.parametrize("norm", norms.NORMS)
def test_random_point_with_epsilon_zero_is_the_image(norm):
    image, _ = images(3)
    keys = seeds.per_example(0, 0, tf.range(image.shape[0]))
    np.testing.assert_array_equal(norms.random_point(image, epsilon=0.0, norm=norm, seed=keys), image)


@pytest.mark.parametrize("norm", norms.NORMS)
def test_random_point_does_not_depend_on_the_place_in_the_batch(norm):
    image = tf.random.stateless_uniform([7, 4, 4, 2], [0, 0])
    keys = seeds.per_example(5, 1, tf.range(7))
    points = norms.random_point(image, epsilon=0.3, norm=norm, seed=keys).numpy()
    for rows in ([6, 2, 0, 1, 3, 5, 4], [3], [1, 1, 5]):
        moved = norms.random_point(tf.gather(image, rows), epsilon=0.3, norm=norm, seed=tf.gather(keys, rows))
        np.testing.assert_array_equal(moved, points[rows])
    assert len(np.unique(points - image, axis=0)) == 7


@tf.function
def unit_draws(norm, shape, batch):
    """Return `batch` points of the unit ball [batch, d], drawn around a gray image where the box cuts none off."""
    gray = tf.fill([batch, *shape], 0.5)
    points = norms.random_point(gray, epsilon=0.25, norm=norm, seed=seeds.per_example(1, 0, tf.range(batch)))
    return tf.reshape((points - gray) / 0.25, [batch, -1])


def test_random_point_on_linf_is_uniform():
    draws = unit_draws("linf", (3, 3, 1), 300).numpy()
    assert scipy.stats.kstest(draws.ravel(), "uniform", args=(-1, 2)).pvalue > 0.01
    correlation = np.corrcoef(draws.T) - np.eye(9)
    assert np.abs(correlation).max() < 0.25


def test_random_point_on_l2_has_the_radius_of_a_uniform_draw():
    radius = np.linalg.norm(unit_draws("l2", (2, 2, 3), 600), axis=1)
    assert scipy.stats.kstest(radius**12, "uniform").pvalue > 0.01


def test_random_point_on_l2_has_a_uniform_direction_that_is_independent_of_its_radius():
    draws = unit_draws("l2", (1, 1, 2), 600).numpy()
    angle = np.arctan2(draws[:, 0], draws[:, 1])
    assert scipy.stats.kstest(angle, "uniform", args=(-np.pi, 2 * np.pi)).pvalue > 0.01
    assert scipy.stats.spearmanr(angle, np.linalg.norm(draws, axis=1)).pvalue > 0.01


def test_unknown_norm_is_refused_with_the_valid_ones():
    with pytest.raises(UsageError, match="unknown norm 'l1'; valid: linf, l2"):
        norms.check_norm("l1")
