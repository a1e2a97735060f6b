"""The floor of OSDN-CAML: what it passes through which model, and the gradients that it returns."""

from __future__ import annotations

import collections
from typing import ClassVar

import keras
import numpy as np
import pytest
import tensorflow as tf

from benchmarks.case import Case
from benchmarks.osdn_floor import osdn_floor
from kerasdefense import defenses
from kerasdefense.defenses import OSDNCAML
from kerasdefense.defenses.batch import Batch
from kerasdefense.layers import rotate


def make_case(**settings):
    return Case("small_cnn", width=2, image_shape=(8, 8, 1), batch_size=8, defense="osdn_caml", **settings)


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


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("w_kl", [-1.0, 0.0])
def test_floor_takes_each_pass_and_gradient_of_the_method_and_no_other(passes, steps, w_kl):
    step = osdn_floor(make_case(steps=steps, w_kl=w_kl))
    passes.clear()
    tf.config.run_functions_eagerly(True)
    try:
        step()
    finally:
        tf.config.run_functions_eagerly(False)
    expected = {
        ("small_cnn", False): 2 * steps,
        ("small_cnn", True): 2,
        ("rotation_head", None): steps + 1,
        ("decoder", True): 1,
        "by the image": 2 * steps,
        "by the parameters": 1,
    }
    if w_kl:
        expected |= {("small_cnn", False): 2 * steps + 1, ("peer", True): 1, "by the parameters": 2}
    assert passes == expected


class Still(keras.optimizers.SGD):
    """Keeps the gradients that it is given, and moves nothing."""

    given: ClassVar[list] = []

    def apply_gradients(self, pairs):
        self.given.extend(gradient.numpy() for gradient, _ in pairs)


@pytest.mark.parametrize("w_kl", [-1.0, 0.0])
def test_gradients_of_the_floor_are_those_that_the_method_descends_on(monkeypatch, w_kl):
    case = make_case(steps=1, w_kl=w_kl)
    monkeypatch.setattr(Still, "given", [])
    monkeypatch.setattr(
        OSDNCAML,
        "turned",
        lambda self, batch, seed, step: Batch(rotate(batch.image, batch.index), batch.index % 4, batch.index),
    )
    monkeypatch.setattr(OSDNCAML, "craft", lambda self, batch, attack, **kwargs: 1 - batch.image)
    keras.utils.set_random_seed(3)
    defense = defenses.build(case.run, case.make_backbone())
    defense.compile(optimizer=Still())
    defense.train_step(case.batch())
    keras.utils.set_random_seed(3)
    gradients = osdn_floor(case)()
    assert len(gradients) == len(Still.given)
    for gradient, given in zip(gradients, Still.given):
        np.testing.assert_allclose(gradient, given, rtol=1e-3, atol=1e-5)
