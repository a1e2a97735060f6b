"""The logits of a dense layer that ends in a softmax."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense.layers import Logits


@pytest.fixture
def embedding():
    return np.random.default_rng(0).normal(size=(3, 4)).astype("float32")


@pytest.mark.parametrize("use_bias", [True, False])
def test_logits_are_the_values_before_the_softmax(embedding, use_bias):
    dense = keras.layers.Dense(5, activation="softmax", use_bias=use_bias, bias_initializer="ones")
    probabilities = dense(embedding)
    layer = Logits(dense)
    expected = embedding @ dense.kernel.numpy() + float(use_bias)
    np.testing.assert_allclose(layer(embedding), expected, atol=1e-6)
    np.testing.assert_allclose(tf.nn.softmax(layer(embedding)), probabilities, atol=1e-6)
    assert layer.kernel is dense.kernel
    assert layer.bias is dense.bias


def test_logits_leave_the_dense_layer_as_it_is(embedding):
    dense = keras.layers.Dense(5, activation="softmax")
    Logits(dense)(embedding)
    np.testing.assert_allclose(tf.reduce_sum(dense(embedding), axis=1), 1.0, atol=1e-6)


def test_logits_keep_trainability_and_regularisation(embedding):
    dense = keras.layers.Dense(5, activation="softmax", kernel_regularizer=keras.regularizers.L2(0.5))
    layer = Logits(dense)
    layer(embedding)
    np.testing.assert_allclose(tf.add_n(layer.losses), 0.5 * np.sum(dense.kernel.numpy() ** 2), rtol=1e-5)
    assert len(layer.trainable_variables) == 2
    dense.trainable = False
    assert layer.trainable_variables == []


def test_logits_come_back_from_their_config(embedding):
    layer = Logits(keras.layers.Dense(5, activation="softmax", use_bias=False, name="top"), name="logits")
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert again(embedding).shape == (3, 5)
    assert again.name == "logits"
    assert again.dense.get_config() == layer.dense.get_config()
