"""Mask tokens and positions."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from kerasdefense.layers import MaskToken, Positions

FEATURES = np.random.default_rng(0).normal(size=(2, 2, 2, 3)).astype(np.float32)


def test_token_takes_the_place_of_what_is_missing():
    layer, share = MaskToken(), np.reshape([0, 1, 0.25, 0, 1, 1, 0, 0.5], [2, 2, 2, 1]).astype(np.float32)
    found = layer([tf.constant(FEATURES), tf.constant(share)])
    np.testing.assert_allclose(found, (1 - share) * FEATURES + share * layer.token.numpy(), atol=1e-6)
    np.testing.assert_array_equal(found[0, 0, 1], layer.token)
    np.testing.assert_array_equal(found[0, 0, 0], FEATURES[0, 0, 0])
    assert len(layer.trainable_variables) == 1


def test_each_place_has_a_vector_of_its_own():
    layer, tokens = Positions(), FEATURES.reshape(2, 4, 3)
    added = layer(tf.constant(tokens)) - tokens
    np.testing.assert_allclose(added, np.stack(2 * [layer.position.numpy()]), atol=1e-6)
    assert layer.position.shape == (4, 3) and len(np.unique(layer.position)) == 12
