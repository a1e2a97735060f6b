"""Attention maps and how far apart they are, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from kerasdefense import losses
from kerasdefense.types import UsageError

seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([0.01, 1.0, 100.0])


def draw(seed, side=4, channels=5, batch=3):
    """Return feature maps as they are after a ReLU: about half of them zero."""
    features = np.random.default_rng(seed).normal(size=(batch, side, side, channels))
    return np.maximum(features, 0).astype(np.float32)


def map_in_numpy(features, power=1.0, norm="minmax"):
    maps = np.sum(np.abs(features.astype(np.float64)) ** power, axis=-1)
    if norm == "l2":
        return maps / np.sqrt(np.sum(maps**2, axis=(1, 2), keepdims=True))
    lowest, highest = (extreme(maps, axis=(1, 2), keepdims=True) for extreme in (np.min, np.max))
    return (maps - lowest) / (highest - lowest)


@given(seeds, st.sampled_from([1.0, 1.5, 2.0, 3.0]), st.sampled_from(losses.attention.NORMS))
def test_attention_map_matches_numpy(seed, power, norm):
    features = draw(seed) - np.float32(0.1)  # of both signs
    found = losses.attention_map(features, power=power, norm=norm)
    assert found.shape == features.shape[:3] and found.dtype == tf.float32
    np.testing.assert_allclose(found, map_in_numpy(features, power, norm), atol=1e-5)


def test_attention_map_by_hand():
    features = np.array([[[[1, 1], [0, 4]], [[3, 0], [2, -4]]]], np.float32)
    np.testing.assert_allclose(losses.attention_map(features)[0], [[0, 0.5], [0.25, 1]])
    np.testing.assert_allclose(losses.attention_map(features, norm="l2")[0] * np.sqrt(65), [[2, 4], [3, 6]], rtol=1e-6)
    np.testing.assert_allclose(losses.attention_map(features, power=2)[0] * 18, [[0, 14], [7, 18]], rtol=1e-6)


# agkd_bml 5: maps that are not constant reach from 0 to 1
@given(seeds, scales)
def test_each_map_reaches_from_zero_to_one(seed, scale):
    maps = losses.attention_map(scale * draw(seed)).numpy()
    np.testing.assert_array_equal(maps.min(axis=(1, 2)), np.zeros(3))
    np.testing.assert_allclose(maps.max(axis=(1, 2)), np.ones(3), atol=1e-5)


# agkd_bml 5: a constant map is 0 and has no gradient
@pytest.mark.parametrize("level", [0.0, 1.0, 250.0])
def test_constant_map_is_zero_without_a_gradient(level):
    features = tf.fill([2, 4, 4, 3], level)
    with tf.GradientTape() as tape:
        tape.watch(features)
        maps = losses.attention_map(features)
        loss = losses.attention_distance(maps, tf.constant(map_in_numpy(draw(0, batch=2)), tf.float32))
    np.testing.assert_array_equal(maps, np.zeros([2, 4, 4]))
    np.testing.assert_array_equal(tape.gradient(loss, features), np.zeros([2, 4, 4, 3]))


def test_one_constant_map_leaves_the_others_of_its_batch_alone():
    features = draw(1)
    features[1] = 0.5
    maps = losses.attention_map(features)
    np.testing.assert_allclose(maps.numpy()[[0, 2]], map_in_numpy(features[[0, 2]]), atol=1e-5)
    np.testing.assert_array_equal(maps[1], np.zeros([4, 4]))


# agkd_bml 6: neither scale nor order of channels nor what is added to all of them counts
@given(seeds, st.sampled_from([0.01, 0.5, 30.0]), st.floats(0, 5))
def test_maps_do_not_change_with_scale_order_of_channels_and_a_constant(seed, scale, constant):
    features = draw(seed)
    maps, order = losses.attention_map(features), np.random.default_rng(seed).permutation(5)
    for other in (scale * features, features[..., order], features + np.float32(constant)):
        np.testing.assert_allclose(losses.attention_map(other), maps, atol=2e-5)


@pytest.mark.parametrize("norm", losses.attention.NORMS)
def test_maps_are_resized_before_they_are_normalised(norm):
    features = draw(2, side=4)
    blocks = features.reshape(3, 2, 2, 2, 2, 5).mean(axis=(2, 4))  # what bilinear resizing to half the side gives
    found = losses.attention_map(features, norm=norm, size=(2, 2))
    np.testing.assert_allclose(found, map_in_numpy(blocks, norm=norm), atol=1e-5)
    np.testing.assert_array_equal(
        losses.attention_map(features, norm=norm, size=(4, 4)), losses.attention_map(features, norm=norm)
    )


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("norm", losses.attention.NORMS)
def test_gradients_of_features_that_are_zero_are_finite(power, norm):
    features = tf.constant(draw(3))
    with tf.GradientTape() as tape:
        tape.watch(features)
        maps = losses.attention_map(features, power=power, norm=norm)
        loss = losses.attention_distance(maps, tf.constant(map_in_numpy(draw(4)), tf.float32))
    assert np.isfinite(tape.gradient(loss, features)).all()


def test_features_in_float16_give_maps_in_float32():
    maps = losses.attention_map(tf.constant(draw(5), tf.float16))
    assert maps.dtype == tf.float32
    np.testing.assert_allclose(maps, map_in_numpy(draw(5)), atol=2e-3)


@given(seeds, st.sampled_from([1.0, 1.5, 2.0]))
def test_attention_distance_matches_numpy(seed, p):
    student, teacher = (map_in_numpy(draw(each)).astype(np.float32) for each in (seed, seed + 1))
    found = losses.attention_distance(tf.constant(student), tf.constant(teacher), p=p)
    np.testing.assert_allclose(found, np.mean(np.abs(student - teacher) ** p, axis=(1, 2)), atol=1e-5)


# agkd_bml 8: 0 of equal maps, at most 1 of each image, and so at most 2 of an image and the one drawn for it
@given(seeds, scales)
def test_attention_distance_is_zero_of_equal_maps_and_at_most_one(seed, scale):
    one, two = (losses.attention_map(scale * draw(each, side=2)) for each in (seed, seed + 1))
    np.testing.assert_array_equal(losses.attention_distance(one, one), np.zeros(3))
    distance = losses.attention_distance(one, two).numpy()
    assert (distance > 0).all() and (distance <= 1 + 1e-5).all()
    opposite = np.stack([np.ones([2, 2]), np.zeros([2, 2])]).astype(np.float32)
    np.testing.assert_array_equal(losses.attention_distance(opposite, 1 - opposite), [1, 1])


# agkd_bml 13, beside tests/defenses: the teacher is not drawn to the student
def test_no_gradient_flows_into_the_map_of_the_teacher():
    student, teacher = tf.constant(draw(6)), tf.constant(draw(7))
    with tf.GradientTape() as tape:
        tape.watch([student, teacher])
        loss = losses.attention_distance(losses.attention_map(student), losses.attention_map(teacher))
    to_student, to_teacher = tape.gradient(loss, [student, teacher])
    assert to_teacher is None and np.abs(to_student).max() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"power": 0.5}, r"attn_power must be at least 1, not 0\.5"),  # whose gradient is infinite where a feature is 0
        ({"power": float("nan")}, "attn_power must be at least 1, not nan"),
        ({"norm": "l1"}, "attn_norm must be one of minmax, l2, not 'l1'"),
        ({"p": 0.5}, r"attn_p must be at least 1, not 0\.5"),
        ({"p": float("inf")}, "attn_p must be at least 1, not inf"),
    ],
)
def test_check_attention_refuses(settings, message):
    losses.check_attention(1.0, "minmax", 1.0)
    with pytest.raises(UsageError, match=f"^{message}$"):
        losses.check_attention(**{"power": 1.0, "norm": "minmax", "p": 1.0, **settings})


@pytest.mark.parametrize("settings", [{"power": 0.5}, {"norm": "l1"}])
def test_attention_map_refuses_what_it_does_not_know(settings):
    with pytest.raises(UsageError, match="attn_"):
        losses.attention_map(draw(0), **settings)
