"""The Carlini-Wagner attack against exact distances, cleverhans, and itself in steps."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import losses
from kerasdefense.attacks import ATTACKS, CarliniWagner, norms
from kerasdefense.evaluation import PlannedAttack
from kerasdefense.evaluation.pool import Pool
from kerasdefense.evaluation.search import Chunk, ExactPath, Search, compiled
from kerasdefense.types import UsageError

BATCH, DIAGONAL = 6, 4.0


class Linear:
    """A linear classifier of two classes, gray 4x4 images far from the box, and how far its boundary is from each."""

    def __init__(self, scale=1.0):
        random = np.random.default_rng(0)
        weights, drawn = random.normal(size=[16, 2]), random.uniform(0.3, 0.7, size=[60, 16])
        lead = (drawn - 0.5) @ (weights[:, 0] - weights[:, 1])
        furthest = np.argsort(-np.abs(lead))[:BATCH]  # Adam's first steps are as long however small the gradient is
        self.weights = (scale * weights).astype(np.float32)
        self.image = drawn[furthest].reshape(BATCH, 4, 4, 1).astype(np.float32)
        self.label = (lead[furthest] < 0).astype(np.int32)
        self.distance = np.abs(lead[furthest]) / np.linalg.norm(weights[:, 0] - weights[:, 1])

    def logits_fn(self, image):
        return tf.reshape(image - 0.5, [-1, 16]) @ self.weights

    def run(self, attack, rows=slice(None)):
        return run(attack, self.logits_fn, self.image[rows], self.label[rows])


def run(attack, logits_fn, image, label):
    return tf.function(lambda: attack(logits_fn, image, label, tf.zeros([len(label), 2], tf.int32)))()


def lengths(result, image):
    return norms.length(result.image - image, "l2").numpy()


@pytest.fixture(scope="module")
def linear():
    return Linear()


@pytest.fixture(scope="module")
def nearest(linear):
    """Return what a search for the constant finds, as many steps as the tests below share."""
    return linear.run(CarliniWagner(epsilon=DIAGONAL, steps=150, searches=7))


def test_distance_to_a_linear_boundary_is_found_within_a_few_per_cent(linear, nearest):
    length = lengths(nearest, linear.image)
    assert nearest.success.numpy().all()
    assert (length >= linear.distance * (1 - 1e-4)).all() and (length < 1.04 * linear.distance).all()
    np.testing.assert_allclose(nearest.loss, losses.margin(linear.logits_fn(nearest.image), linear.label), atol=1e-6)
    assert (nearest.queries.numpy() == 7 * 150).all()


def test_constant_too_small_for_the_scale_of_the_logits_finds_nothing_and_a_larger_one_does(linear):
    small = linear.run(CarliniWagner(epsilon=DIAGONAL, steps=60, searches=1, constant=1e-4))
    assert not small.success.numpy().any()
    np.testing.assert_array_equal(small.image, linear.image)
    assert linear.run(CarliniWagner(epsilon=DIAGONAL, steps=60, searches=1, constant=10.0)).success.numpy().all()
    scaled = Linear(scale=1e-5).run(CarliniWagner(epsilon=DIAGONAL, steps=60, searches=1, constant=10.0))
    assert not scaled.success.numpy().any()


def test_constants_are_searched_between_the_largest_that_failed_and_the_smallest_that_fooled(linear):
    attack = CarliniWagner(epsilon=DIAGONAL, steps=2, searches=4, constant=1.0)
    state = attack.start(tf.constant(linear.image[:3]), tf.zeros([3, 2], tf.int32))
    verdicts = tf.constant([[False, False, False], [False, True, True], [True, False, True], [True, True, False]])
    expected = [[1, 1, 1], [10, 10, 10], [100, 5.5, 5.5], [55, 7.75, 3.25]]
    for fooled, constant in zip(verdicts, expected):
        np.testing.assert_allclose(state.constant, constant)
        over = state.best._replace(queries=state.best.queries + attack.steps)
        moved = state._replace(best=over, fooled=fooled, mean=state.mean + 1, square=state.square + 1)
        state = attack._restarted(moved, tf.constant(linear.image[:3]))
        np.testing.assert_array_equal(state.mean, 0 * state.mean)
        np.testing.assert_array_equal(state.image, linear.image[:3])


def test_first_moves_are_those_of_adam_on_the_variable(linear):
    attack = CarliniWagner(epsilon=DIAGONAL, steps=10, searches=1, constant=3.0)
    image, context = tf.constant(linear.image), {"label": tf.constant(linear.label)}
    state = attack.start(image, tf.zeros([BATCH, 2], tf.int32))
    variable = tf.Variable(tf.atanh(2 * image - 1))
    # As the sum over the batch, in which rows do not meet.
    optimizer = tf.keras.optimizers.Adam(0.01, epsilon=1e-8)
    for _ in range(4):
        state = attack.step(linear.logits_fn, state, image, context)
        with tf.GradientTape() as tape:
            point = (1 + tf.tanh(variable)) / 2
            lead = tf.nn.relu(-losses.margin(linear.logits_fn(point), linear.label))
            cost = tf.reduce_sum((point - image) ** 2) + 3.0 * tf.reduce_sum(lead)
        optimizer.apply_gradients([(tape.gradient(cost, variable), variable)])
        np.testing.assert_allclose(state.image, (1 + tf.tanh(variable)) / 2, rtol=0, atol=2e-5)


def test_distances_are_no_larger_than_cleverhans(linear):
    seed = tf.zeros([BATCH, 2], tf.int32)
    theirs = ATTACKS["cleverhans_cw_l2"](epsilon=DIAGONAL, steps=30)(linear.logits_fn, linear.image, linear.label, seed)
    ours = linear.run(CarliniWagner(epsilon=DIAGONAL, steps=30, searches=5, constant=1.0))
    assert theirs.success.numpy().all() and ours.success.numpy().all()
    assert (lengths(ours, linear.image) <= 1.02 * lengths(theirs, linear.image)).all()


def test_what_lies_outside_the_ball_is_no_success_and_gives_back_the_image(linear, nearest):
    length = lengths(nearest, linear.image)
    epsilon = float(np.sort(length)[2:4].mean())
    result = linear.run(CarliniWagner(epsilon=epsilon, steps=150, searches=7))
    inside = length <= epsilon
    assert inside.sum() == 3
    np.testing.assert_array_equal(result.success, inside)
    np.testing.assert_array_equal(result.image, np.where(inside[:, None, None, None], nearest.image, linear.image))


def test_misclassified_image_is_a_success_as_it_is(linear):
    attack, seed = CarliniWagner(steps=3, searches=1), tf.zeros([BATCH, 2], tf.int32)
    result = attack(linear.logits_fn, linear.image, 1 - linear.label, seed)
    assert result.success.numpy().all()
    np.testing.assert_array_equal(result.image, linear.image)


def test_kappa_asks_for_a_margin(linear):
    result = linear.run(CarliniWagner(epsilon=DIAGONAL, steps=60, searches=1, constant=10.0, kappa=0.5))
    assert result.success.numpy().all() and (result.loss.numpy() >= 0.5).all()
    assert (lengths(result, linear.image) > linear.distance).all()


def test_black_and_white_pixels_move_and_stay_in_the_box():
    image = np.tile(np.float32([[0.0, 1.0], [1.0, 0.0]])[None, :, :, None], [2, 1, 1, 1])
    weights = tf.constant([[0.0, 4.0], [0.0, 0.0], [0.0, -4.0], [0.0, 0.0]])

    def logits_fn(each):
        return tf.reshape(each, [-1, 4]) @ weights + [0.0, 2.0]

    label = np.zeros(2, np.int32)
    result = run(CarliniWagner(epsilon=2.0, steps=700, searches=1, constant=50.0), logits_fn, image, label)
    assert result.success.numpy().all()
    assert np.min(result.image) >= 0 and np.max(result.image) <= 1
    np.testing.assert_allclose(lengths(result, image), 0.5 / np.sqrt(2), rtol=0.05)


def test_rows_do_not_depend_on_the_batch_nor_on_the_seed(linear):
    attack, rows = CarliniWagner(epsilon=DIAGONAL, steps=30, searches=2, constant=1.0), np.array([4, 1])
    image, label, seed = map(tf.constant, (linear.image, linear.label, np.zeros([BATCH, 2], np.int32)))
    attacked = compiled(lambda *given: attack(linear.logits_fn, *given), image, label, seed)
    together, other = attacked(image, label, seed), attacked(image, label, seed + 1)
    alone = attacked(*(tf.gather(each, rows) for each in (image, label, seed)))
    assert together.success.numpy().any()
    np.testing.assert_array_equal(other.image, together.image)
    np.testing.assert_array_equal(alone.success, together.success.numpy()[rows])
    np.testing.assert_allclose(alone.image, together.image.numpy()[rows], rtol=0, atol=1e-5)


def test_pool_steps_stores_and_resumes_it(linear):
    attack = CarliniWagner(epsilon=DIAGONAL, steps=6, searches=3, constant=0.1, learning_rate=0.03)

    def path(image, seed):
        return linear.logits_fn(image)

    block = Chunk(linear.image, linear.label, np.arange(BATCH, dtype=np.int32))
    exact = ExactPath(path, seed=0, chunk_size=4)
    search = Search(PlannedAttack("cw_l2", attack, "distance"), "exact", path, stream=0, seed=0, chunk_size=4)

    def pool():
        return Pool(search, block, exact.logits(block), np.arange(BATCH), exact)

    whole, first = pool(), pool()
    for _ in range(3):
        first.advance()
    resumed = pool()
    resumed.from_arrays(first.to_arrays())
    for each in (whole, resumed):
        while not each.finished:
            each.advance()
    np.testing.assert_array_equal(resumed.fooled, whole.fooled)
    np.testing.assert_array_equal(resumed.image_adv, whole.image_adv)
    np.testing.assert_array_equal(whole.fooled, linear.run(attack).success)
    assert 0 < whole.fooled.sum() < BATCH


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"norm": "linf"}, "CarliniWagner attacks in the l2 norm only, not linf"),
        ({"steps": 0}, "steps and searches must be at least 1, not 0 and 9"),
        ({"searches": 0}, "steps and searches must be at least 1, not 1000 and 0"),
        ({"constant": 0.0}, "constant and learning_rate must be finite numbers above 0, not 0.0 and 0.01"),
        ({"learning_rate": float("inf")}, "constant and learning_rate must be finite numbers above 0"),
        ({"kappa": -1.0}, "kappa must be a finite number of at least 0, not -1.0"),
    ],
)
def test_carlini_wagner_refuses_illegal_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        CarliniWagner(**settings)
