from __future__ import annotations

import functools

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

from kerasdefense import losses
from kerasdefense.attacks import Square, misclassified, norms, seeds
from kerasdefense.attacks.square import pattern
from kerasdefense.types import UsageError

HEIGHT, WIDTH, CHANNELS, BATCH = 6, 8, 2, 8
PIXELS = HEIGHT * WIDTH * CHANNELS
QUERIES = 20
EPSILON = {"linf": 0.05, "l2": 0.4}
EVERY_NORM = pytest.mark.parametrize("norm", norms.NORMS)
SEED = seeds.per_example(0, 0, tf.range(BATCH))

_random = np.random.default_rng(0)
IMAGE = tf.constant(np.clip(_random.uniform(-0.2, 1.2, size=[BATCH, HEIGHT, WIDTH, CHANNELS]), 0, 1), tf.float32)
GRAY = tf.fill(IMAGE.shape, 0.5)
WEIGHTS = _random.normal(size=[PIXELS, 4]).astype(np.float32)


def logits_fn(image):
    return tf.reshape(image, [-1, PIXELS]) @ WEIGHTS


LABEL = tf.argmax(logits_fn(IMAGE), axis=1, output_type=tf.int32)


def numpy_logits_fn(image):
    """Return the logits from NumPy, where no gradient can follow."""
    logits = tf.numpy_function(lambda pixels: pixels.reshape([-1, PIXELS]) @ WEIGHTS, [image], tf.float32)
    return tf.ensure_shape(logits, [None, 4])


@functools.cache
def states(norm, image="clipped"):
    """Return the states, as arrays, before and after each query."""
    attack, image = Square(norm, EPSILON[norm], p_init=0.4, queries=QUERIES), IMAGE if image == "clipped" else GRAY
    found = [attack.start(image, SEED)]
    for _ in range(attack.passes):
        found.append(attack.step(numpy_logits_fn, found[-1], image, {"label": LABEL}))
    return tf.nest.map_structure(lambda each: each.numpy(), found)


# 13 Square: p schedule
def test_share_of_pixels_halves_on_schedule():
    query = np.array([0, 10, 11, 50, 51, 200, 201, 501, 1001, 2001, 4001, 6001, 8001, 9999])
    halvings = [0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 9]
    np.testing.assert_array_equal(Square(queries=5000).share(query), 0.8 / 2.0 ** np.array(halvings))
    np.testing.assert_array_equal(Square(p_init=0.05).share(query), 0.05 / 2.0 ** np.array(halvings))
    rescaled = Square(queries=100, rescale=True).share(np.array([0, 1, 2, 3, 5, 10, 20, 40, 60, 80, 99]))
    np.testing.assert_array_equal(0.8 / rescaled, 2.0 ** np.array([0, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9]))


# 13 Square: p schedule
def test_sides_of_cifar_images():
    sides = Square("linf").sides(32, 32)
    assert sides.shape == (5000,) and list(dict.fromkeys(sides)) == [29, 20, 14, 10, 7, 5, 4, 3]
    np.testing.assert_array_equal(np.flatnonzero(np.diff(sides)) + 1, [11, 51, 201, 501, 1001, 2001, 4001])
    assert list(dict.fromkeys(Square("l2").sides(32, 32))) == [29, 21, 15, 11, 7, 5, 3]


@pytest.mark.parametrize("norm, expected", [("linf", [1, 6]), ("l2", [3, 5])])
def test_sides_are_at_least_one_and_fit_into_the_image(norm, expected):
    sides = Square(norm, p_init=1.0).sides(6, 40)
    assert [sides.min(), sides.max()] == expected and (np.diff(sides) <= 0).all()


# 13 Square: margin
@EVERY_NORM
def test_margin_of_the_kept_image_never_gets_worse_and_is_its_own(norm):
    found = states(norm)
    loss = np.array([state.best.loss for state in found])
    assert (np.diff(loss[1:], axis=0) >= 0).all() and (loss[-1] > loss[1]).all()
    assert (np.diff([state.best.success for state in found], axis=0) >= 0).all()
    for state in found[1:]:
        np.testing.assert_allclose(state.best.loss, losses.margin(logits_fn(state.best.image), LABEL), rtol=1e-5)
        fooled = misclassified(logits_fn)(state.best.image, {"label": LABEL})
        np.testing.assert_array_equal(state.best.success, fooled)


# 13 Square: success, where ties between the label and another class are frequent
@EVERY_NORM
def test_success_is_what_the_returned_image_does_even_among_ties(norm):
    image = tf.random.stateless_uniform([100, 5, 5, 1], [0, 0])
    rounded = lambda image: tf.round(0.5 * tf.reshape(image, [-1, 25]) @ WEIGHTS[:25])  # noqa: E731
    label, seed = tf.argmax(rounded(image), axis=1, output_type=tf.int32), seeds.per_example(0, 0, tf.range(100))
    result = Square(norm, 2 * EPSILON[norm], queries=20)(rounded, image, label, seed)
    np.testing.assert_array_equal(result.success, misclassified(rounded)(result.image, {"label": label}))
    assert 0 < result.success.numpy().mean() < 1


# 13 Square: needs logits only, spends no more than its budget
@EVERY_NORM
def test_black_box_in_numpy_is_asked_once_a_query_and_found_like_a_tensor(norm):
    asked = []

    def counted(image):
        asked.append(len(image))
        return numpy_logits_fn(image)

    attack = Square(norm, EPSILON[norm], queries=5)
    result = attack(counted, IMAGE, LABEL, SEED)
    assert len(asked) == 5 + 1
    np.testing.assert_array_equal(result.queries, [5 + 1] * BATCH)
    np.testing.assert_allclose(attack(logits_fn, IMAGE, LABEL, SEED).image, result.image, atol=1e-6)
    if norm == "linf":
        in_graph = tf.function(lambda image, label, seed: attack(numpy_logits_fn, image, label, seed))
        np.testing.assert_allclose(in_graph(IMAGE, LABEL, SEED).image, result.image, atol=1e-6)


# 13 Square: values
def test_linf_changes_are_epsilon_up_or_down_away_from_the_box():
    for state in states("linf", "gray"):
        np.testing.assert_allclose(np.abs(state.image - 0.5), EPSILON["linf"], rtol=1e-5)
    start = states("linf", "gray")[0].image
    np.testing.assert_array_equal(start, np.repeat(start[:, :1], HEIGHT, axis=1))
    assert len(np.unique(start[:, 0], axis=0)) == BATCH
    faces = np.clip(np.stack([IMAGE - EPSILON["linf"], IMAGE + EPSILON["linf"]]), 0, 1)
    for state in states("linf"):
        np.testing.assert_allclose(np.abs(state.image - faces).min(axis=0), 0, atol=1e-7)


# 13 Square: window
def test_linf_window_is_a_square_with_one_sign_per_channel_inside_the_image():
    sides, colours = Square("linf", p_init=0.4, queries=QUERIES).sides(HEIGHT, WIDTH), []
    for query, state in enumerate(states("linf", "gray")[1:-1]):
        changed = np.any(state.image != state.best.image, axis=3)
        for row, place in enumerate(changed):
            rows, columns = np.nonzero(place)
            if len(rows):
                assert np.ptp(rows) < sides[query] and np.ptp(columns) < sides[query]
                (colour,) = np.unique(state.image[row, rows, columns] > 0.5, axis=0)
                colours.append(tuple(colour))
    assert set(colours) == {(False, False), (False, True), (True, False), (True, True)}


# 13 Square: window
@pytest.mark.parametrize("norm, side", [("linf", 1), ("l2", 3)])
def test_window_reaches_every_place_equally(norm, side):
    batch = 800
    image, seed = tf.fill([batch, 5, 6, 1], 0.5), seeds.per_example(0, 0, tf.range(batch))
    attack = Square(norm, 0.1, p_init=1 / 30, queries=100)
    assert (attack.sides(5, 6) == side).all()
    constant = lambda image: tf.zeros([tf.shape(image)[0], 3])  # noqa: E731
    first = attack.start(image, seed)
    second = attack.step(constant, first, image, {"label": tf.zeros([batch], tf.int32)})
    if norm == "linf":
        changed = (second.image.numpy() != first.image.numpy())[..., 0]
        assert changed.sum(axis=(1, 2)).max() == 1
        count = changed.sum(axis=0)
    else:
        draws = seeds.uniform(seed, tf.zeros([batch], tf.int32), 6).numpy()
        top, left = (draws[:, 0] * 3).astype(int), (draws[:, 1] * 4).astype(int)
        inside = np.stack(
            [second.image.numpy()[row, t : t + 3, c : c + 3, 0] for row, (t, c) in enumerate(zip(top, left))]
        )
        assert (np.abs(inside - 0.5).max(axis=(1, 2)) > 0.01).all()
        count = np.histogram2d(top, left, bins=[3, 4])[0]
    assert scipy.stats.chisquare(np.ravel(count)).pvalue > 0.01


# 13 Square: l2
def test_l2_candidates_have_the_length_epsilon_before_the_box():
    for state in states("l2", "gray"):
        np.testing.assert_allclose(np.linalg.norm((state.image - 0.5).reshape([BATCH, -1]), axis=1), 0.4, rtol=1e-5)


@pytest.mark.parametrize(
    "side, expected",
    [
        (1, [[-1]]),
        (2, [[0.25, 1.25], [-0.25, -1.25]]),
        (3, [[0.25, 1.25, 0.25], [-0.25, -0.25, -0.25], [-0.25, -1.25, -0.25]]),
    ],
)
def test_pattern_by_hand(side, expected):
    expected = np.float64(expected)
    for half in (expected[: side // 2], expected[side // 2 :]):
        half /= np.sqrt(np.sum(half**2)) if half.size else 1
    np.testing.assert_allclose(pattern(side), expected / np.linalg.norm(expected), rtol=1e-12)


@pytest.mark.parametrize("side", [3, 4, 5, 9, 20])
def test_pattern_has_unit_length_and_two_opposite_halves_of_equal_mass(side):
    found = pattern(side)
    assert found.shape == (side, side) and np.linalg.norm(found) == pytest.approx(1)
    upper, lower = found[: side // 2], found[side // 2 :]
    assert (upper > 0).all() and (lower < 0).all()
    assert np.linalg.norm(upper) == pytest.approx(np.linalg.norm(lower))
    assert np.unravel_index(found.argmax(), found.shape) == (side // 4, side // 2)


def rewritten(delta, draws, side, epsilon):
    """Return the next l2 change for one image [h, w, c], as the paper's algorithm 3 has it, in NumPy loops."""

    def window(first, second):
        top, left = int(first * (HEIGHT - side + 1)), int(second * (WIDTH - side + 1))
        return slice(top, top + side), slice(left, left + side)

    one, two = window(*draws[:2]), window(*draws[2:4])
    shape = pattern(side).T if draws[4] < 0.5 else pattern(side)
    either = np.zeros([HEIGHT, WIDTH], bool)
    either[one] = either[two] = True
    free = max(epsilon**2 - np.sum(delta**2), 0) / CHANNELS
    found = delta.copy()
    found[two] = 0
    for channel in range(CHANNELS):
        old = delta[..., channel]
        new = shape * (-1 if draws[5 + channel] < 0.5 else 1) + old[one] / (np.linalg.norm(old[one]) + 1e-12)
        found[(*one, channel)] = new / np.linalg.norm(new) * np.sqrt(free + np.sum(old[either] ** 2))
    return epsilon * found / np.linalg.norm(found)


# 7 goldens: an independent transcription
def test_l2_step_matches_a_numpy_transcription():
    attack, image = Square("l2", EPSILON["l2"], p_init=0.4, queries=QUERIES), IMAGE.numpy().astype(np.float64)
    sides = attack.sides(HEIGHT, WIDTH)
    assert set(sides) == {3, 5}
    for query in range(0, QUERIES, 2):
        state = states("l2")[query + 1]
        draws = seeds.uniform(SEED, tf.fill([BATCH], query), 5 + CHANNELS).numpy()
        for row in range(BATCH):
            delta = rewritten(state.best.image[row] - image[row], draws[row], sides[query], EPSILON["l2"])
            np.testing.assert_allclose(state.image[row], np.clip(image[row] + delta, 0, 1), atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 5, 1), (7, 12, 3), (30, 5, 1), (5, 30, 1)])
def test_l2_mosaic_covers_images_of_any_shape(shape):
    gray = tf.fill([3, *shape], 0.5)
    start = Square("l2", 0.3).start(gray, SEED[:3]).image.numpy() - 0.5
    np.testing.assert_allclose(np.linalg.norm(start.reshape([3, -1]), axis=1), 0.3, rtol=1e-5)
    side = min(shape[:2]) // 5
    assert (start != 0).any(axis=3).mean() == (shape[0] // side * side) * (shape[1] // side * side) / np.prod(shape[:2])
    assert len(np.unique(start, axis=0)) == 3


# 13 determinism and equivariance
@EVERY_NORM
def test_result_is_decided_by_seeds_and_not_by_the_place_in_the_batch(norm):
    attack = Square(norm, EPSILON[norm], queries=4, restarts=2)

    def run(rows):
        image, label, seed = (tf.gather(each, rows) for each in (IMAGE, LABEL, SEED))
        return attack(logits_fn, image, label, seed)

    whole = run(list(range(BATCH)))
    np.testing.assert_array_equal(run(list(range(BATCH))).image, whole.image)
    for rows in ([7, 2, 0, 1, 3, 5, 4, 6], [4]):
        for of_whole, of_part in zip(whole, run(rows)):
            np.testing.assert_allclose(of_part, of_whole.numpy()[rows], rtol=1e-5, atol=1e-6)
    other, start = attack.start(IMAGE, SEED + 1).image, attack.start(IMAGE, SEED).image
    assert not np.isclose(other, start).all(axis=(1, 2, 3)).any()


# 13 nested seeds
@EVERY_NORM
def test_more_restarts_only_shrink_the_robust_set_and_raise_the_margin(norm):
    one, three = (
        Square(norm, EPSILON[norm], queries=4, restarts=count)(logits_fn, IMAGE, LABEL, SEED) for count in (1, 3)
    )
    assert (three.success.numpy() >= one.success.numpy()).all()
    assert (three.loss.numpy() >= one.loss.numpy()).all() and (three.loss.numpy() > one.loss.numpy()).any()
    np.testing.assert_array_equal(three.queries, 3 * one.queries)


# 13 constant model
@EVERY_NORM
def test_constant_model_gives_no_nan(norm):
    constant = lambda image: tf.zeros([tf.shape(image)[0], 3])  # noqa: E731
    result = Square(norm, 0.1, queries=3)(constant, IMAGE, tf.zeros_like(LABEL), SEED)
    assert np.isfinite(result.image).all() and not result.success.numpy().any()
    np.testing.assert_array_equal(result.loss, np.zeros(BATCH))


def test_l2_survives_an_image_whose_changes_the_box_cuts_off():
    black = tf.zeros_like(IMAGE)
    result = Square("l2", 0.4, queries=10)(lambda image: -tf.abs(logits_fn(image)), black, LABEL, SEED)
    assert np.isfinite(result.image).all() and np.isfinite(result.loss).all()


def test_linf_comes_near_the_closed_form_of_a_linear_model():
    image = tf.random.stateless_uniform([6, 4, 4, 1], [1, 0])
    matrix = WEIGHTS[:16, :2]
    model = lambda image: tf.reshape(image, [-1, 16]) @ matrix  # noqa: E731
    label, epsilon = tf.argmax(model(image), axis=1, output_type=tf.int32), 0.1
    away = tf.gather(matrix.T, 1 - label) - tf.gather(matrix.T, label)
    most = losses.margin(model(np.clip(image + epsilon * np.sign(np.reshape(away, image.shape)), 0, 1)), label)
    run = tf.function(lambda seed: Square("linf", epsilon, queries=300, rescale=True)(model, image, label, seed))
    gained = run(SEED[:6]).loss - losses.margin(model(image), label)
    share = gained / (most - losses.margin(model(image), label))
    assert share.numpy().min() > 0.9 and share.numpy().max() < 1 + 1e-5


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"norm": "l1"}, "unknown norm 'l1'; valid: linf, l2"),
        ({"epsilon": float("inf")}, "epsilon must be a finite number"),
        ({"queries": 0}, "queries and restarts must be at least 1, not 0 and 1"),
        ({"restarts": 0}, "queries and restarts must be at least 1, not 5000 and 0"),
        ({"p_init": 0.0}, "p_init must be above 0 and at most 1, not 0.0"),
        ({"p_init": 1.5}, "p_init must be above 0 and at most 1, not 1.5"),
        ({"p_init": float("nan")}, "p_init must be above 0 and at most 1, not nan"),
    ],
)
def test_square_refuses_illegal_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        Square(**settings)


def test_l2_refuses_images_that_are_too_small():
    with pytest.raises(UsageError, match="square needs images of at least 5x5 pixels in l2, not 4x9"):
        Square("l2").start(tf.zeros([1, 4, 9, 1]), SEED[:1])
