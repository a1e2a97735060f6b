"""Quarter turns, one number of turns per image."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from kerasdefense.layers import rotate
from kerasdefense.types import UsageError

IMAGE = np.random.default_rng(0).uniform(size=(8, 5, 5, 2)).astype("float32")
TURNS = np.array([0, 1, 2, 3, 3, 2, 1, 0], np.int32)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_rotate_turns_each_image_by_its_own_number(jit_compile):
    turned = tf.function(rotate, jit_compile=jit_compile)(IMAGE, TURNS)
    for one, image, turns in zip(turned, IMAGE, TURNS):
        np.testing.assert_array_equal(one, np.rot90(image, turns))
        np.testing.assert_array_equal(one, tf.image.rot90(image, turns))


def test_rotate_is_counter_clockwise():
    image = np.array([[1.0, 2], [3, 4]])[None, :, :, None]
    np.testing.assert_array_equal(rotate(tf.constant(image), tf.constant([1]))[0, :, :, 0], [[2, 4], [1, 3]])


# osdn_caml 11: k turns, then 4 - k, are none; one view per image
@pytest.mark.parametrize("back", [4 - TURNS, -TURNS])
def test_rotate_there_and_back_is_the_identity(back):
    turned = rotate(tf.constant(IMAGE), TURNS)
    assert turned.shape == IMAGE.shape
    np.testing.assert_array_equal(rotate(turned, back), IMAGE)


def test_rotate_passes_gradients_back_to_their_pixels():
    image = tf.constant(IMAGE)
    weights = np.random.default_rng(1).normal(size=IMAGE.shape).astype("float32")
    with tf.GradientTape() as tape:
        tape.watch(image)
        value = tf.reduce_sum(weights * rotate(image, TURNS))
    np.testing.assert_array_equal(tape.gradient(value, image), rotate(tf.constant(weights), -TURNS))


@pytest.mark.parametrize("shape", [(2, 4, 5, 3), (4, 4, 3)])
def test_rotate_refuses_images_that_are_not_square(shape):
    with pytest.raises(UsageError, match=r"^rotate takes square images \(batch, side, side, channels\), not "):
        rotate(tf.zeros(shape), tf.zeros(shape[:1], tf.int32))


def test_rotate_refuses_images_of_unknown_size():
    traced = tf.function(rotate, autograph=False)
    with pytest.raises(UsageError, match=r"not \(2, None, None, 3\)"):
        traced.get_concrete_function(tf.TensorSpec([2, None, None, 3]), tf.TensorSpec([2], tf.int32))
