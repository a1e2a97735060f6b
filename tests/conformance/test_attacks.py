"""What holds for every attack of the registry. An attack is described once, in CASES; all tests run over the table."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import losses
from kerasdefense.attacks import ATTACKS, OBJECTIVES, misclassified, seeds
from kerasdefense.types import UsageError


@dataclasses.dataclass(frozen=True)
class Case:
    """How to try an attack: the norms it knows, and settings that make it quick."""

    norms: tuple[str, ...] = ("linf", "l2")
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES = {
    "cleverhans_cw_l2": Case(("l2",), {"steps": 20}),
    "cleverhans_fgm": Case(),
    "cleverhans_mim": Case(settings={"steps": 3}),
    "cleverhans_pgd": Case(settings={"steps": 3}),
    "cleverhans_spsa": Case(("linf",), {"steps": 24}),
    "fgsm": Case(),
    "fgsm_rs": Case(),
    "pgd": Case(settings={"steps": 3, "restarts": 2}),
}
EPSILON = {"linf": 0.1, "l2": 1.0}
EVERY_NORM = pytest.mark.parametrize("name, norm", [(name, norm) for name in CASES for norm in CASES[name].norms])
BATCH, CLASSES = 3, 3

_random = np.random.default_rng(0)
IMAGE = np.clip(_random.uniform(-0.3, 1.3, size=[BATCH, 8, 8, 1]), 0, 1).astype(np.float32)
WEIGHTS = _random.normal(scale=0.2, size=[64, CLASSES]).astype(np.float32)
SEED = seeds.per_example(0, 0, tf.range(BATCH))


def logits_fn(image):
    return tf.reshape(image, [-1, 64]) @ WEIGHTS


LABEL = np.argmax(logits_fn(IMAGE), axis=1).astype(np.int32)


def make(name, norm, **settings):
    return ATTACKS[name](**{"norm": norm, "epsilon": EPSILON[norm], **CASES[name].settings, **settings})


def call(attack, image=IMAGE, label=LABEL, seed=SEED):
    if attack.takes == "logits":
        return attack(logits_fn, image, label, seed)
    context = {"label": label}
    return attack(OBJECTIVES["cross_entropy"](logits_fn), image, context, seed, misclassified(logits_fn))


@functools.cache
def found(name, norm):
    """Return what an attack finds on arrays, for the tests that look at different sides of it."""
    image = IMAGE.copy()
    result = call(make(name, norm), image, LABEL, SEED.numpy())
    np.testing.assert_array_equal(image, IMAGE)
    return result


def test_table_describes_every_attack_of_the_registry():
    assert set(CASES) == set(ATTACKS)
    assert {norm for case in CASES.values() for norm in case.norms} == set(EPSILON)


@EVERY_NORM
def test_attack_stays_in_ball_and_box(name, norm):
    image_adv = found(name, norm).image
    assert image_adv.shape == IMAGE.shape and image_adv.dtype == tf.float32
    assert np.isfinite(image_adv).all() and np.min(image_adv) >= 0 and np.max(image_adv) <= 1
    delta = np.reshape(np.float64(image_adv) - np.float64(IMAGE), [BATCH, -1])
    length = np.abs(delta).max(axis=1) if norm == "linf" else np.linalg.norm(delta, axis=1)
    assert (length <= EPSILON[norm] * (1 + 1e-5) + 1e-7).all()


@EVERY_NORM
def test_attack_reports_what_its_image_does(name, norm):
    result = found(name, norm)
    logits = logits_fn(result.image)
    np.testing.assert_allclose(result.loss, losses.cross_entropy(logits, LABEL), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(result.success, np.argmax(logits, axis=1) != LABEL)
    assert result.success.dtype == tf.bool and result.loss.dtype == tf.float32
    assert result.queries.dtype == tf.int32 and result.queries.shape == [BATCH]
    assert (result.queries.numpy() >= 1).all()


@EVERY_NORM
def test_attack_raises_the_loss(name, norm):
    clean = np.mean(losses.cross_entropy(logits_fn(IMAGE), LABEL))
    assert np.mean(found(name, norm).loss) > clean + 0.05


@EVERY_NORM
def test_attack_of_radius_zero_gives_back_the_image(name, norm):
    np.testing.assert_array_equal(call(make(name, norm, epsilon=0.0)).image, IMAGE)


@EVERY_NORM
def test_attack_repeats_itself_on_tensors_from_equal_seeds_and_keeps_its_input(name, norm):
    tf.random.uniform([5])
    image, label = tf.constant(IMAGE), tf.constant(LABEL)
    again = call(make(name, norm), image, label, SEED)
    np.testing.assert_array_equal(again.image, found(name, norm).image)
    np.testing.assert_array_equal(image, IMAGE)


@EVERY_NORM
def test_attack_takes_one_image(name, norm):
    result = call(make(name, norm), IMAGE[:1], LABEL[:1], SEED[:1])
    assert [each.shape[0] for each in result] == [1, 1, 1, 1]


@EVERY_NORM
def test_attack_survives_keras_serialisation(name, norm):
    attack = make(name, norm)
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(attack))
    assert type(restored) is type(attack) and restored == attack
    assert keras.saving.get_registered_name(type(attack)) == f"kerasdefense>{type(attack).__name__}"


@pytest.mark.parametrize("name", CASES)
def test_attack_has_defaults_and_is_frozen_and_hashable(name):
    attack = ATTACKS[name]()
    assert hash(attack) == hash(ATTACKS[name]())
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.epsilon = 1.0


@EVERY_NORM
def test_attack_refuses_an_illegal_threat_model(name, norm):
    with pytest.raises(UsageError, match="epsilon must be a finite number of at least 0, not -1"):
        make(name, norm, epsilon=-1)
    with pytest.raises(UsageError, match="unknown norm 'l3'; valid: linf, l2"):
        ATTACKS[name](norm="l3")
