from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from kerasdefense import losses
from kerasdefense.attacks import (
    FGSM,
    FGSMRS,
    OBJECTIVES,
    PGD,
    AttackResult,
    hit_target,
    misclassified,
    norms,
    seeds,
)
from kerasdefense.attacks.pgd import better
from kerasdefense.types import UsageError

SIDE = 4
PIXELS = SIDE * SIDE


class Linear:
    """A linear classifier of gray 4x4 images, some images and their labels."""

    def __init__(self, *, seed=0, classes=3, batch=6):
        random = np.random.default_rng(seed)
        self.weights = tf.constant(random.normal(size=[PIXELS, classes]), tf.float32)
        self.image = tf.constant(random.uniform(size=[batch, SIDE, SIDE, 1]), tf.float32)
        self.label = tf.constant(random.integers(0, classes, batch), tf.int32)
        self.seed = seeds.per_example(seed, 0, tf.range(batch))

    def logits_fn(self, image):
        return tf.reshape(image, [-1, PIXELS]) @ self.weights

    def run(self, attack, *, objective="cross_entropy", success_fn=None, rows=None):
        rows = tf.range(len(self.label)) if rows is None else tf.constant(rows)
        image, label, seed = (tf.gather(each, rows) for each in (self.image, self.label, self.seed))
        return attack(OBJECTIVES[objective](self.logits_fn), image, {"label": label}, seed, success_fn)


def assert_feasible(image_adv, image, *, epsilon, norm):
    delta = np.reshape(np.float64(image_adv) - np.float64(image), [len(image), -1])
    length = np.abs(delta).max(axis=1) if norm == "linf" else np.linalg.norm(delta, axis=1)
    assert (length <= epsilon * (1 + 1e-5) + 1e-7).all()
    assert np.min(image_adv) >= 0 and np.max(image_adv) <= 1


SETTINGS = st.fixed_dictionaries(
    {
        "norm": st.sampled_from(norms.NORMS),
        "epsilon": st.sampled_from([0.0, 8 / 255, 0.3, 1.5]),
        "steps": st.integers(1, 4),
        "step_size": st.none() | st.floats(0.001, 3),
        "random_start": st.booleans(),
        "keep": st.sampled_from(["best", "last"]),
    }
)


@given(SETTINGS, st.integers(0, 1000))
def test_every_iterate_is_feasible(settings, seed):
    linear, attack = Linear(seed=seed), PGD(**settings)
    context = {"label": linear.label}
    state = attack.start(linear.image, linear.seed)
    for _ in range(attack.steps):
        assert_feasible(state.image, linear.image, epsilon=attack.epsilon, norm=attack.norm)
        state = attack.step(OBJECTIVES["cross_entropy"](linear.logits_fn), state, linear.image, context)
    assert_feasible(state.image, linear.image, epsilon=attack.epsilon, norm=attack.norm)


@given(SETTINGS, st.sampled_from([1, 2]), st.integers(0, 1000))
def test_result_is_feasible_and_its_loss_and_queries_are_true(settings, restarts, seed):
    restarts = restarts if settings["random_start"] else 1
    linear, attack = Linear(seed=seed), PGD(**settings, restarts=restarts)
    result = linear.run(attack)
    assert_feasible(result.image, linear.image, epsilon=attack.epsilon, norm=attack.norm)
    loss = losses.cross_entropy(linear.logits_fn(result.image), linear.label)
    np.testing.assert_allclose(result.loss, loss, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(result.queries, [restarts * (attack.steps + 1)] * 6)
    assert not result.success.numpy().any()


@pytest.mark.parametrize("norm", norms.NORMS)
def test_seeds_alone_decide_the_result(norm):
    linear, attack = Linear(), PGD(norm, 0.3, steps=2)
    first, again = linear.run(attack), linear.run(attack)
    np.testing.assert_array_equal(first.image, again.image)
    linear.seed += 1
    assert not np.array_equal(first.image, linear.run(attack).image)


@pytest.mark.parametrize("norm", norms.NORMS)
@pytest.mark.parametrize("rows", [[5, 3, 0, 1, 2, 4], [2], [4, 4]])
def test_result_does_not_depend_on_the_place_in_the_batch(norm, rows):
    linear, attack = Linear(), PGD(norm, 0.3, steps=3, restarts=2)
    whole, part = linear.run(attack), linear.run(attack, rows=rows)
    for of_whole, of_part in zip(whole, part):
        np.testing.assert_allclose(of_part, of_whole.numpy()[rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", norms.NORMS)
def test_best_iterate_is_at_least_the_start_and_the_last_one(norm, trained):
    # Steps of twice the radius bounce between the faces of the ball: the last iterate is often not the best.
    settings = {"norm": norm, "epsilon": 0.4, "steps": 5, "step_size": 0.8}
    loss_fn, context = OBJECTIVES["cross_entropy"](trained.logits_fn), {"label": trained.label[:32]}
    image, seed = trained.image[:32], seeds.per_example(0, 0, tf.range(32))
    best = PGD(**settings)(loss_fn, image, context, seed).loss.numpy()
    last = PGD(**settings, keep="last")(loss_fn, image, context, seed).loss.numpy()
    start = loss_fn(PGD(**settings).start(image, seed).image, context).numpy()
    assert (best >= last).all() and (best > last).any()
    assert (best >= start - 1e-6).all() and best.mean() > start.mean()


@pytest.mark.parametrize("norm", norms.NORMS)
def test_more_restarts_only_raise_the_loss_and_the_successes(norm, trained):
    image, label = trained.image[:32], trained.label[:32]
    loss_fn, context = OBJECTIVES["cross_entropy"](trained.logits_fn), {"label": label}
    seed = seeds.per_example(0, 0, tf.range(32))
    epsilon = {"linf": 0.12, "l2": 0.6}[norm]

    def run(restarts, success_fn=None):
        return PGD(norm, epsilon, steps=2, restarts=restarts)(loss_fn, image, context, seed, success_fn)

    one, three = run(1).loss.numpy(), run(3).loss.numpy()
    assert (three >= one - 1e-6).all() and (three > one + 1e-3).any()
    one, three = (run(count, misclassified(trained.logits_fn)).success.numpy() for count in (1, 3))
    assert (three >= one).all()


@pytest.mark.parametrize("keep", ["best", "last"])
def test_success_is_what_the_returned_image_does(keep, trained):
    loss_fn, context = OBJECTIVES["margin"](trained.logits_fn), {"label": trained.label}
    success_fn = misclassified(trained.logits_fn)
    seed = seeds.per_example(0, 0, tf.range(len(trained.label)))
    result = PGD("linf", 0.1, steps=3, keep=keep)(loss_fn, trained.image, context, seed, success_fn)
    np.testing.assert_array_equal(result.success, success_fn(result.image, context))
    assert 0 < result.success.numpy().mean() < 1


def test_success_comes_before_loss():
    image = tf.fill([2, SIDE, SIDE, 1], 0.4)

    def brightness(image, context):
        return tf.reduce_mean(image, axis=[1, 2, 3])

    def dark(image, context):
        return brightness(image, context) < 0.45

    attack = PGD("linf", 0.2, steps=3, random_start=False)
    result = attack(brightness, image, None, tf.zeros([2, 2], tf.int32), dark)
    assert result.success.numpy().all()
    np.testing.assert_array_equal(result.image, image)
    last = PGD("linf", 0.2, steps=3, random_start=False, keep="last")
    assert not last(brightness, image, None, tf.zeros([2, 2], tf.int32), dark).success.numpy().any()


def test_better_takes_success_then_loss_and_adds_queries():
    def result(value, success, loss):
        size = len(success)
        return AttackResult(
            tf.fill([size, 1, 1, 1], value),
            tf.constant(success),
            tf.constant(loss),
            tf.ones([size], tf.int32),
        )

    first = result(0.0, [False, False, True, True, False], [1.0, 1, 1, 1, 1])
    second = result(1.0, [False, False, False, True, True], [2.0, 1, 9, 2, 0])
    taken = better(first, second)
    np.testing.assert_array_equal(tf.reshape(taken.image, [-1]), [1, 0, 0, 1, 1])
    np.testing.assert_array_equal(taken.success, [False, False, True, True, True])
    np.testing.assert_array_equal(taken.loss, [2, 1, 1, 2, 0])
    np.testing.assert_array_equal(taken.queries, [2] * 5)


@pytest.mark.parametrize("norm", norms.NORMS)
def test_targeted_objective_reaches_the_target_of_a_linear_model(norm):
    linear = Linear()
    target = (linear.label + 1) % 3
    context, success_fn = {"target": target}, hit_target(linear.logits_fn)
    epsilon = {"linf": 0.6, "l2": 3.0}[norm]
    loss_fn = OBJECTIVES["targeted_cross_entropy"](linear.logits_fn)
    result = PGD(norm, epsilon, steps=20)(loss_fn, linear.image, context, linear.seed, success_fn)
    assert result.success.numpy().all()
    np.testing.assert_array_equal(tf.argmax(linear.logits_fn(result.image), axis=1, output_type=tf.int32), target)


@pytest.mark.parametrize("objective", ["cross_entropy", "margin"])
@pytest.mark.parametrize("epsilon", [8 / 255, 0.3])
@pytest.mark.parametrize(
    "kind",
    [FGSM, lambda *model: PGD(*model, steps=10), lambda *model: PGD(*model, steps=10, random_start=False)],
)
def test_linf_attacks_on_a_two_class_linear_model_reach_the_closed_form(kind, epsilon, objective):
    linear = Linear(classes=2, batch=8)
    away = tf.gather(tf.transpose(linear.weights), 1 - linear.label) - tf.gather(
        tf.transpose(linear.weights), linear.label
    )
    expected = np.clip(linear.image + epsilon * np.sign(np.reshape(away, linear.image.shape)), 0, 1)
    result = linear.run(kind("linf", epsilon), objective=objective)
    np.testing.assert_allclose(result.image, expected, rtol=0, atol=1e-7)


def test_fgsm_on_l2_steps_along_the_unit_gradient():
    linear = Linear(classes=2)
    linear.image = 0.4 + 0.2 * linear.image
    away = tf.gather(tf.transpose(linear.weights), 1 - linear.label) - tf.gather(
        tf.transpose(linear.weights), linear.label
    )
    unit = away / tf.norm(away, axis=1, keepdims=True)
    result = linear.run(FGSM("l2", 0.35))
    np.testing.assert_allclose(result.image, linear.image + 0.35 * np.reshape(unit, linear.image.shape), atol=1e-6)


@pytest.mark.parametrize("scale", [1e2, 1e3])
@pytest.mark.parametrize("norm", norms.NORMS)
def test_margin_attack_is_not_stopped_by_saturated_logits(norm, scale):
    linear = Linear(classes=2, batch=8)
    plain = linear.run(PGD(norm, 0.3, steps=5), objective="margin").image
    linear.weights *= scale
    np.testing.assert_allclose(linear.run(PGD(norm, 0.3, steps=5), objective="margin").image, plain, atol=1e-5)


def test_l2_attack_follows_a_confident_models_tiny_gradient():
    linear = Linear(classes=2)
    # A bias makes every label nearly certain: the cross-entropy's gradient is of the order of exp(-50).
    certain = 50 * tf.one_hot(linear.label, 2)
    loss_fn = OBJECTIVES["cross_entropy"](lambda image: linear.logits_fn(image) + certain)
    result = FGSM("l2", 0.2)(loss_fn, 0.5 * tf.ones_like(linear.image), {"label": linear.label}, linear.seed)
    np.testing.assert_allclose(norms.length(result.image - 0.5, "l2"), 0.2, rtol=1e-4)


@pytest.mark.parametrize("attack", [FGSM(epsilon=0.3), FGSMRS(epsilon=0.3)], ids=["fgsm", "fgsm_rs"])
def test_fgsm_default_steps_are_full_length(attack):
    assert attack.length == {FGSM: 1, FGSMRS: 1.25}[type(attack)] * 0.3
    assert type(attack)(epsilon=0.3, step_size=0.1).length == 0.1
    assert attack.random_start == (type(attack) is FGSMRS)


def test_pgd_default_step_is_two_and_a_half_radii_over_the_steps():
    assert PGD(epsilon=0.2, steps=5).length == pytest.approx(0.1)
    assert PGD(epsilon=0.2, steps=5, step_size=0.07).length == 0.07


@pytest.mark.parametrize("norm", norms.NORMS)
@pytest.mark.parametrize(
    "constant",
    [lambda image: 0 * tf.reshape(image, [-1, PIXELS])[:, :3], lambda image: tf.zeros([len(image), 3])],
    ids=["zero_gradient", "no_gradient"],
)
def test_constant_model_gives_no_nan(constant, norm):
    linear = Linear()
    linear.logits_fn = constant
    result = linear.run(PGD(norm, 0.3, steps=2))
    assert np.isfinite(result.image).all()
    np.testing.assert_allclose(result.loss, np.log(3), rtol=1e-6)
    assert_feasible(result.image, linear.image, epsilon=0.3, norm=norm)


def test_nan_loss_gives_back_the_image():
    linear = Linear()
    nan = float("nan")
    result = PGD("linf", 0.1, steps=2)(
        lambda image, context: nan * tf.reduce_sum(image, axis=[1, 2, 3]), linear.image, None, linear.seed
    )
    np.testing.assert_array_equal(result.image, linear.image)


def test_result_passes_no_gradient_on():
    linear = Linear()
    with tf.GradientTape() as tape:
        tape.watch(linear.image)
        result = linear.run(PGD("linf", 0.1, steps=2))
        total = tf.reduce_sum(result.image) + tf.reduce_sum(result.loss)
    assert tape.gradient(total, linear.image) is None


def test_attack_changes_no_variable_and_no_batch_normalization_statistics(trained):
    before = [variable.numpy() for variable in trained.model.variables]
    seed = seeds.per_example(0, 0, tf.range(len(trained.label)))
    loss_fn = OBJECTIVES["cross_entropy"](trained.logits_fn)
    PGD("linf", 0.1, steps=2)(loss_fn, trained.image, {"label": trained.label}, seed)
    assert any("moving_mean" in variable.name for variable in trained.model.variables)
    for variable, value in zip(trained.model.variables, before):
        np.testing.assert_array_equal(variable, value)


def test_one_trace_serves_many_contexts():
    linear = Linear()
    attack, traced = PGD("linf", 0.1, steps=3, restarts=2), []

    def loss_fn(image, context):
        traced.append(image)
        return losses.cross_entropy(linear.logits_fn(image), context["label"])

    compiled = tf.function(lambda image, context, seed: attack(loss_fn, image, context, seed).image)
    for step in range(4):
        context, seed = {"label": (linear.label + step) % 3}, linear.seed + step
        found = compiled(linear.image, context, seed)
    assert len(traced) == 2 * (3 + 1)
    eager = attack(OBJECTIVES["cross_entropy"](linear.logits_fn), linear.image, context, seed).image
    np.testing.assert_allclose(found, eager, atol=1e-6)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"norm": "l1"}, "unknown norm 'l1'; valid: linf, l2"),
        ({"epsilon": -0.1}, "epsilon must be a finite number of at least 0, not -0.1"),
        ({"epsilon": float("nan")}, "epsilon must be a finite number"),
        ({"epsilon": float("inf")}, "epsilon must be a finite number"),
        ({"steps": 0}, "steps and restarts must be at least 1, not 0 and 1"),
        ({"restarts": 0}, "steps and restarts must be at least 1, not 10 and 0"),
        ({"step_size": 0.0}, "step_size must be a finite number above 0, not 0.0"),
        ({"step_size": -1.0}, "step_size must be a finite number above 0"),
        ({"step_size": float("nan")}, "step_size must be a finite number above 0"),
        ({"step_size": float("inf")}, "step_size must be a finite number above 0"),
        ({"restarts": 2, "random_start": False}, "several restarts need a random start"),
        ({"keep": "first"}, "keep must be best or last, not 'first'"),
    ],
)
def test_pgd_refuses_illegal_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        PGD(**settings)


@pytest.mark.parametrize("kind", [FGSM, FGSMRS])
def test_one_step_attacks_refuse_more_steps(kind):
    with pytest.raises(UsageError, match=f"{kind.__name__} takes one step, not 2; use pgd for more"):
        kind(steps=2)


def test_fgsm_refuses_restarts_from_one_start():
    with pytest.raises(UsageError, match="several restarts need a random start"):
        FGSM(restarts=2)
