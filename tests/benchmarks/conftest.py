"""What a floor is held to: the passes and gradients that are counted, and those that a defense descends on."""

from __future__ import annotations

import collections
from typing import ClassVar

import keras
import pytest
import tensorflow as tf


@pytest.fixture
def passes(monkeypatch):
    """Count passes by model and mode, and gradients by what they are taken by."""
    count, call, gradient = collections.Counter(), keras.Model.__call__, tf.GradientTape.gradient

    def counted_call(self, *args, **kwargs):
        count[self.name, kwargs.get("training")] += 1
        return call(self, *args, **kwargs)

    def counted_gradient(self, target, sources, **kwargs):
        count["by the image" if tf.is_tensor(sources) else "by the parameters"] += 1
        return gradient(self, target, sources, **kwargs)

    monkeypatch.setattr(keras.Model, "__call__", counted_call)
    monkeypatch.setattr(tf.GradientTape, "gradient", counted_gradient)
    return count


@pytest.fixture
def eagerly():
    """Return a function that calls another while nothing is compiled."""

    def eagerly(function):
        tf.config.run_functions_eagerly(True)
        try:
            return function()
        finally:
            tf.config.run_functions_eagerly(False)

    return eagerly


class Still(keras.optimizers.SGD):
    """Keeps the gradients that it is given, and moves nothing."""

    given: ClassVar[list] = []

    def apply_gradients(self, pairs):
        self.given.extend(gradient.numpy() for gradient, _ in pairs)


@pytest.fixture
def still(monkeypatch):
    """Return an optimizer whose `given` also holds what copies of it are given."""
    monkeypatch.setattr(Still, "given", [])
    return Still()
