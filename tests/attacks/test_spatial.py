from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest
import scipy.ndimage
import tensorflow as tf

from kerasdefense import losses
from kerasdefense.attacks import ATTACKS, Attack, StAdv
from kerasdefense.attacks.spatial import total_variation, warp
from kerasdefense.types import UsageError

BOUND = 0.6


@pytest.fixture(scope="module")
def searched(trained):
    """Return the first images, their labels and what a quick search finds on them."""
    image, label = trained.image[:24], trained.label[:24]
    return image, label, StAdv(flow_bound=BOUND, steps=12, step_size=0.15).search(trained.logits_fn, image, label)


def test_flow_stays_in_its_bound_and_makes_the_image(searched):
    image, _, state = searched
    assert np.abs(state.best_flow).max() <= np.float32(BOUND) and np.abs(state.flow).max() <= np.float32(BOUND)
    np.testing.assert_allclose(warp(image, state.best_flow), state.best.image, atol=1e-6)
    assert np.min(state.best.image) >= 0 and np.max(state.best.image) <= 1
    assert state.best.image.shape == image.shape and state.best.image.dtype == tf.float32


def test_search_fools_more_than_random_flow(searched, trained):
    image, label, state = searched
    flow = tf.random.stateless_uniform([24, 8, 8, 2], [0, 0], -BOUND, BOUND)
    by_chance = losses.margin(trained.logits_fn(warp(image, flow)), label).numpy() > 0
    assert state.best.success.numpy().mean() > by_chance.mean() + 0.3


def test_result_reports_what_its_image_does(searched, trained):
    _, label, state = searched
    margin = losses.margin(trained.logits_fn(state.best.image), label).numpy()
    np.testing.assert_allclose(state.best.loss, margin, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(state.best.success, margin > 0)
    np.testing.assert_allclose(state.roughness, total_variation(state.best_flow), rtol=1e-5)
    np.testing.assert_array_equal(state.best.queries, [13] * 24)


def test_bound_of_zero_gives_back_the_image(trained):
    image, label = trained.image[:4], trained.label[:4]
    result = StAdv(flow_bound=0.0, steps=3)(trained.logits_fn, image, label, tf.zeros([4, 2], tf.int32))
    np.testing.assert_array_equal(result.image, image)
    assert not result.success.numpy().any()


def test_call_returns_the_best_of_the_search_and_does_not_depend_on_the_batch(searched, trained):
    image, label, state = searched
    attack = StAdv(flow_bound=BOUND, steps=12, step_size=0.15)
    result = attack(trained.logits_fn, image[5:7], label[5:7], tf.zeros([2, 2], tf.int32))
    np.testing.assert_allclose(result.image, state.best.image[5:7], rtol=0, atol=1e-3)


def test_penalty_makes_the_flow_smoother(searched, trained):
    image, label, state = searched
    plain = StAdv(flow_bound=BOUND, steps=12, step_size=0.15, tau=0.0).search(trained.logits_fn, image, label)
    both = state.best.success & plain.best.success
    assert both.numpy().any()
    assert np.mean(state.roughness[both]) < 0.8 * np.mean(plain.roughness[both])


def test_warp_equals_scipys_interpolation():
    random = np.random.default_rng(0)
    image = random.uniform(size=[3, 6, 5, 2]).astype(np.float32)
    flow = random.uniform(-3, 3, size=[3, 6, 5, 2]).astype(np.float32)
    flow[0] = np.rint(flow[0])
    found = warp(tf.constant(image), tf.constant(flow))
    for example, channel in np.ndindex(3, 2):
        place = np.indices([6, 5]) + np.moveaxis(flow[example], -1, 0)
        place = np.stack([np.clip(place[0], 0, 5), np.clip(place[1], 0, 4)])
        expected = scipy.ndimage.map_coordinates(image[example, :, :, channel], place, order=1)
        np.testing.assert_allclose(found[example, :, :, channel], expected, rtol=0, atol=1e-5)


def test_warp_has_the_gradient_of_finite_differences():
    image = tf.random.stateless_uniform([1, 4, 4, 1], [0, 1])
    flow = tf.random.stateless_uniform([1, 4, 4, 2], [0, 2], 0.2, 0.8)
    weights = tf.random.stateless_normal([1, 4, 4, 1], [0, 3])

    def total(each):
        return tf.reduce_sum(weights * warp(image, each))

    with tf.GradientTape() as tape:
        tape.watch(flow)
        value = total(flow)
    gradient = tape.gradient(value, flow).numpy()
    for place in [(0, 0, 0, 0), (0, 1, 2, 0), (0, 2, 1, 1), (0, 3, 2, 0), (0, 2, 3, 1)]:
        change = np.zeros(flow.shape, np.float32)
        change[place] = 0.05  # the value is linear in one coordinate within a cell
        difference = (total(flow + change) - total(flow - change)) / 0.1
        np.testing.assert_allclose(gradient[place], difference, rtol=0, atol=1e-4)


def test_total_variation_by_hand():
    flow = np.zeros([2, 2, 3, 2], np.float32)
    flow[1, 0, 0] = [3, 4]
    np.testing.assert_allclose(total_variation(tf.constant(flow)), [0, 10], atol=1e-3)


def test_stadv_has_a_threat_model_of_its_own_and_can_be_stored():
    attack = StAdv(flow_bound=0.5)
    assert not isinstance(attack, Attack) and StAdv not in ATTACKS.values()
    assert not {"norm", "epsilon"} & set(attack.get_config())
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(attack))
    assert restored == attack and hash(restored) == hash(attack)
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.flow_bound = 2.0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"flow_bound": -1.0}, "flow_bound must be a finite number of at least 0, not -1.0"),
        ({"flow_bound": float("nan")}, "flow_bound must be a finite number of at least 0"),
        ({"tau": -1.0}, "tau must be a finite number of at least 0"),
        ({"confidence": float("inf")}, "confidence must be a finite number of at least 0"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"step_size": 0.0}, "step_size must be a finite number above 0, not 0.0"),
    ],
)
def test_stadv_refuses_illegal_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        StAdv(**settings)
