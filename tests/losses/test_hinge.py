"""Hinge losses against NumPy, and the values of AToP's specification."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from kerasdefense import losses


def draw(seed):
    return np.random.default_rng(seed).normal(0, 2, [2, 5, 3]).astype(np.float32)


@given(st.integers(0, 2**32 - 1))
def test_losses_match_numpy(seed):
    real, fake = draw(seed)
    of_critic = losses.hinge_critic_loss(tf.constant(real), tf.constant(fake))
    assert of_critic.shape == (5,) and of_critic.dtype == tf.float32
    expected = (np.maximum(1 - real, 0).mean(axis=1) + np.maximum(1 + fake, 0).mean(axis=1)) / 2
    np.testing.assert_allclose(of_critic, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(losses.hinge_adversarial_loss(fake), -fake.mean(axis=1), rtol=1e-5, atol=1e-6)


# AToP P4: judgements of 2 and -2 cost nothing, of 0 one
@pytest.mark.parametrize(
    ("real", "fake", "of_critic", "adversarial"), [(2, -2, 0, 2), (0, 0, 1, 0), (1, -1, 0, 1), (-2, 2, 3, -2)]
)
def test_losses_have_the_values_of_the_specification(real, fake, of_critic, adversarial):
    real, fake = tf.fill([3, 4], float(real)), tf.fill([3, 4], float(fake))
    np.testing.assert_array_equal(losses.hinge_critic_loss(real, fake), np.full(3, of_critic, np.float32))
    np.testing.assert_array_equal(losses.hinge_adversarial_loss(fake), np.full(3, adversarial, np.float32))


def test_halves_are_taken_as_float32():
    judged = tf.constant([[0.1, 0.3]], tf.bfloat16)
    for loss in (losses.hinge_critic_loss(judged, judged), losses.hinge_adversarial_loss(judged)):
        assert loss.dtype == tf.float32


# AToP S4: every place of a restored image is pulled, however well the critic tells it
def test_adversarial_loss_pulls_at_every_place():
    judged = tf.constant([[-9.0, 0.0, 9.0, 1.0]])
    with tf.GradientTape() as tape:
        tape.watch(judged)
        loss = losses.hinge_adversarial_loss(judged)
    np.testing.assert_array_equal(tape.gradient(loss, judged), np.full([1, 4], -0.25))
