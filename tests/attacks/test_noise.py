from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

from kerasdefense import losses
from kerasdefense.attacks import RandomNoise, norms, seeds
from kerasdefense.types import UsageError

EVERY_NORM = pytest.mark.parametrize("norm", norms.NORMS)
GRAY = tf.fill([400, 4, 4, 1], 0.5)
SEED = seeds.per_example(0, 0, tf.range(400))


def delta(norm, kind, epsilon=0.3):
    """Return what the kind number 0, 1 or 2 adds to gray images, [400, 16]."""
    number = tf.fill([400], kind + 3)
    noisy = RandomNoise(norm, epsilon).noisy(GRAY, SEED, number)
    return np.reshape(noisy - GRAY, [400, 16])


def test_first_kind_is_uniform_in_the_ball():
    values = delta("linf", 0)
    assert scipy.stats.kstest(values.ravel(), "uniform", args=(-0.3, 0.6)).pvalue > 0.01
    radius = np.linalg.norm(delta("l2", 0), axis=1) / 0.3
    assert scipy.stats.kstest(radius**16, "uniform").pvalue > 0.01
    assert np.abs(delta("l2", 0).mean()) < 0.01


def test_second_kind_is_normal_and_projected():
    values = delta("linf", 1) / 0.3
    inside = np.abs(values) < 0.999
    assert abs(inside.mean() - 0.683) < 0.02
    assert scipy.stats.kstest(values[inside], scipy.stats.truncnorm(-1, 1).cdf).pvalue > 0.01
    np.testing.assert_allclose(np.abs(values[~inside]), 1, rtol=1e-3)
    length = np.linalg.norm(delta("l2", 1), axis=1)
    assert (length <= 0.3 * (1 + 1e-5)).all() and (length > 0.299).mean() > 0.95


@EVERY_NORM
def test_third_kind_is_a_corner_of_a_cube(norm):
    values = delta(norm, 2)
    np.testing.assert_allclose(np.abs(values), 0.3 if norm == "linf" else 0.3 / 4, rtol=1e-5)
    assert abs((values > 0).mean() - 0.5) < 0.03


@EVERY_NORM
def test_draws_differ_over_examples_and_numbers_and_not_over_places(norm):
    attack, number = RandomNoise(norm, 0.3), tf.range(400) % 5
    noisy = attack.noisy(GRAY, SEED, number).numpy()
    assert len(np.unique(np.reshape(noisy, [400, -1]), axis=0)) == 400
    rows = [7, 3, 399]
    part = attack.noisy(GRAY[:3], tf.gather(SEED, rows), tf.gather(number, rows))
    np.testing.assert_allclose(part, noisy[rows], atol=1e-7)


@EVERY_NORM
def test_best_try_by_margin_is_kept_without_gradients(norm, trained):
    image, label, seed = trained.image[:12], trained.label[:12], seeds.per_example(0, 0, tf.range(12))

    def logits_fn(each):
        return tf.constant(trained.logits_fn(each).numpy())

    attack = RandomNoise(norm, {"linf": 0.15, "l2": 0.8}[norm], draws=12)
    result = attack(logits_fn, image, label, seed)
    tries = [attack.noisy(image, seed, tf.fill([12], number)) for number in range(12)]
    margins = np.stack([losses.margin(logits_fn(each), label) for each in tries])
    np.testing.assert_allclose(result.loss, margins.max(axis=0), rtol=1e-5)
    expected = np.stack(tries)[margins.argmax(axis=0), np.arange(12)]
    np.testing.assert_allclose(result.image, expected, atol=1e-6)
    np.testing.assert_array_equal(result.success, margins.max(axis=0) > 0)
    np.testing.assert_array_equal(result.queries, [12] * 12)


def test_noise_refuses_no_draws():
    with pytest.raises(UsageError, match="draws must be at least 1, not 0"):
        RandomNoise(draws=0)
