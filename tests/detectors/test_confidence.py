from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from kerasdefense.detectors import GEN, MSP, Energy, MaxLogit
from kerasdefense.types import UsageError

seeds, classes, scales = st.integers(0, 2**32 - 1), st.integers(2, 12), st.sampled_from([0.01, 1.0, 5.0])


def draw(seed, classes, scale):
    return (scale * np.random.default_rng(seed).normal(size=[6, classes])).astype(np.float32)


def gradient(detector, logits):
    logits = tf.constant(logits)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        score = detector.score({"logits": logits})
    return tape.gradient(score, logits).numpy()


@given(seeds, classes, scales)
def test_msp_matches_scipy_and_lies_between_one_and_one_over_the_classes(seed, classes, scale):
    # evaluation 13: MSP in [1/C, 1].
    logits = draw(seed, classes, scale)
    score = MSP().score({"logits": logits}).numpy()
    np.testing.assert_allclose(score, -scipy.special.softmax(np.float64(logits), axis=1).max(axis=1), rtol=1e-5)
    assert (score <= -1 / classes + 1e-6).all() and (score >= -1 - 1e-6).all()


@given(seeds, classes, scales)
def test_energy_is_minus_logsumexp_and_beyond_the_largest_logit(seed, classes, scale):
    # evaluation 13: Energy(T=1) == logsumexp, energy >= max logit.
    logits = draw(seed, classes, scale)
    score = Energy().score({"logits": logits}).numpy()
    np.testing.assert_allclose(score, -scipy.special.logsumexp(np.float64(logits), axis=1), rtol=1e-5, atol=1e-6)
    assert (score <= MaxLogit().score({"logits": logits}).numpy() + 1e-6).all()


def test_energy_by_hand_at_another_temperature():
    score = Energy(temperature=2).score({"logits": np.log([[1.0, 4.0, 9.0]])})
    np.testing.assert_allclose(score, [-2 * np.log(1 + 2 + 3)], rtol=1e-6)


def test_max_logit_by_hand():
    np.testing.assert_array_equal(MaxLogit().score({"logits": [[1.0, 5, 2], [-3, -1, -2]]}), [-5, 1])


@given(seeds, classes, scales, st.integers(1, 14))
def test_gen_matches_numpy(seed, classes, scale, top):
    logits = draw(seed, classes, scale)
    probability = np.sort(scipy.special.softmax(np.float64(logits), axis=1), axis=1)[:, -top:]
    expected = np.sum(probability**0.1 * (1 - probability) ** 0.1, axis=1)
    np.testing.assert_allclose(GEN(top=top).score({"logits": logits}), expected, rtol=1e-4)


def test_gen_by_hand():
    # p = (1/2, 1/4, 1/4), gamma 1/2: sqrt(1/4) + 2 sqrt(3/16); of the top one the first term alone.
    logits = {"logits": np.log([[0.25, 0.5, 0.25]])}
    np.testing.assert_allclose(GEN(gamma=0.5).score(logits), [0.5 + 2 * np.sqrt(3 / 16)], rtol=1e-6)
    np.testing.assert_allclose(GEN(gamma=0.5, top=1).score(logits), [0.5], rtol=1e-6)


def test_gen_keeps_digits_and_gradient_where_the_probability_rounds_to_one():
    # With margin m, both terms are near exp(-gamma m), and their slope in m is -gamma times that.
    margin = np.float32([20, 40, 100])
    logits = np.stack([margin, 0 * margin], axis=1)
    assert (tf.nn.softmax(logits)[:, 0].numpy() == 1).all()
    np.testing.assert_allclose(GEN().score({"logits": logits}), 2 * np.exp(-0.1 * margin), rtol=1e-4)
    np.testing.assert_allclose(gradient(GEN(), logits)[:, 0], -0.2 * np.exp(-0.1 * margin), rtol=1e-4)


def test_gen_counts_no_more_classes_than_there_are():
    logits = draw(0, 5, 1.0)
    np.testing.assert_array_equal(GEN(top=5).score({"logits": logits}), GEN(top=100).score({"logits": logits}))


@pytest.mark.parametrize("detector", [MSP(), Energy(), GEN(), MaxLogit()])
def test_score_falls_as_the_largest_logit_alone_rises(detector):
    logits = np.stack([np.linspace(0.1, 8, 30), np.zeros(30), np.zeros(30)], axis=1).astype(np.float32)
    assert (np.diff(detector.score({"logits": logits})) < 0).all()


@given(seeds, classes, scales)
def test_msp_stand_in_is_the_log_of_the_odds(seed, classes, scale):
    logits = {"logits": draw(seed, classes, scale)}
    probability = scipy.special.softmax(np.float64(logits["logits"]), axis=1).max(axis=1)
    expected = np.log(
        (1 - probability) / probability, where=probability < 1 - 1e-9, out=np.full(len(probability), np.nan)
    )
    found = MSP().stand_ins()["log_odds"](logits).numpy()
    kept = np.isfinite(expected)
    np.testing.assert_allclose(found[kept], expected[kept], rtol=1e-3, atol=1e-4)


def test_msp_stand_in_orders_what_the_probability_cannot():
    saturated = {"logits": np.float32([[40, 0, 0], [50, 0, 0]])}
    assert np.diff(MSP().score(saturated)) == 0
    assert np.diff(MSP().stand_ins()["log_odds"](saturated)) == pytest.approx(-10)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Energy(temperature=0), "temperature must be a finite number above 0, not 0"),
        (lambda: Energy(temperature=float("inf")), "temperature must be a finite number above 0, not inf"),
        (lambda: GEN(gamma=0), "gamma of gen must be between 0 and 1, not 0"),
        (lambda: GEN(gamma=1), "gamma of gen must be between 0 and 1, not 1"),
        (lambda: GEN(top=0), "top of gen must be at least 1, not 0"),
    ],
)
def test_settings_are_checked(build, message):
    with pytest.raises(UsageError, match=message):
        build()
