"""The reconstruction error of a decoder."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from kerasdefense.losses import reconstruction_error

RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.uniform(size=(3, 8, 8, 2)).astype("float32")


def test_reconstruction_error_matches_numpy_one_value_per_example():
    drawn = RANDOM.uniform(-1, 1, size=IMAGE.shape).astype("float32")
    expected = [np.mean((one - (2 * other - 1)) ** 2) for one, other in zip(drawn, IMAGE)]
    np.testing.assert_allclose(reconstruction_error(drawn, IMAGE), expected, rtol=1e-5)


# osdn_caml 9: a decoder that draws the target has no error, black for white has the largest
def test_reconstruction_error_is_zero_at_the_target_and_at_most_four():
    np.testing.assert_array_equal(reconstruction_error(2 * IMAGE - 1, IMAGE), np.zeros(3))
    np.testing.assert_array_equal(reconstruction_error(-np.ones_like(IMAGE), np.ones_like(IMAGE)), 4 * np.ones(3))


# osdn_caml 9: another adversarial image changes what the decoder draws, not the target
def test_reconstruction_error_gradient_pulls_towards_the_clean_image():
    drawn = tf.zeros(IMAGE.shape)
    with tf.GradientTape() as tape:
        tape.watch(drawn)
        error = reconstruction_error(drawn, IMAGE)
    np.testing.assert_allclose(tape.gradient(error, drawn), -2 * (2 * IMAGE - 1) / (8 * 8 * 2), rtol=1e-5, atol=1e-8)
