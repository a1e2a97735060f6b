"""A small classifier of six digits that tells its embedding, and images of known and of unknown digits."""

from __future__ import annotations

from typing import NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits

from kerasdefense.detectors import DETECTORS
from kerasdefense.evaluation import Loaded, as_paths
from kerasdefense.evaluation.search import Chunk

KNOWN = 6


class OpenSetDigits(NamedTuple):
    """A model, and images [n, 8, 8, 1] of the digits 0 to 5 (known) and 6 to 9 (unknown)."""

    loaded: Loaded
    train: Chunk
    validation: Chunk
    known: Chunk
    unknown: Chunk

    def fitted(self, name):
        activations = {key: each.numpy() for key, each in self.loaded.activations(self.train.image).items()}
        return DETECTORS[name]().fit(activations, self.train.label, self.loaded.head)


def batches(chunk, size=32):
    elements = {"image": chunk.image, "label": chunk.label, "index": chunk.index}
    return tf.data.Dataset.from_tensor_slices(elements).batch(size)


@pytest.fixture(scope="session")
def open_digits():
    data = load_digits()
    image, label = (data.images[..., None] / 16).astype(np.float32), data.target.astype(np.int32)
    start = keras.initializers.HeNormal
    inputs = keras.Input([8, 8, 1])
    feature_map = keras.layers.Conv2D(16, 3, activation="relu", kernel_initializer=start(0))(inputs)
    feature_map = keras.layers.Conv2D(24, 3, strides=2, activation="relu", kernel_initializer=start(1))(feature_map)
    embedding = keras.layers.GlobalAveragePooling2D()(feature_map)
    logits = keras.layers.Dense(KNOWN, kernel_initializer=start(2))(embedding)
    model = keras.Model(inputs, logits)
    model.compile(keras.optimizers.Adam(0.02), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    place = np.arange(len(label), dtype=np.int32)

    def chunk(rows):
        return Chunk(image[rows], np.where(label[rows] < KNOWN, label[rows], -1).astype(np.int32), place[rows])

    is_known = label < KNOWN
    train = chunk(np.flatnonzero(is_known & (place < 900)))
    model.fit(train.image, train.label, batch_size=60, epochs=12, shuffle=False, verbose=0)
    parts = (np.flatnonzero(rows) for rows in (is_known & (place >= 900) & (place < 1300), is_known & (place >= 1300)))
    return OpenSetDigits(as_paths(model), train, *map(chunk, parts), chunk(np.flatnonzero(~is_known & (place >= 1300))))


@pytest.fixture(scope="session")
def as_dataset():
    return batches
