from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from kerasdefense import losses

seeds = st.integers(0, 2**32 - 1)
classes = st.integers(2, 12)
scales = st.sampled_from([0.01, 1.0, 30.0])


def draw(seed, classes, scale, batch=6):
    random = np.random.default_rng(seed)
    logits = (scale * random.normal(size=(batch, classes))).astype(np.float32)
    return tf.constant(logits), random.integers(0, classes, batch).astype(np.int32)


@given(seeds, classes, scales)
def test_cross_entropy_matches_scipy(seed, classes, scale):
    logits, label = draw(seed, classes, scale)
    expected = -scipy.special.log_softmax(logits.numpy().astype(np.float64), axis=1)[np.arange(6), label]
    np.testing.assert_allclose(losses.cross_entropy(logits, label), expected, rtol=1e-5, atol=1e-5 * scale)


@given(seeds, classes, st.floats(0, 0.99))
def test_cross_entropy_with_smoothing_matches_smoothed_one_hot_labels(seed, classes, smoothing):
    logits, label = draw(seed, classes, 3.0)
    target = (1 - smoothing) * np.eye(classes)[label] + smoothing / classes
    expected = -np.sum(target * scipy.special.log_softmax(logits.numpy().astype(np.float64), axis=1), axis=1)
    np.testing.assert_allclose(losses.cross_entropy(logits, label, smoothing=smoothing), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_gradient_is_softmax_minus_target_and_its_rows_sum_to_zero(smoothing):
    logits, label = draw(0, 7, 3.0)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = losses.cross_entropy(logits, label, smoothing=smoothing)
    gradient = tape.gradient(loss, logits).numpy()
    target = (1 - smoothing) * np.eye(7)[label] + smoothing / 7
    np.testing.assert_allclose(gradient, scipy.special.softmax(logits, axis=1) - target, atol=1e-6)
    np.testing.assert_allclose(gradient.sum(axis=1), 0, atol=1e-6)


def test_cross_entropy_of_huge_logits_is_finite():
    logits = tf.constant([[1e4, -1e4, 0], [-1e4, 1e4, 0]])
    np.testing.assert_allclose(losses.cross_entropy(logits, np.array([0, 0])), [0, 2e4])


@given(seeds, classes, scales)
def test_margin_matches_numpy_and_its_sign_is_correctness(seed, classes, scale):
    logits, label = draw(seed, classes, scale)
    others = np.where(np.eye(classes, dtype=bool)[label], -np.inf, logits)
    margin = losses.margin(logits, label).numpy()
    np.testing.assert_array_equal(margin, others.max(axis=1) - logits.numpy()[np.arange(6), label])
    np.testing.assert_array_equal(margin < 0, logits.numpy().argmax(axis=1) == label)


def test_margin_by_hand():
    logits = tf.constant([[1.0, 4, 2], [1, 4, 2], [5, 5, 0]])
    np.testing.assert_array_equal(losses.margin(logits, np.array([1, 2, 0])), [-2, 2, 0])


@given(seeds, classes, st.sampled_from([0.01, 1.0, 5.0]))
def test_kl_divergence_matches_scipy_and_is_not_negative(seed, classes, scale):
    reference, _ = draw(seed, classes, scale)
    logits, _ = draw(seed + 1, classes, scale)
    p = scipy.special.softmax(reference.numpy().astype(np.float64), axis=1)
    q = scipy.special.softmax(logits.numpy().astype(np.float64), axis=1)
    divergence = losses.kl_divergence(reference, logits).numpy()
    np.testing.assert_allclose(divergence, scipy.special.rel_entr(p, q).sum(axis=1), rtol=1e-4, atol=1e-6)
    assert (divergence >= -1e-6).all()


@given(seeds, classes, st.floats(-100, 100))
def test_kl_divergence_of_equal_distributions_is_zero(seed, classes, shift):
    logits, _ = draw(seed, classes, 3.0)
    np.testing.assert_allclose(losses.kl_divergence(logits, logits + shift), 0, atol=1e-5)


@pytest.mark.parametrize(
    "loss",
    [losses.cross_entropy, losses.margin, lambda logits, label: losses.kl_divergence(logits[::-1], logits)],
    ids=["cross_entropy", "margin", "kl_divergence"],
)
def test_losses_give_one_value_per_example(loss):
    logits, label = draw(0, 5, 1.0)
    assert loss(logits, label).shape == [6]
