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
from kerasdefense.attacks import ATTACKS, OBJECTIVES, Iterative, misclassified, norms, seeds
from kerasdefense.types import UsageError


@dataclasses.dataclass(frozen=True)
class Case:
    """How to try an attack: the norms it knows, settings that make it quick, and what it reports as its loss.

    That is an objective, or "distance" where the attack looks for the nearest image that fools, which it reports minus
    the distance of; where that is outside the ball, the image itself is given back.
    """

    norms: tuple[str, ...] = ("linf", "l2")
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    objective: str = "cross_entropy"


CASES = {
    "apgd": Case(settings={"steps": 4, "restarts": 2}),
    "bim": Case(settings={"steps": 3}),
    "cafa": Case(settings={"steps": 3, "step_size": None}),
    "cleverhans_cw_l2": Case(("l2",), {"steps": 20}),
    "cleverhans_fgm": Case(),
    "cleverhans_mim": Case(settings={"steps": 3}),
    "cleverhans_pgd": Case(settings={"steps": 3}),
    "cleverhans_spsa": Case(("linf",), {"steps": 24}),
    "cw_l2": Case(("l2",), {"steps": 8, "searches": 2, "constant": 30.0, "learning_rate": 0.1}, objective="margin"),
    "deepfool": Case(settings={"steps": 5}, objective="margin"),
    "fab": Case(settings={"steps": 5}, objective="distance"),
    "fgsm": Case(),
    "fgsm_rs": Case(),
    "foolbox_boundary": Case(("l2",), {"steps": 60, "step_size": 0.1}),
    "foolbox_ddn": Case(("l2",), {"steps": 10}),
    "foolbox_hop_skip_jump": Case(settings={"steps": 3, "directions": 30}),
    "mi_fgsm": Case(settings={"steps": 3}),
    "noise": Case(settings={"draws": 15}, objective="margin"),
    "pgd": Case(settings={"steps": 3, "restarts": 2}),
    "square": Case(settings={"queries": 12}, objective="margin"),
    "ti_dim": Case(settings={"steps": 3, "kernel": 3}),
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
    if CASES[name].objective == "distance":
        failed = ~result.success.numpy()
        np.testing.assert_array_equal(result.image.numpy()[failed], IMAGE[failed])
        assert (-result.loss.numpy()[failed] > EPSILON[norm]).all()
        loss = tf.where(failed, result.loss, -norms.length(result.image - IMAGE, norm))
    else:
        loss = OBJECTIVES[CASES[name].objective](logits_fn)(result.image, {"label": LABEL})
    np.testing.assert_allclose(result.loss, loss, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(result.success, np.argmax(logits, axis=1) != LABEL)
    assert result.success.dtype == tf.bool and result.loss.dtype == tf.float32
    assert result.queries.dtype == tf.int32 and result.queries.shape == [BATCH]
    assert (result.queries.numpy() >= 1).all()


@EVERY_NORM
def test_attack_raises_the_loss(name, norm):
    clean, attacked = (
        np.mean(losses.cross_entropy(logits_fn(each), LABEL)) for each in (IMAGE, found(name, norm).image)
    )
    assert attacked > clean + 0.05


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


@pytest.mark.parametrize("name", [name for name in CASES if "targets" in ATTACKS[name]().get_config()])
def test_attack_with_targets_goes_to_those_of_the_context(name):
    attack = make(name, "l2", epsilon=5.0, targets=1)
    fn = logits_fn if attack.takes == "logits" else OBJECTIVES["targeted_cross_entropy"](logits_fn)
    for further in (1, 2):
        target = (LABEL + further) % CLASSES
        result = attack(fn, IMAGE, {"label": tf.constant(LABEL), "target": tf.constant(target)}, SEED)
        clean, attacked = (
            tf.gather(logits, target, batch_dims=1) - tf.gather(logits, LABEL, batch_dims=1)
            for logits in (logits_fn(IMAGE), logits_fn(result.image))
        )
        assert (attacked.numpy() > clean.numpy()).all()


@pytest.mark.parametrize("name", [name for name in CASES if issubclass(ATTACKS[name], Iterative)])
def test_attack_in_steps_is_traced_once_for_batches_of_any_size(name):
    attack, traced = make(name, CASES[name].norms[-1]), []
    fn = logits_fn if attack.takes == "logits" else OBJECTIVES["cross_entropy"](logits_fn)

    def step(state, image, context):
        traced.append(name)
        success_fn = None if attack.takes == "logits" else misclassified(logits_fn)
        return attack.step(fn, state, image, context, success_fn)

    image, context = tf.constant(IMAGE), {"label": tf.constant(LABEL)}
    given = (attack.start(image, SEED), image, context)
    signature = tf.nest.map_structure(lambda each: tf.TensorSpec([None, *each.shape[1:]], each.dtype), given)
    start = tf.function(attack.start, input_signature=(signature[1], tf.TensorSpec([None, 2], tf.int32)))
    compiled = tf.function(step, input_signature=signature)
    state, of_one = start(image, SEED), start(image[1:2], SEED[1:2])
    eager = given[0]
    for _ in range(min(attack.passes, 3)):
        state, eager = compiled(state, image, context), step(eager, image, context)
        of_one = compiled(of_one, image[1:2], {"label": context["label"][1:2]})
    assert len(traced) == 1 + min(attack.passes, 3)
    for found, expected, alone in zip(state.best, eager.best, of_one.best):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(alone, expected[1:2], rtol=1e-4, atol=1e-5)


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
