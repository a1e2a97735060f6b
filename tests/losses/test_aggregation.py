"""What training on mixed images descends on: the acceptance properties of DFA's specification, against NumPy."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import scipy.special
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from kerasdefense import losses
from kerasdefense.types import UsageError

BATCH, DIMENSIONS, CLASSES = 6, 16, 10
seeds = st.integers(0, 2**32 - 1)
shares = st.floats(0, 1, width=32)
cosine = functools.partial(losses.aggregation, distance="cosine")


def draw(seed, share=0.3):
    """Return unit vectors of two images, and their mixture."""
    one, two = np.random.default_rng(seed).normal(size=(2, BATCH, DIMENSIONS)).astype("float32")
    one, two = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (one, two))
    return one, two, share * one + (1 - share) * two


def draw_labels(seed):
    random = np.random.default_rng(seed)
    logits = random.uniform(0, 2, size=(BATCH, CLASSES)).astype("float32")
    return logits, *random.integers(CLASSES, size=(2, BATCH)).astype("int32")


def cross_entropy(logits, label, smoothing=0.0):
    target = (1 - smoothing) * np.eye(CLASSES)[label] + smoothing / CLASSES
    return -np.sum(target * scipy.special.log_softmax(logits.astype(float), axis=1), axis=1)


@given(seeds, shares)
def test_aggregation_matches_numpy_one_value_per_example(seed, share):
    mixed, _, target = draw(seed, share)
    distance = np.sum((mixed.astype(float) - target) ** 2, axis=1)
    np.testing.assert_allclose(losses.aggregation(mixed, target), distance / DIMENSIONS, rtol=1e-4, atol=1e-7)
    dot, length = np.sum(mixed * target, axis=1), np.linalg.norm(target, axis=1)
    np.testing.assert_allclose(cosine(mixed, target), 1 - dot / length, atol=1e-5)


# dfa 7: no distance, no loss
@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_aggregation_is_zero_where_the_mixed_image_lies_on_the_mixture(distance):
    _, _, target = draw(0)
    np.testing.assert_allclose(losses.aggregation(target, target, distance=distance), np.zeros(BATCH), atol=1e-6)


# dfa 9: swapping both images and the share
@given(seeds, shares)
def test_mixed_cross_entropy_does_not_change_when_images_and_share_are_swapped(seed, share):
    logits, label, partner = draw_labels(seed)
    there = losses.mixed_cross_entropy(logits, label, partner, np.float32(share))
    back = losses.mixed_cross_entropy(logits, partner, label, 1 - np.float32(share))
    np.testing.assert_allclose(there, back, rtol=1e-5)


# dfa 10: lengths of mixtures
def test_aggregation_of_orthogonal_images_is_what_their_mixture_lacks_in_length():
    one, two = np.eye(DIMENSIONS, dtype="float32")[:2]
    target = (0.5 * one + 0.5 * two)[None]
    assert np.linalg.norm(target) == pytest.approx(np.sqrt(0.5))
    mixed = target / np.linalg.norm(target)
    assert float(losses.aggregation(mixed, target)[0]) == pytest.approx((1 - np.sqrt(0.5)) ** 2 / DIMENSIONS)
    assert float(cosine(mixed, target)[0]) == pytest.approx(0, abs=1e-6)  # which has no length to lack


# dfa 11: where the gradient goes
def gradients(stop, **settings):
    mixed, _, target = map(tf.constant, draw(1))
    with tf.GradientTape() as tape:
        tape.watch([mixed, target])
        loss = losses.aggregation(mixed, target, stop=stop, **settings)
    return tape.gradient(loss, [mixed, target])


@pytest.mark.parametrize("settings", [{}, {"reduction": "sum"}, {"distance": "cosine"}], ids=str)
def test_aggregation_moves_the_side_that_is_not_stopped(settings):
    (to_mixed, none), (nothing, to_target) = gradients("target", **settings), gradients("mixed", **settings)
    assert none is None and nothing is None
    assert np.abs(to_mixed).max() > 1e-3 and np.abs(to_target).max() > 1e-3
    for found, expected in zip(gradients("none", **settings), (to_mixed, to_target)):
        np.testing.assert_array_equal(found, expected)


# dfa 12: how much stronger the sum is
def test_aggregation_by_sum_is_as_many_times_the_mean_as_there_are_dimensions():
    mixed, _, target = draw(2)
    mean = losses.aggregation(mixed, target)
    np.testing.assert_allclose(losses.aggregation(mixed, target, reduction="sum"), DIMENSIONS * mean, rtol=1e-5)


# dfa 14, 15: both labels by their share
@given(seeds, shares, st.sampled_from([0.0, 0.1]))
def test_mixed_cross_entropy_matches_mixed_labels(seed, share, smoothing):
    logits, label, partner = draw_labels(seed)
    expected = share * cross_entropy(logits, label, smoothing) + (1 - share) * cross_entropy(logits, partner, smoothing)
    found = losses.mixed_cross_entropy(logits, label, partner, np.full(BATCH, share, "float32"), smoothing=smoothing)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mixed_cross_entropy_of_images_of_one_class_is_that_of_the_class(share):
    logits, label, _ = draw_labels(3)
    found = losses.mixed_cross_entropy(logits, label, label, np.full(BATCH, share, "float32"))
    np.testing.assert_allclose(found, losses.cross_entropy(logits, label), rtol=1e-6)


def test_shares_are_of_single_images():
    logits, label, partner = draw_labels(4)
    share = np.array([1, 0] * (BATCH // 2), "float32")
    found = losses.mixed_cross_entropy(logits, label, partner, share)
    np.testing.assert_allclose(found, cross_entropy(logits, np.where(share == 1, label, partner)), rtol=1e-5)


# dfa 15: the least that two ideal logits of ten classes leave
def test_mixed_cross_entropy_of_added_cosines_has_a_floor():
    logits, label, partner = draw_labels(5)
    ideal = 2 * np.eye(CLASSES, dtype="float32")[label]
    assert float(losses.mixed_cross_entropy(ideal, label, label, 0.7)[0]) == pytest.approx(0.7966, abs=1e-4)
    for share in (0.0, 0.4, 1.0):  # logits are from 0 to 2
        assert np.min(losses.mixed_cross_entropy(logits, label, partner, np.float32(share))) > 0.7966


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distance": "l1"}, "agg_distance must be one of mse, cosine, not 'l1'"),
        ({"reduction": "max"}, "agg_reduction must be one of mean, sum, not 'max'"),
        ({"stop": "both"}, "agg_stop must be one of target, mixed, none, not 'both'"),
    ],
)
def test_aggregation_refuses(settings, message):
    with pytest.raises(UsageError, match=f"^{message}$"):
        losses.aggregation(*draw(0)[:2], **settings)
