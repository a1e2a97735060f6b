"""The floor of OSDN-CAML: what it passes through which model, and the gradients that it returns."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from benchmarks.case import Case
from benchmarks.osdn_floor import osdn_floor
from kerasdefense import defenses
from kerasdefense.defenses import OSDNCAML
from kerasdefense.defenses.batch import Batch
from kerasdefense.layers import rotate


def make_case(**settings):
    return Case("small_cnn", width=2, image_shape=(8, 8, 1), batch_size=8, defense="osdn_caml", **settings)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("w_kl", [-1.0, 0.0])
def test_floor_takes_each_pass_and_gradient_of_the_method_and_no_other(passes, eagerly, steps, w_kl):
    step = osdn_floor(make_case(steps=steps, w_kl=w_kl))
    passes.clear()
    eagerly(step)
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


@pytest.mark.parametrize("w_kl", [-1.0, 0.0])
def test_gradients_of_the_floor_are_those_that_the_method_descends_on(monkeypatch, still, w_kl):
    case = make_case(steps=1, w_kl=w_kl)
    monkeypatch.setattr(
        OSDNCAML,
        "turned",
        lambda self, batch, seed, step: Batch(rotate(batch.image, batch.index), batch.index % 4, batch.index),
    )
    monkeypatch.setattr(OSDNCAML, "craft", lambda self, batch, attack, **kwargs: 1 - batch.image)
    keras.utils.set_random_seed(3)
    defense = defenses.build(case.run, case.make_backbone())
    defense.compile(optimizer=still)
    defense.train_step(case.batch())
    keras.utils.set_random_seed(3)
    gradients = osdn_floor(case)()
    assert len(gradients) == len(still.given)
    for gradient, given in zip(gradients, still.given):
        np.testing.assert_allclose(gradient, given, rtol=1e-3, atol=1e-5)
