"""The floor of CAFD: what it passes through the models, and the gradients that it returns."""

from __future__ import annotations

import collections
import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from benchmarks.cafd_floor import cafd_floor
from benchmarks.case import Case
from kerasdefense import defenses

STATIC = Case("small_cnn", width=4, image_shape=(8, 8, 1), batch_size=8, defense="cafd", steps=0, denoiser_width=2)
DYNAMIC = dataclasses.replace(STATIC, dynamic=True, steps=2)


@pytest.mark.parametrize("case", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_floor_takes_each_pass_and_gradient_of_the_method_and_no_other(case, passes, eagerly):
    step = cafd_floor(case)
    passes.clear()
    eagerly(step)
    expected = {
        ("small_cnn", False): 2 + case.steps,
        ("denoiser", True): 1,
        ("denoiser", False): case.steps,
        ("critic", True): 4,
        "by the image": case.steps,
        "by the parameters": 2,
    }
    assert passes == collections.Counter({name: count for name, count in expected.items() if count})


def test_gradients_of_the_floor_are_those_that_the_method_descends_on(monkeypatch, still, eagerly):
    run = dataclasses.replace(STATIC.run, defense=dataclasses.replace(STATIC.run.defense, coupled_decay=0.0))
    monkeypatch.setattr(Case, "run", property(lambda case: run))  # a floor does not decay
    keras.utils.set_random_seed(3)
    defense = defenses.build(run, STATIC.make_backbone())
    defense.compile(optimizer=still)
    defense.train_step({name: tf.constant(each) for name, each in STATIC.batch().items()})
    keras.utils.set_random_seed(3)
    gradients = eagerly(cafd_floor(STATIC))
    assert len(gradients) == len(still.given)
    for gradient, given in zip(gradients, still.given):
        np.testing.assert_allclose(gradient, given, rtol=1e-3, atol=1e-5)
