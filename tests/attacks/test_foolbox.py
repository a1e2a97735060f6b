"""foolbox's attacks behind our contract, with foolbox and without."""

from __future__ import annotations

import dataclasses
import logging
import sys

import numpy as np
import pytest
import tensorflow as tf

from kerasdefense.attacks import ATTACKS, has_foolbox, norms, seeds
from kerasdefense.attacks.foolbox import FoolboxAttack, FoolboxBoundary, FoolboxDDN, FoolboxHopSkipJump
from kerasdefense.types import InputError, UsageError

WITH_FOOLBOX = pytest.mark.skipif(not has_foolbox(), reason="foolbox is not installed")
SEED = seeds.per_example(0, 0, tf.range(8))
QUICK = {
    "ddn": FoolboxDDN(epsilon=3.0, steps=10),
    "boundary": FoolboxBoundary(epsilon=4.0, steps=30, step_size=0.2),
    "hop_skip_jump_l2": FoolboxHopSkipJump("l2", 3.0, steps=3, directions=20),
    "hop_skip_jump_linf": FoolboxHopSkipJump("linf", 0.5, steps=3, directions=20),
}
EVERY = pytest.mark.parametrize("name", QUICK)
WALKS = pytest.mark.parametrize("name", [name for name in QUICK if name != "ddn"])


_random = np.random.default_rng(0)
WEIGHTS = _random.normal(size=[16, 3]).astype(np.float32)
IMAGE = tf.constant(_random.uniform(0.3, 0.7, size=[6, 4, 4, 1]), tf.float32)


def linear(image):
    return tf.reshape(image - 0.5, [-1, 16]) @ WEIGHTS


LABEL = tf.argmax(linear(IMAGE), axis=1, output_type=tf.int32)


def decisions_of(trained):
    """Return a classifier that says nothing but its class, without a gradient."""
    return lambda image: 2 * tf.one_hot(tf.argmax(trained.logits_fn(image), axis=1), 10)


@WITH_FOOLBOX
def test_ddn_comes_close_to_the_exact_distance_on_a_linear_model():
    result = FoolboxDDN(epsilon=1.0, steps=60)(linear, IMAGE, LABEL, SEED[:6])
    logits = linear(IMAGE).numpy()
    away = WEIGHTS[:, :, None] - WEIGHTS.T[LABEL].T[:, None]
    lead = logits.T - logits[np.arange(6), LABEL]
    distances = np.abs(lead) / np.maximum(np.linalg.norm(away, axis=0), 1e-9)
    exact = np.where(np.arange(3)[:, None] == LABEL, np.inf, distances).min(axis=0)
    length = norms.length(result.image - IMAGE, "l2").numpy()
    assert result.success.numpy().all()
    assert (length > exact).all() and length.mean() < 1.3 * exact.mean()


@WITH_FOOLBOX
@WALKS
def test_decision_attacks_need_no_gradient_and_come_nearer_than_noise(name, trained):
    attack, image, label = QUICK[name], trained.image[:8], trained.label[:8]
    result = attack(decisions_of(trained), image, label, SEED)
    length = norms.length(result.image - image, attack.norm).numpy()
    noise = tf.random.stateless_uniform(image.shape, [0, 0])
    assert result.success.numpy().all()
    assert np.median(length) < 0.8 * np.median(norms.length(noise - image, attack.norm))
    assert (result.queries.numpy() > 50).all()


@WITH_FOOLBOX
@pytest.mark.parametrize(("norm", "far"), [("linf", 1.0), ("l2", 8.0)])
@pytest.mark.parametrize("queries", [40, 150])
def test_hop_skip_jump_keeps_to_its_queries(norm, far, queries, trained):
    passes = []

    def decided(image):
        passes.append(len(image))
        return decisions_of(trained)(tf.constant(image)).numpy()

    def logits_fn(image):
        return tf.ensure_shape(tf.numpy_function(decided, [image], tf.float32), [None, 10])

    image, label = trained.image[:8], trained.label[:8]
    result = FoolboxHopSkipJump(norm, far / 1000, queries=queries)(logits_fn, image, label, SEED)
    assert len(passes) == queries == result.queries[0]
    np.testing.assert_array_equal(result.image, image)  # nothing so near fools
    passes.clear()
    result = FoolboxHopSkipJump(norm, far, queries=400)(logits_fn, image, label, SEED)
    assert result.success.numpy().all() and len(passes) < 100  # no more is asked once all fool within the ball


@WITH_FOOLBOX
@EVERY
def test_what_left_the_ball_is_given_back(name):
    attack = dataclasses.replace(QUICK[name], epsilon=1e-3, steps=2)
    result = attack(linear, IMAGE, LABEL, SEED[:6])
    np.testing.assert_array_equal(result.image, IMAGE)
    assert not result.success.numpy().any()


@WITH_FOOLBOX
@EVERY
def test_equal_seeds_give_equal_images_without_a_word(name, capfd):
    handlers = list(logging.getLogger().handlers)
    first, again = (QUICK[name](linear, IMAGE, LABEL, SEED[:6]).image for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert logging.getLogger().handlers == handlers
    assert capfd.readouterr() == ("", "")


@WITH_FOOLBOX
def test_walk_begins_at_another_image_where_noise_does_not_fool():
    """All noise is given class 0, so that images of class 0 cannot be left by it."""
    image = np.full([3, 8, 8, 1], 0.5, np.float32)
    image[2] = 1.0

    def logits_fn(each):
        bright = tf.reduce_mean(each, axis=[1, 2, 3]) - 0.8
        return tf.stack([-bright, bright], axis=1)

    result = FoolboxHopSkipJump("linf", 0.5, steps=2, directions=10)(logits_fn, image, [0, 0, 1], SEED[:3])
    assert result.success.numpy().all()
    alone = FoolboxHopSkipJump("linf", 0.5, steps=2, directions=10)(logits_fn, image[:2], [0, 0], SEED[:2])
    np.testing.assert_array_equal(alone.image, image[:2])
    assert not alone.success.numpy().any()


@WITH_FOOLBOX
@EVERY
def test_misclassified_image_is_a_success_as_it_is(name):
    result = dataclasses.replace(QUICK[name], steps=2)(linear, IMAGE, (LABEL + 1) % 3, SEED[:6])
    assert result.success.numpy().all() and np.isfinite(result.image).all()
    np.testing.assert_allclose(result.image, IMAGE, atol=0.02)


@WITH_FOOLBOX
@WALKS
def test_classifier_that_answers_at_random_is_refused(name):
    def logits_fn(image):
        return tf.random.normal([len(image), 3])

    with pytest.raises(InputError, match="needs a classifier that answers an image alike each time") as caught:
        QUICK[name](logits_fn, IMAGE, LABEL, SEED[:6])
    assert "\n" not in str(caught.value)


def test_without_foolbox_attacks_are_described_but_not_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "foolbox", None)
    assert not has_foolbox()
    for name in ("foolbox_boundary", "foolbox_ddn", "foolbox_hop_skip_jump"):
        with pytest.raises(UsageError, match=r"needs foolbox, which is not installed; .* pip install '.\[bench\]'"):
            ATTACKS[name]()(linear, IMAGE, LABEL, SEED[:6])


@WITH_FOOLBOX
def test_adapter_without_an_attack_is_refused():
    with pytest.raises(UsageError, match="use one of the foolbox attacks: ddn, boundary, hop_skip_jump"):
        FoolboxAttack()(linear, IMAGE, LABEL, SEED[:6])


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        (FoolboxDDN, {"norm": "linf"}, "FoolboxDDN attacks in the l2 norm only, not linf"),
        (FoolboxBoundary, {"norm": "linf"}, "FoolboxBoundary attacks in the l2 norm only, not linf"),
        (FoolboxBoundary, {"step_size": 1.0}, "step_size must be above 0 and below 1, not 1.0"),
        (FoolboxHopSkipJump, {"steps": 0}, "steps must be at least 1, not 0"),
        (FoolboxHopSkipJump, {"directions": 0}, "directions must be at least 1, not 0"),
        (FoolboxHopSkipJump, {"queries": 2}, "queries must be 0 or above 2, not 2"),
    ],
)
def test_adapter_refuses_illegal_settings(kind, settings, message):
    with pytest.raises(UsageError, match=message):
        kind(**settings)
