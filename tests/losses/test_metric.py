"""Angular distances and triplets, against NumPy and TensorFlow Addons."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from kerasdefense import losses

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # the notice of TFA's end of life
    import tensorflow_addons as tfa

seeds = st.integers(0, 2**32 - 1)
margins = st.sampled_from([0.0, 0.03, 0.5])


def draw(seed, batch=6, dimensions=5):
    return np.random.default_rng(seed).normal(size=(batch, dimensions)).astype(np.float32)


def cosine(one, two):
    one, two = one.astype(np.float64), two.astype(np.float64)
    return np.sum(one * two, axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)


@given(seeds)
def test_angular_distance_matches_numpy(seed):
    one, two = draw(seed), draw(seed + 1)
    found = losses.angular_distance(one, two)
    assert found.shape == [6] and found.dtype == tf.float32
    np.testing.assert_allclose(found, 1 - np.abs(cosine(one, two)), atol=1e-5)
    np.testing.assert_allclose(losses.angular_distance(one, two, absolute=False), 1 - cosine(one, two), atol=1e-5)


# agkd_bml 9: zero of itself and of its opposite, whatever the length, in [0, 1]
@given(seeds, st.sampled_from([0.01, 3.0, 1000.0]))
def test_angular_distance_is_of_directions_alone(seed, scale):
    one, two = draw(seed), draw(seed + 1)
    distance = losses.angular_distance(one, two).numpy()
    np.testing.assert_allclose(losses.angular_distance(one, one), 0, atol=1e-5)
    np.testing.assert_allclose(losses.angular_distance(scale * one, two), distance, atol=1e-5)
    np.testing.assert_allclose(losses.angular_distance(two, one), distance, atol=1e-5)
    assert (distance >= 0).all() and (distance <= 1).all()
    np.testing.assert_allclose(losses.angular_distance(one, -one), 0, atol=1e-5)
    np.testing.assert_allclose(losses.angular_distance(one, -one, absolute=False), 2, atol=1e-5)


# agkd_bml 9: 1 from zero, and finite
@pytest.mark.parametrize("absolute", [True, False])
def test_angular_distance_from_zero_is_one_with_a_finite_gradient(absolute):
    zero, other = tf.zeros([6, 5]), tf.constant(draw(0))
    with tf.GradientTape() as tape:
        tape.watch([zero, other])
        distance = losses.angular_distance(zero, other, absolute=absolute)
    np.testing.assert_array_equal(distance, np.ones(6))
    for gradient in tape.gradient(distance, [zero, other]):
        assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(losses.angular_distance(zero, zero, absolute=absolute), np.ones(6))


# agkd_bml 10: the margin where both are equally far, 0 where the negative is farther by it, at most 1 + margin
@given(seeds, margins)
def test_triplet_is_the_margin_zero_and_at_most_one_and_the_margin(seed, margin):
    anchor, positive, negative = (np.abs(draw(seed + place)) for place in range(3))
    near, far = (1 - cosine(anchor, each) for each in (positive, negative))
    found = losses.angular_triplet(anchor, positive, negative, margin=margin).numpy()
    np.testing.assert_allclose(found, np.maximum(0, margin + near - far), atol=1e-5)
    np.testing.assert_array_equal(found[far >= near + margin + 1e-5], 0)
    assert (found >= 0).all() and (found <= 1 + margin).all()
    same = losses.angular_triplet(anchor, positive, positive, margin=margin)
    np.testing.assert_allclose(same, np.full(6, margin), atol=1e-5)
    orthogonal, axes = tf.eye(6)[::-1], tf.eye(6)
    np.testing.assert_allclose(losses.angular_triplet(axes, orthogonal, axes, margin=margin), 1 + margin, atol=1e-5)
    np.testing.assert_allclose(
        losses.angular_triplet(axes, axes, orthogonal, margin=margin), max(0, margin - 1), atol=1e-5
    )


def test_triplet_pulls_to_the_positive_and_pushes_from_the_negative():
    anchor, positive, negative = (tf.constant(np.abs(draw(place))) for place in range(3))
    with tf.GradientTape() as tape:
        tape.watch([positive, negative])
        loss = losses.angular_triplet(anchor, positive, negative, margin=1.0)  # no example is at 0
    to_positive, to_negative = tape.gradient(loss, [positive, negative])
    for each, gradient, sign in ((positive, to_positive, -1), (negative, to_negative, 1)):
        before, after = (losses.angular_distance(anchor, moved) for moved in (each, each - 1e-2 * gradient))
        assert (sign * (after - before).numpy() > 0).all()


# agkd_bml 10: where the definitions meet
@given(seeds, margins)
def test_triplet_equals_that_of_tensorflow_addons(seed, margin):
    """TFA's distance is one minus the cosine, ours one minus its absolute value: the same of embeddings after a ReLU.

    TFA looks for its triplets itself: of each anchor of a batch, the farthest positive and the nearest negative. With
    two examples of each of two classes there is one positive, and the nearest negative is what is given here.
    """
    embedding, label = np.abs(draw(seed, batch=4)), np.array([0, 0, 1, 1])
    positive, negatives = np.array([1, 0, 3, 2]), np.array([[2, 3], [2, 3], [0, 1], [0, 1]])
    distances = [1 - cosine(embedding, embedding[negatives[:, place]]) for place in (0, 1)]
    nearest = embedding[negatives[np.arange(4), np.argmin(distances, axis=0)]]
    expected = tfa.losses.triplet_hard_loss(label, embedding, margin=margin, distance_metric="angular")
    for absolute in (True, False):
        found = losses.angular_triplet(embedding, embedding[positive], nearest, margin=margin, absolute=absolute)
        assert float(tf.reduce_mean(found)) == pytest.approx(float(expected), abs=1e-5)


@given(seeds)
def test_mean_square_is_of_each_embedding(seed):
    embedding = draw(seed)
    found = losses.mean_square(embedding)
    assert found.shape == [6]
    np.testing.assert_allclose(found, np.mean(embedding.astype(np.float64) ** 2, axis=1), rtol=1e-5)
