"""The floor of DFA: what it passes through the model, and the gradients that it returns."""

from __future__ import annotations

import collections

import keras
import numpy as np
import pytest

from benchmarks.case import Case
from benchmarks.dfa_floor import dfa_floor
from kerasdefense import defenses
from kerasdefense.defenses import DFA


def make_case(**settings):
    shape = (8, 8, 1)
    return Case("small_cnn", width=4, image_shape=shape, batch_size=8, head="orthogonal", **settings)


SETTINGS = {
    "shared": {"defense": "dfa", "steps": 0},
    "three passes": {"defense": "dfa", "steps": 0, "share_forward": False},
    "adversarial": {"defense": "dfa_at", "steps": 1},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


@every_setting
def test_floor_takes_each_pass_and_gradient_of_the_method_and_no_other(passes, eagerly, settings):
    step = dfa_floor(make_case(**settings))
    passes.clear()
    eagerly(step)
    steps = settings["steps"]
    expected = {
        ("small_cnn", True): 2 if settings.get("share_forward", True) else 3,
        ("small_cnn", False): steps,
        "by the image": steps,
        "by the parameters": 1,
    }
    assert passes == collections.Counter(expected)


@every_setting
def test_gradients_of_the_floor_are_those_that_the_method_descends_on(monkeypatch, still, eagerly, settings):
    case = make_case(**settings)
    monkeypatch.setattr(DFA, "craft", lambda self, batch, attack: 1 - batch.image)
    keras.utils.set_random_seed(3)
    defense = defenses.build(case.run, case.make_backbone())
    defense.compile(optimizer=still)
    defense.train_step(case.batch())
    keras.utils.set_random_seed(3)
    gradients = eagerly(dfa_floor(case))
    assert len(gradients) == len(still.given)
    for gradient, given in zip(gradients, still.given):
        np.testing.assert_allclose(gradient, given, rtol=1e-3, atol=1e-5)
