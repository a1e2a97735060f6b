from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from kerasdefense.detectors import fit_weibull
from kerasdefense.detectors.weibull import cumulative
from kerasdefense.types import InputError

tails = st.lists(st.floats(0, 1e4, width=32), min_size=3, max_size=30)


def share(distance, least, shape, scale):
    each = [tf.constant(np.ravel(value), tf.float32) for value in (least, shape, scale)]
    return cumulative(tf.constant(np.reshape(distance, [-1, 1]), tf.float32), *each).numpy()[:, 0]


@pytest.mark.parametrize("shape, scale", [(0.7, 2.0), (2.0, 1.0), (9.0, 30.0)])
def test_fit_recovers_the_distribution_of_many_samples(shape, scale):
    # osdn_caml 15: within 5 % from 20k samples; over their smallest they start at 1, as the fit shifts them to.
    samples = scipy.stats.weibull_min(shape, scale=scale).rvs(20000, random_state=0)
    found = fit_weibull(samples / samples.min() + 7)
    np.testing.assert_allclose(found, (shape, scale / samples.min()), rtol=0.05)


@given(tails)
def test_fit_is_stationary(tail):
    # osdn_caml 15: MLE stationarity residual < 1e-6.
    shape, scale = fit_weibull(tail)
    if math.isinf(shape):
        return
    distances = np.sort(np.float64(tail))
    t = distances - distances[0] + 1
    relative = np.exp(shape * (np.log(t) - np.log(t[-1])))
    residual = 1 / shape - np.sum(relative * np.log(t)) / np.sum(relative) + np.mean(np.log(t))
    assert abs(residual) < 1e-6 * max(1, 1 / shape)
    np.testing.assert_allclose(scale, t[-1] * np.mean(relative) ** (1 / shape), rtol=1e-6)


@pytest.mark.parametrize("seed, spread", [(0, 1.0), (1, 0.1), (2, 50.0)])
def test_fit_matches_scipy(seed, spread):
    distances = spread * np.random.default_rng(seed).gamma(3.0, size=20)
    shape, _, scale = scipy.stats.weibull_min.fit(distances - distances.min() + 1, floc=0)
    np.testing.assert_allclose(fit_weibull(distances), (shape, scale), rtol=1e-3)


def test_fit_does_not_see_order_or_offset():
    distances = np.random.default_rng(0).gamma(3.0, size=20)
    np.testing.assert_allclose(fit_weibull(distances[::-1] + 5), fit_weibull(distances), rtol=1e-9)


@pytest.mark.parametrize(
    "tail", [[3.0], [0.0, 0.0], [1.0, 2.0], [2.0] * 20, [1.0, 2.0, 2.0, 1.0], [1e4, 1e4 + 1e-6, 1e4 - 1e-6]]
)
def test_fewer_than_three_different_distances_give_a_step(tail):
    # osdn_caml 15: a tail of identical distances falls back to a step at its smallest.
    assert fit_weibull(tail) == (math.inf, 1.0)
    np.testing.assert_array_equal(share([0, 2.5, 3, 3.01, 1e4], 3.0, math.inf, 1.0), [0, 0, 0, 1, 1])


@pytest.mark.parametrize("tail", [[1.0, 2.0, 3.0], [1.0, 1 + 1e-6, 1 + 2e-6], [0.0, 1.0, 1e6]])
def test_three_different_distances_give_a_distribution(tail):
    shape, scale = fit_weibull(tail)
    assert 0 < shape < math.inf and 1 <= scale < math.inf


@pytest.mark.parametrize("tail", [[], [1.0, 2.0, math.nan], [math.inf, 1.0, 2.0]])
def test_fit_refuses_no_distances_and_what_is_not_finite(tail):
    with pytest.raises(InputError, match="one or more finite distances"):
        fit_weibull(tail)


@given(st.floats(0.3, 50), st.floats(1, 20), st.floats(0, 30))
def test_share_matches_scipy(shape, scale, least):
    distance = np.linspace(least - 0.9, least + 3 * scale, 40)
    expected = scipy.stats.weibull_min(shape, scale=scale).cdf(np.float64(np.float32(distance)) - least + 1)
    np.testing.assert_allclose(share(distance, least, shape, scale), expected, atol=2e-4)


@given(tails, st.floats(0, 1e3))
def test_share_rises_from_zero_to_one(tail, start):
    # osdn_caml 16: non-decreasing, 0 up to least - 1, towards 1 far away, always in [0, 1].
    shape, scale = fit_weibull(tail)
    least = np.float32(min(tail))
    distance = np.sort(np.concatenate([least + np.linspace(-3, 3, 50) * start, least + np.geomspace(1e-3, 1e5, 50)]))
    values = share(distance, least, shape, scale)
    assert (np.diff(values) >= -1e-6).all() and values.min() >= 0 and values.max() <= 1
    assert (values[np.float32(distance) <= least - 1] == 0).all()
    assert share([1e30], least, shape, scale) == 1


@pytest.mark.parametrize("shape", [0.3, 1.0, 40.0, 1e8, math.inf])
def test_share_has_finite_gradients(shape):
    distance = tf.constant([[0.0], [8.99999], [9.0], [9.000001], [9.5], [10], [10.001], [12], [1e4], [1e30]])
    with tf.GradientTape() as tape:
        tape.watch(distance)
        value = cumulative(distance, tf.constant([10.0]), tf.constant([shape]), tf.constant([1.5]))
    gradient = tape.gradient(value, distance)
    assert np.isfinite(value).all() and np.isfinite(gradient).all()
