"""The floor of AGKD-BML: what it passes through the models, and the gradients that it returns."""

from __future__ import annotations

import collections

import keras
import numpy as np
import tensorflow as tf

from benchmarks.agkd_floor import agkd_floor
from benchmarks.case import Case
from kerasdefense import defenses
from kerasdefense.defenses import AGKDBML
from kerasdefense.defenses.batch import Batch

CASE = Case("small_cnn", width=4, image_shape=(8, 8, 1), batch_size=8, defense="agkd_bml", steps=2)


def test_floor_takes_each_pass_and_gradient_of_the_method_and_no_other(passes, eagerly):
    step = agkd_floor(CASE)
    passes.clear()
    eagerly(step)
    expected = {("small_cnn", True): 1, ("small_cnn", False): 2 + 1, "by the image": 2, "by the parameters": 1}
    assert passes == collections.Counter(expected)


def test_gradients_of_the_floor_are_those_that_the_method_descends_on(monkeypatch, still, eagerly):
    def drawn(self, batch):
        return Batch(batch.image[::-1], batch.label[::-1], batch.index)

    monkeypatch.setattr(AGKDBML, "draw", drawn)
    monkeypatch.setattr(AGKDBML, "craft", lambda self, batch, attack, **_: 1 - batch.image)
    keras.utils.set_random_seed(3)
    defense = defenses.build(CASE.run, CASE.make_backbone())
    defense.compile(optimizer=still)
    defense.train_step({name: tf.constant(each) for name, each in CASE.batch().items()})
    keras.utils.set_random_seed(3)
    gradients = eagerly(agkd_floor(CASE))
    assert len(gradients) == len(still.given)
    for gradient, given in zip(gradients, still.given):
        np.testing.assert_allclose(gradient, given, rtol=1e-3, atol=1e-5)
