from __future__ import annotations

from typing import NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits


class Trained(NamedTuple):
    """A small convolutional classifier with BatchNormalization, fitted on digits, and unseen images."""

    model: keras.Model
    image: tf.Tensor
    label: tf.Tensor

    def logits_fn(self, image):
        return self.model(image, training=False)


@pytest.fixture(scope="session")
def trained():
    """Return the classifier and the held-out images that it gets right."""
    data = load_digits()
    image, label = (data.images[..., None] / 16).astype(np.float32), data.target.astype(np.int32)
    start = keras.initializers.GlorotUniform
    model = keras.Sequential(
        [
            keras.layers.Input([8, 8, 1]),
            keras.layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False, kernel_initializer=start(0)),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Flatten(),
            keras.layers.Dense(10, kernel_initializer=start(1)),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss=loss)
    model.fit(image[:1500], label[:1500], batch_size=100, epochs=4, shuffle=False, verbose=0)
    right = np.argmax(model(image[1500:], training=False), axis=1) == label[1500:]
    assert right.mean() > 0.85
    return Trained(model, tf.constant(image[1500:][right][:128]), tf.constant(label[1500:][right][:128]))
