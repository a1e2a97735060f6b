"""The floor of AToP: what it passes through the models, and the gradients that it returns."""

from __future__ import annotations

import collections
import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from benchmarks.atop_floor import atop_floor
from benchmarks.case import Case
from kerasdefense import defenses
from kerasdefense.defenses import AToP

CASE = Case("small_cnn", width=4, image_shape=(8, 8, 1), batch_size=8, defense="atop", steps=2, denoiser_width=2)


@pytest.mark.parametrize("steps", [1, 2])
def test_floor_takes_each_pass_and_gradient_of_the_method_and_no_other(steps, passes, eagerly):
    step = atop_floor(dataclasses.replace(CASE, steps=steps))
    passes.clear()
    eagerly(step)
    expected = {
        ("small_cnn", False): 1 + steps,
        ("gated_unet", True): 1,
        ("gated_unet", False): steps,
        ("patch_critic", True): 2,
        ("patch_critic", False): 1,
        "by the image": steps,
        "by the parameters": 2,
    }
    assert passes == collections.Counter(expected)


# The method's step, but for its attack, whose result the floor does not use
def test_gradients_of_the_floor_are_those_that_the_method_descends_on(monkeypatch, still, eagerly):
    ones = tf.ones([CASE.batch_size, 2], tf.int32)
    monkeypatch.setattr(AToP, "craft", lambda self, batch, attack: 1 - batch.image)
    monkeypatch.setattr(AToP, "_draw", lambda self, batch, which: ones)
    keras.utils.set_random_seed(3)
    defense = defenses.build(CASE.run, CASE.make_backbone())
    defense.compile(optimizer=still)
    defense.train_step({name: tf.constant(each) for name, each in CASE.batch().items()})
    keras.utils.set_random_seed(3)
    gradients = eagerly(atop_floor(CASE))
    assert len(gradients) == len(still.given)
    for gradient, given in zip(gradients, still.given):
        np.testing.assert_allclose(gradient, given, rtol=1e-3, atol=1e-5)
