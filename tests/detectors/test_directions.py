from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from kerasdefense.detectors import directions


def test_length_and_direction_by_hand():
    vectors = tf.constant([[3.0, -4], [0, 0], [0, 1e-3]])
    np.testing.assert_allclose(directions.length(vectors), [5, 0, 1e-3])
    np.testing.assert_allclose(directions.direction(vectors, 5.0), [[0.3, -0.4], [0, 0], [0, 1e-3 / 5.001]])


@pytest.mark.parametrize("function", [directions.length, directions.direction])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-21, 1e-10, 1e10])
def test_gradient_is_finite_at_vectors_of_any_length(function, size):
    vectors = tf.constant([[size, -size, 0.0]])
    with tf.GradientTape() as tape:
        tape.watch(vectors)
        value = function(vectors)
    assert np.isfinite(tape.gradient(value, vectors)).all()


def test_gradient_of_length_is_the_direction_and_zero_at_zero():
    vectors = tf.constant([[3.0, -4], [0, 0]])
    with tf.GradientTape() as tape:
        tape.watch(vectors)
        value = directions.length(vectors)
    np.testing.assert_allclose(tape.gradient(value, vectors), [[0.6, -0.8], [0, 0]], rtol=1e-6)
