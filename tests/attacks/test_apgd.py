from __future__ import annotations

import functools
import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.optimize
import tensorflow as tf

from kerasdefense import losses
from kerasdefense.attacks import APGD, OBJECTIVES, misclassified, norms, ranked_targets, seeds
from kerasdefense.attacks.apgd import checkpoint_steps
from kerasdefense.types import UsageError

SIDE, BATCH, STEPS = 5, 8, 40
PIXELS = SIDE * SIDE
EPSILON = {"linf": 0.12, "l2": 0.5}
EVERY_NORM = pytest.mark.parametrize("norm", norms.NORMS)
SEED = seeds.per_example(0, 0, tf.range(BATCH))

_random = np.random.default_rng(0)
IMAGE = tf.constant(_random.uniform(size=[BATCH, SIDE, SIDE, 1]), tf.float32)


def weights(classes, seed=0):
    return tf.constant(np.random.default_rng(seed).normal(size=[PIXELS, classes]), tf.float32)


def linear(matrix):
    return lambda image: tf.reshape(image, [-1, PIXELS]) @ matrix


class Smooth:
    """A network with one hidden layer of tanh units, whose losses are smooth, wavy and not concave."""

    inner, outer = weights(12, 1), tf.constant(_random.normal(size=[12, 5]), tf.float32)

    @classmethod
    def logits_fn(cls, image):
        return tf.tanh(2 * tf.reshape(image - 0.5, [-1, PIXELS]) @ cls.inner) @ cls.outer


LABEL = tf.argmax(Smooth.logits_fn(IMAGE), axis=1, output_type=tf.int32)
CONTEXT = {"label": LABEL}
LOSS_FN = OBJECTIVES["cross_entropy"](Smooth.logits_fn)


@functools.cache
def states(norm):
    """Return the states, as arrays, before and after each step of a run against the smooth network."""
    attack = APGD(norm, EPSILON[norm], steps=STEPS)
    found = [attack.start(IMAGE, SEED)]
    for _ in range(attack.passes):
        found.append(attack.step(LOSS_FN, found[-1], IMAGE, CONTEXT))
    return tf.nest.map_structure(lambda each: each.numpy(), found)


# 13 APGD: checkpoints
@pytest.mark.parametrize(
    "steps, expected",
    [
        (100, [22, 41, 57, 70, 80, 87, 93, 99]),
        (20, [5, 9, 12, 14, 16, 18, 19, 20]),
        (1, [1]),
    ],
)
def test_checkpoints_by_hand(steps, expected):
    assert checkpoint_steps(steps) == expected


# 13 APGD: checkpoints
@pytest.mark.parametrize("steps", [2, 7, 20, 50, 99, 100, 200, 1000])
def test_checkpoints_are_those_of_the_paper(steps):
    before, share, expected = Fraction(0), Fraction(22, 100), []
    while share <= 1:
        expected.append(math.ceil(share * steps))
        before, share = share, share + max(share - before - Fraction(3, 100), Fraction(6, 100))
    assert checkpoint_steps(steps) == sorted(set(expected))


def transcribed(norm, epsilon, steps, start, image, oracle):
    """Run APGD as the paper's algorithm 1 has it, for one image, in NumPy; return its iterates and step sizes.

    `oracle` gives the loss and its gradient at a point. With `<=` in the first condition, as in the authors' code.
    """

    def projected(point):
        if norm == "linf":
            return np.clip(np.minimum(np.maximum(point, image - epsilon), image + epsilon), 0, 1)
        distance = np.sqrt(np.sum((point - image) ** 2))
        return np.clip(image + (point - image) * min(1, epsilon / max(distance, 1e-20)), 0, 1)

    def ascended(point, gradient, size):
        unit = np.sign(gradient) if norm == "linf" else gradient / np.sqrt(np.sum(gradient**2))
        return projected(point + size * unit)

    points, sizes = [start], [2 * epsilon]
    loss, gradient = oracle(start)
    losses_seen, best, best_at_checkpoint, size_at_checkpoint = [loss], (loss, start, gradient), loss, np.inf
    checkpoints, last, size, here, before = checkpoint_steps(steps), 0, 2 * epsilon, start, start
    for number in range(1, steps + 1):
        share = 1.0 if number == 1 else 0.75
        moved = here + share * (ascended(here, gradient, size) - here) + (1 - share) * (here - before)
        here, before = projected(moved).astype(np.float32), here
        points.append(here)
        loss, gradient = oracle(here)
        losses_seen.append(loss)
        if loss > best[0]:
            best = (loss, here, gradient)
        if number in checkpoints:
            rises = sum(losses_seen[each] > losses_seen[each - 1] for each in range(last + 1, number + 1))
            few = rises <= 0.75 * (number - last)
            idle = size_at_checkpoint == size and best_at_checkpoint == best[0]
            size_at_checkpoint, best_at_checkpoint, last = size, best[0], number
            if few or idle:
                size /= 2
                _, here, gradient = best
        sizes.append(size)
    return np.stack(points), np.array(sizes), best[1]


# 7 goldens: an independent transcription
@EVERY_NORM
def test_search_matches_a_numpy_transcription_step_by_step(norm):
    found = states(norm)

    @tf.function
    def graph(point):
        with tf.GradientTape() as tape:
            tape.watch(point)
            loss = losses.cross_entropy(Smooth.logits_fn(point), LABEL)
        return loss, tape.gradient(loss, point)

    def oracle(point, row):
        return [each[row].numpy() for each in graph(tf.constant(np.repeat(point[None], BATCH, axis=0)))]

    for row in range(0, BATCH, 3):
        start, image = found[0].image[row], IMAGE[row].numpy()
        points, sizes, best = transcribed(norm, EPSILON[norm], STEPS, start, image, functools.partial(oracle, row=row))
        assert sizes[-1] < sizes[0] / 4
        np.testing.assert_allclose([state.image[row] for state in found[:-1]], points, atol=2e-5)
        np.testing.assert_allclose([state.length[row] for state in found[1:]], sizes, rtol=1e-6)
        np.testing.assert_allclose(found[-1].best.image[row], best, atol=2e-5)


# 13 APGD: best loss
@EVERY_NORM
def test_best_loss_never_falls(norm):
    best = np.array([state.best.loss for state in states(norm)[1:]])
    seen = np.array([state.loss for state in states(norm)[1:]])
    np.testing.assert_array_equal(best, np.maximum.accumulate(seen))
    np.testing.assert_array_equal(best, [state.top_loss for state in states(norm)[1:]])
    np.testing.assert_array_equal([state.best.queries[0] for state in states(norm)], np.arange(STEPS + 2))


# 13 APGD: step sizes
@EVERY_NORM
def test_step_sizes_only_halve_and_only_at_checkpoints(norm):
    length = np.array([state.length for state in states(norm)])
    halvings = -np.log2(length / np.float32(2 * EPSILON[norm]))
    np.testing.assert_array_equal(halvings, np.round(halvings))
    at_checkpoint = np.isin(np.arange(-1, STEPS + 1), checkpoint_steps(STEPS))
    steps = np.diff(halvings, axis=0)
    assert np.isin(steps, [0, 1]).all() and not steps[~at_checkpoint[1:]].any()
    assert steps.sum() > 2 * BATCH and not steps[at_checkpoint[1:]].all()


@EVERY_NORM
def test_rises_are_counted_from_the_start_and_from_every_checkpoint(norm):
    expected = np.zeros(BATCH)
    for number, (before, after) in enumerate(zip(states(norm)[:-1], states(norm)[1:])):
        expected += (after.loss > before.loss) & (number > 0)
        if number in checkpoint_steps(STEPS):
            expected *= 0
        np.testing.assert_array_equal(after.rises, expected)


# 13 APGD: step sizes
@pytest.mark.parametrize(
    "rises, halved, improved, expected",
    [
        (2, True, True, True),
        (3, True, True, False),
        (3, False, True, False),
        (3, False, False, True),
        (3, True, False, False),
    ],
)
def test_step_is_halved_after_few_rises_or_without_gain_unless_it_just_was(rises, halved, improved, expected):
    attack, image = APGD("linf", 0.1, steps=20), IMAGE[:1]
    top, gradient = image + 0.01, tf.ones_like(image)
    state = attack.start(image, SEED[:1])
    state = state._replace(
        best=state.best._replace(queries=tf.constant([9]), loss=tf.constant([5.0])),
        top_image=top,
        top_gradient=gradient,
        top_loss=tf.constant([5.0]),
        loss=tf.constant([0.5]),
        rises=tf.constant([float(rises)]),
        halved=tf.constant([halved]),
        checked_loss=tf.constant([4.0 if improved else 5.0]),
    )
    # Step 9 of 20 closes a window of 4 steps. It is a rise too, from 0.5 to 1, and no gain on the best loss, 5.
    found = attack.step(lambda image, context: 1 + 0 * tf.reduce_sum(image, axis=[1, 2, 3]), state, image, CONTEXT)
    assert (found.halved.numpy(), found.rises.numpy(), found.checked_loss.numpy()) == ([expected], [0], [5])
    np.testing.assert_allclose(found.length, 0.1 if expected else 0.2)
    np.testing.assert_array_equal(found.previous, top if expected else state.image)
    if expected:
        moved = norms.project(top + 0.1 * gradient, image, epsilon=0.1, norm="linf")
        mean = 0.75 * moved + 0.25 * (top + top - state.previous)
        np.testing.assert_allclose(found.image, norms.project(mean, image, epsilon=0.1, norm="linf"), atol=1e-6)


# 13 APGD: points after a halving
@EVERY_NORM
def test_halving_goes_back_to_the_best_point(norm):
    moved = 0
    for before, after in zip(states(norm)[:-1], states(norm)[1:]):
        halved = after.length < before.length
        np.testing.assert_array_equal(after.previous[halved], after.best.image[halved])
        np.testing.assert_array_equal(after.previous[~halved], before.image[~halved])
        moved += int(np.sum(np.any(after.previous != before.image, axis=(1, 2, 3))))
    assert moved > BATCH


@EVERY_NORM
def test_every_iterate_is_feasible_and_the_start_is_on_the_sphere(norm):
    for state in states(norm):
        delta = np.reshape(np.float64(state.image) - np.float64(IMAGE), [BATCH, -1])
        length = np.abs(delta).max(axis=1) if norm == "linf" else np.linalg.norm(delta, axis=1)
        assert (length <= EPSILON[norm] * (1 + 1e-5) + 1e-7).all()
        assert state.image.min() >= 0 and state.image.max() <= 1
    gray = tf.fill(IMAGE.shape, 0.5)
    start = APGD(norm, 0.1).start(gray, SEED).image
    np.testing.assert_allclose(norms.length(start - gray, norm), 0.1, rtol=1e-5)


# 13 APGD: success flag
@pytest.mark.parametrize("objective", ["cross_entropy", "dlr"])
@EVERY_NORM
def test_success_is_what_the_returned_image_does(norm, objective):
    loss_fn, success_fn = OBJECTIVES[objective](Smooth.logits_fn), misclassified(Smooth.logits_fn)
    attack = APGD(norm, {"linf": 0.02, "l2": 0.08}[norm], steps=10)
    result = attack(loss_fn, IMAGE, CONTEXT, SEED, success_fn)
    np.testing.assert_array_equal(result.success, success_fn(result.image, CONTEXT))
    np.testing.assert_allclose(result.loss, loss_fn(result.image, CONTEXT), rtol=1e-5, atol=1e-6)
    assert 0 < result.success.numpy().mean() < 1


# 13 APGD: determinism and equivariance
@EVERY_NORM
def test_result_is_decided_by_seeds_and_not_by_the_place_in_the_batch(norm):
    attack = APGD(norm, EPSILON[norm], steps=6, restarts=2)

    def run(rows, seed=SEED):
        image, label, seed = (tf.gather(each, rows) for each in (IMAGE, LABEL, seed))
        return attack(LOSS_FN, image, {"label": label}, seed, misclassified(Smooth.logits_fn))

    whole = run(list(range(BATCH)))
    np.testing.assert_array_equal(run(list(range(BATCH))).image, whole.image)
    for rows in ([7, 2, 0, 1, 3, 5, 4, 6], [4]):
        for of_whole, of_part in zip(whole, run(rows)):
            np.testing.assert_allclose(of_part, of_whole.numpy()[rows], rtol=1e-4, atol=1e-4)  # rounding grows
    others = attack.start(IMAGE, SEED + 1).image
    assert not np.isclose(others, attack.start(IMAGE, SEED).image).any(axis=(1, 2, 3)).all()


# 13 APGD: closed form
@pytest.mark.parametrize("objective", ["cross_entropy", "margin"])
@pytest.mark.parametrize("epsilon", [8 / 255, 0.3])
def test_linf_reaches_the_closed_form_of_a_two_class_linear_model(epsilon, objective):
    matrix = weights(2)
    label = tf.constant([0, 1] * (BATCH // 2))
    away = tf.reshape(tf.gather(tf.transpose(matrix), 1 - label) - tf.gather(tf.transpose(matrix), label), IMAGE.shape)
    loss_fn = OBJECTIVES[objective](linear(matrix))
    result = APGD("linf", epsilon, steps=20)(loss_fn, IMAGE, {"label": label}, SEED)
    expected = np.clip(IMAGE + epsilon * np.sign(away), 0, 1)
    np.testing.assert_allclose(result.image, expected, rtol=0, atol=1e-7)


# 13 APGD: closed form
def test_l2_is_at_least_the_clipped_ray_of_a_two_class_linear_model():
    matrix = weights(2)
    label = tf.constant([0, 1] * (BATCH // 2))
    away = tf.gather(tf.transpose(matrix), 1 - label) - tf.gather(tf.transpose(matrix), label)
    unit = tf.reshape(away / tf.norm(away, axis=1, keepdims=True), IMAGE.shape)
    loss_fn = OBJECTIVES["margin"](linear(matrix))
    for image, slack in ((IMAGE, np.inf), (0.4 + 0.2 * IMAGE, 1e-4)):
        ray = loss_fn(np.clip(image + 0.6 * unit, 0, 1), {"label": label}).numpy()
        loss = APGD("l2", 0.6, steps=30)(loss_fn, image, {"label": label}, SEED).loss.numpy()
        assert (loss >= ray - 1e-4).all() and (loss <= ray + slack).all()


def maximiser(norm, epsilon, image, centre, weight):
    """Return the point of the ball where `-sum weight (point - centre)^2` is highest, for one image, box left out."""
    if norm == "linf":
        return np.clip(centre, image - epsilon, image + epsilon)

    def point(multiplier):
        return image + weight * (centre - image) / (weight + multiplier)

    excess = lambda multiplier: np.linalg.norm(point(multiplier) - image) - epsilon  # noqa: E731
    return point(scipy.optimize.brentq(excess, 0, 1e4)) if excess(0) > 0 else centre


# 13 APGD: concave quadratic
@EVERY_NORM
def test_search_finds_the_maximiser_of_a_concave_quadratic(norm):
    random = np.random.default_rng(3)
    image = random.uniform(0.3, 0.7, size=IMAGE.shape)
    centre = image + random.uniform(-0.2, 0.2, size=IMAGE.shape)
    weight = random.uniform(0.5, 2, size=IMAGE.shape)
    expected = np.stack([maximiser(norm, EPSILON[norm], *row) for row in zip(image, centre, weight)])

    def loss_fn(image, context):
        return -tf.reduce_sum(context["weight"] * (image - context["centre"]) ** 2, axis=[1, 2, 3])

    context = {"centre": tf.constant(centre, tf.float32), "weight": tf.constant(weight, tf.float32)}
    result = APGD(norm, EPSILON[norm])(loss_fn, tf.constant(image, tf.float32), context, SEED)
    highest = -np.sum(weight * (expected - centre) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(result.image, expected, atol=0.01)
    np.testing.assert_allclose(result.loss, highest, rtol=5e-3)


# 13 APGD: nested seeds
@EVERY_NORM
def test_more_restarts_only_shrink_the_robust_set(norm):
    epsilon, success_fn = {"linf": 0.02, "l2": 0.08}[norm], misclassified(Smooth.logits_fn)

    def run(restarts, success_fn=None):
        return APGD(norm, epsilon, steps=3, restarts=restarts)(LOSS_FN, IMAGE, CONTEXT, SEED, success_fn)

    one, three = run(1, success_fn), run(3, success_fn)
    assert (three.success.numpy() >= one.success.numpy()).all()
    np.testing.assert_array_equal(three.queries, 3 * one.queries)
    gained = run(3).loss.numpy() - run(1).loss.numpy()
    assert (gained >= 0).all() and (gained > 1e-4).any()


# 13 APGD: constant model
@pytest.mark.parametrize("objective", ["cross_entropy", "dlr", "margin"])
@pytest.mark.parametrize(
    "constant",
    [lambda image: 0 * Smooth.logits_fn(image), lambda image: tf.zeros([tf.shape(image)[0], 5])],
    ids=["zero_gradient", "no_gradient"],
)
@EVERY_NORM
def test_constant_model_gives_no_nan(norm, constant, objective):
    result = APGD(norm, 0.1, steps=5)(OBJECTIVES[objective](constant), IMAGE, CONTEXT, SEED, misclassified(constant))
    assert np.isfinite(result.image).all() and np.isfinite(result.loss).all()
    np.testing.assert_allclose(result.loss, math.log(5) if objective == "cross_entropy" else 0, rtol=1e-6)


def test_nan_loss_gives_back_the_image():
    nan = lambda image, context: float("nan") * tf.reduce_sum(image, axis=[1, 2, 3])  # noqa: E731
    np.testing.assert_array_equal(APGD("linf", 0.1, steps=3)(nan, IMAGE, CONTEXT, SEED).image, IMAGE)


@pytest.mark.parametrize("dtype", [tf.float16, tf.float64])
def test_losses_of_other_precision_are_taken(dtype):
    loss_fn = OBJECTIVES["margin"](lambda image: tf.cast(Smooth.logits_fn(image), dtype))
    result = APGD("linf", 0.1, steps=3)(loss_fn, IMAGE, CONTEXT, SEED, misclassified(Smooth.logits_fn))
    assert result.loss.dtype == tf.float32 and (result.loss.numpy() > loss_fn(IMAGE, CONTEXT).numpy()).all()


# 13 APGD-T: targets
def test_targeted_runs_lead_past_the_label_wherever_a_linear_model_can_be_led():
    matrix = weights(5)
    logits = linear(matrix)(IMAGE)
    label = tf.argmax(logits, axis=1, output_type=tf.int32)
    epsilon, loss_fn = 0.12, OBJECTIVES["targeted_dlr"](linear(matrix))
    attack = APGD("linf", epsilon, steps=12, targets=4)
    reachable = []
    for target in tf.unstack(ranked_targets(logits, label, 4), axis=1):
        image_adv = attack(loss_fn, IMAGE, {"label": label, "target": target}, SEED).image
        away = tf.gather(tf.transpose(matrix), target) - tf.gather(tf.transpose(matrix), label)
        best = np.clip(IMAGE + epsilon * np.sign(tf.reshape(away, IMAGE.shape)), 0, 1)
        lead, most = (
            np.sum(np.reshape(point, [BATCH, -1]) * away, axis=1, dtype=np.float64) for point in (image_adv, best)
        )
        assert (lead <= most + 1e-4).all()
        np.testing.assert_array_equal(lead > 0, most > 0)
        reachable.append(most > 0)
    assert 0 < np.mean(reachable) < 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"norm": "l1"}, "unknown norm 'l1'; valid: linf, l2"),
        ({"epsilon": float("nan")}, "epsilon must be a finite number"),
        ({"steps": 0}, "steps and restarts must be at least 1 and targets at least 0, not 0, 1 and 0"),
        ({"restarts": 0}, "steps and restarts must be at least 1 and targets at least 0, not 100, 0 and 0"),
        ({"targets": -1}, "steps and restarts must be at least 1 and targets at least 0, not 100, 1 and -1"),
        ({"rho": 0.0}, "rho must be above 0 and below 1, not 0.0"),
        ({"rho": 1.0}, "rho must be above 0 and below 1, not 1.0"),
        ({"rho": float("nan")}, "rho must be above 0 and below 1, not nan"),
    ],
)
def test_apgd_refuses_illegal_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        APGD(**settings)
