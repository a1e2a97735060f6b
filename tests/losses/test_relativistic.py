"""Relativistic average losses against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from kerasdefense import losses
from kerasdefense.training import mirrored

seeds = st.integers(0, 2**32 - 1)


def draw(seed, batch=6):
    random = np.random.default_rng(seed)
    return random.normal(1, 2, batch).astype(np.float32), random.normal(-1, 1, batch).astype(np.float32)


def binary_cross_entropy(logits, target):
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    return -np.log(probability if target else 1 - probability)


@given(seeds)
def test_losses_match_numpy(seed):
    clean, denoised = draw(seed)
    real, fake = clean - denoised.mean(), denoised - clean.mean()
    for loss, of_real in ((losses.critic_loss, 1), (losses.adversarial_loss, 0)):
        expected = (binary_cross_entropy(real, of_real) + binary_cross_entropy(fake, 1 - of_real)) / 2
        found = loss(tf.constant(clean), tf.constant(denoised))
        assert found.shape == (6,) and found.dtype == tf.float32
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# CAFD 9: a critic that tells nothing
def test_losses_of_a_constant_critic_are_the_logarithm_of_two():
    for loss in (losses.critic_loss, losses.adversarial_loss):
        np.testing.assert_allclose(loss(tf.fill([4], 3.0), tf.fill([4], 3.0)), np.full(4, np.log(2)), rtol=1e-6)


# CAFD 9: swapping the images swaps the losses
@given(seeds)
def test_swapping_clean_and_denoised_swaps_the_losses(seed):
    clean, denoised = draw(seed)
    one, two = losses.critic_loss(clean, denoised), losses.adversarial_loss(denoised, clean)
    np.testing.assert_allclose(one, two, rtol=1e-5)
    assert np.abs(one - losses.adversarial_loss(clean, denoised)).max() > 1e-3


# CAFD 9: only differences of the critic's logits count
@given(seeds, st.sampled_from([-7.0, 0.5, 20.0]))
def test_a_constant_added_to_the_critic_changes_neither(seed, constant):
    clean, denoised = draw(seed)
    shift = np.float32(constant)
    for loss in (losses.critic_loss, losses.adversarial_loss):
        np.testing.assert_allclose(loss(clean + shift, denoised + shift), loss(clean, denoised), atol=1e-4)


def test_losses_of_far_logits_are_finite():
    far = tf.constant([200.0, 100.0])
    for loss in (losses.critic_loss, losses.adversarial_loss):
        assert np.isfinite(loss(far, -far)).all() and np.isfinite(loss(-far, far)).all()


# CAFD 9, over replicas: means and gradients of the global batch
@pytest.mark.parametrize("loss", [losses.critic_loss, losses.adversarial_loss])
def test_two_replicas_take_the_means_of_the_global_batch(loss):
    clean, denoised = draw(0)
    strategy = mirrored(("/device:CPU:0", "/device:CPU:1"))

    def gradients(clean, denoised):
        with tf.GradientTape() as tape:
            tape.watch([clean, denoised])
            values = loss(clean, denoised)
            total = tf.reduce_sum(values)
        return values, *tape.gradient(total, [clean, denoised])

    def part(each):
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(np.split(each, [2])[context.replica_id_in_sync_group])
        )

    expected = gradients(tf.constant(clean), tf.constant(denoised))
    found = tf.function(lambda *given: strategy.run(gradients, given))(part(clean), part(denoised))
    for each, one in zip(found, expected):
        together = np.concatenate(strategy.experimental_local_results(each))
        np.testing.assert_allclose(together, one, atol=1e-6)
    alone = loss(tf.constant(clean[:2]), tf.constant(denoised[:2]))
    assert np.abs(alone - expected[0][:2]).max() > 1e-2
