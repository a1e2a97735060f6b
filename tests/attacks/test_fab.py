from __future__ import annotations

import functools

import numpy as np
import pytest
import scipy.optimize
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from kerasdefense import losses
from kerasdefense.attacks import FAB, misclassified, norms, ranked_targets, seeds
from kerasdefense.attacks.fab import move_to_plane
from kerasdefense.types import UsageError

SIDE, BATCH = 4, 8
PIXELS = SIDE * SIDE
EVERY_NORM = pytest.mark.parametrize("norm", norms.NORMS)
SEED = seeds.per_example(0, 0, tf.range(BATCH))

_random = np.random.default_rng(0)
IMAGE = tf.constant(np.clip(_random.uniform(-0.2, 1.2, size=[BATCH, SIDE, SIDE, 1]), 0, 1), tf.float32)


def lengths(delta, norm):
    flat = np.reshape(np.float64(delta), [len(delta), -1])
    return np.abs(flat).max(axis=1) if norm == "linf" else np.linalg.norm(flat, axis=1)


class Linear:
    """A linear classifier of gray 4x4 images that puts every image near a boundary."""

    def __init__(self, classes, seed=0):
        random = np.random.default_rng(seed)
        self.weights = random.normal(size=[PIXELS, classes]).astype(np.float32)
        self.bias = (-0.5 * self.weights.sum(axis=0) + random.normal(scale=0.1, size=classes)).astype(np.float32)
        self.label = tf.argmax(self.logits_fn(IMAGE), axis=1, output_type=tf.int32)

    def logits_fn(self, image):
        return tf.reshape(image, [-1, PIXELS]) @ self.weights + self.bias

    def distances(self, norm):
        """Return how far each image is from the boundary to each class, inside the box, float64 [batch, classes]."""
        logits, flat = self.logits_fn(IMAGE).numpy().astype(np.float64), IMAGE.numpy().reshape([BATCH, PIXELS])
        found = np.full(logits.shape, np.inf)
        for row, label in enumerate(self.label.numpy()):
            for other in set(range(logits.shape[1])) - {label}:
                slope = np.float64(self.weights[:, other] - self.weights[:, label])
                move = shortest(flat[row], slope, logits[row, label] - logits[row, other], norm)
                found[row, other] = np.inf if move is None else lengths(move[None], norm)[0]
        return found


def shortest(point, slope, gap, norm):
    """Return the shortest move within the box that gains `gap`, by linear programming or bisection, or None."""
    if norm == "linf":
        ones = np.ones([len(point), 1])
        bounds = [*zip(-point, 1 - point), (0, None)]
        either = np.block([[np.eye(len(point)), -ones], [-np.eye(len(point)), -ones]])
        cost, plane = np.eye(len(point) + 1)[-1], np.append(slope, 0)[None]
        found = scipy.optimize.linprog(cost, either, np.zeros(2 * len(point)), plane, [gap], bounds)
        return found.x[:-1] if found.success else None
    move = lambda multiplier: np.clip(multiplier * slope, -point, 1 - point)  # noqa: E731
    lead = lambda multiplier: move(multiplier) @ slope - gap  # noqa: E731
    return move(scipy.optimize.brentq(lead, -1e6, 1e6, xtol=1e-14)) if lead(-1e6) < 0 < lead(1e6) else None


def problem(seed, share, pixels=12, batch=6):
    """Return points, slopes and gaps that are `share` of what the whole box has to give."""
    random = np.random.default_rng(seed)
    point = np.clip(random.uniform(-0.3, 1.3, size=[batch, pixels]), 0, 1)
    slope = random.normal(size=point.shape) * (random.uniform(size=point.shape) < 0.9)
    sign = random.choice([-1, 1], size=batch)
    room = np.where(sign[:, None] * slope > 0, 1 - point, point)
    gap = share * sign * np.sum(np.abs(slope) * room, axis=1)
    return [tf.constant(each, tf.float32) for each in (point, slope, gap)]


# 13 FAB: projection
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.01, 0.3, 0.7, 0.95]), st.sampled_from(norms.NORMS))
def test_move_lands_on_the_plane_in_the_box_and_is_the_shortest(seed, share, norm):
    point, slope, gap = problem(seed, share)
    move = move_to_plane(point, slope, gap, norm=norm).numpy()
    landed = point + move
    assert np.min(landed) >= -1e-7 and np.max(landed) <= 1 + 1e-7
    assert (np.abs(np.sum(np.float64(slope) * move, axis=1) - gap) < 1e-4).all()
    best = [shortest(*row, norm) for row in zip(*(np.float64(each) for each in (point, slope, gap)))]
    np.testing.assert_allclose(lengths(move, norm), lengths(best, norm), rtol=1e-4, atol=1e-6)
    if norm == "l2":
        np.testing.assert_allclose(move, best, atol=1e-4)


# 13 FAB: projection
@given(st.integers(0, 2**32 - 1), st.sampled_from([1.01, 2.0, 1e6]), st.sampled_from(norms.NORMS))
def test_move_towards_a_plane_outside_the_box_goes_to_the_corner(seed, share, norm):
    point, slope, gap = problem(seed, share)
    move = move_to_plane(point, slope, gap, norm=norm)
    towards = tf.sign(gap)[:, None] * slope
    corner = tf.where(towards > 0, 1.0, tf.where(towards < 0, 0.0, point))
    np.testing.assert_allclose(point + move, corner, atol=1e-6)


# 13 FAB: projection
@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
@EVERY_NORM
def test_move_does_not_depend_on_the_scale_of_the_slope(norm, scale):
    point, slope, gap = problem(0, 0.4)
    move = move_to_plane(point, slope, gap, norm=norm)
    scaled = move_to_plane(point, np.float32(scale) * slope, np.float32(scale) * gap, norm=norm)
    np.testing.assert_allclose(scaled, move, atol=1e-5)


@EVERY_NORM
def test_move_of_many_pixels_of_all_magnitudes_lands(norm):
    random = np.random.default_rng(0)
    point = random.uniform(size=[8, 3072]) ** 8
    slope = random.normal(size=point.shape) * 10 ** random.uniform(-6, 0, size=point.shape)
    gap = np.linspace(0.01, 0.999, 8) * np.sum(np.abs(slope) * np.where(slope > 0, 1 - point, point), axis=1)
    point, slope, gap = (tf.constant(each, tf.float32) for each in (point, slope, gap))
    move = move_to_plane(point, slope, gap, norm=norm)
    gained = np.sum(np.float64(slope) * move, axis=1)
    np.testing.assert_allclose(gained, gap, rtol=1e-5)
    if norm == "l2":
        expected = [lengths(shortest(*map(np.float64, row), norm)[None], norm)[0] for row in zip(point, slope, gap)]
        np.testing.assert_allclose(lengths(move, norm), expected, rtol=1e-3)


@EVERY_NORM
def test_move_along_no_slope_or_for_no_gap_is_zero(norm):
    point, slope, gap = problem(0, 0.4)
    np.testing.assert_array_equal(move_to_plane(point, 0 * slope, gap, norm=norm), np.zeros(point.shape))
    np.testing.assert_array_equal(move_to_plane(point, slope, 0 * gap, norm=norm), np.zeros(point.shape))


@functools.cache
def nearest(norm, classes, targets=0):
    """Return a linear model, and what is found in a ball without limit: of the nearest class, or of each target."""
    linear = Linear(classes)
    attack = FAB(norm, 10.0, steps=8, targets=targets)
    ranked = ranked_targets(linear.logits_fn(IMAGE), linear.label, targets or 1)
    contexts = [{"label": linear.label, "target": target} for target in tf.unstack(ranked, axis=1)]
    return linear, [attack(linear.logits_fn, IMAGE, context, SEED) for context in contexts]


# 13 FAB: exact distance
@pytest.mark.parametrize("targets", [0, 1], ids=["untargeted", "targeted"])
@EVERY_NORM
def test_distance_is_exact_on_a_two_class_linear_model(norm, targets):
    linear, (result,) = nearest(norm, 2, targets)
    exact = linear.distances(norm).min(axis=1)
    assert np.isfinite(exact).all() and result.success.numpy().all()
    np.testing.assert_allclose(-result.loss, exact, rtol=0.01)
    np.testing.assert_allclose(-result.loss, lengths(result.image - IMAGE, norm), rtol=1e-5)
    assert (-result.loss.numpy() >= exact * (1 - 1e-4)).all()


# 13 FAB: targeted and untargeted
@EVERY_NORM
def test_targeted_and_untargeted_agree_on_two_classes(norm):
    (untargeted,), (targeted,) = nearest(norm, 2)[1], nearest(norm, 2, 1)[1]
    for first, second in zip(untargeted, targeted):
        np.testing.assert_allclose(first, second, atol=1e-5)


# 13 FAB: exact distance
@EVERY_NORM
def test_distance_of_several_classes_is_that_of_the_nearest_boundary(norm):
    linear, (untargeted,) = nearest(norm, 4)
    exact = linear.distances(norm).min(axis=1)
    targeted = np.min([-each.loss for each in nearest(norm, 4, 3)[1]], axis=0)
    np.testing.assert_allclose(targeted, exact, rtol=0.01)
    # Untargeted, the nearest class is chosen as if there were no box: here and there that is the second nearest.
    ratio = -untargeted.loss.numpy() / exact
    assert ratio.min() > 1 - 1e-4 and ratio.max() < 1.1 and np.median(ratio) < 1.01


@EVERY_NORM
def test_success_is_a_fooling_image_in_the_ball_and_else_the_image_is_given_back(norm):
    linear = Linear(3)
    exact = linear.distances(norm).min(axis=1)
    epsilon = float(np.median(exact))
    result = FAB(norm, epsilon, steps=10)(linear.logits_fn, IMAGE, linear.label, SEED)
    success = result.success.numpy()
    np.testing.assert_array_equal(success, misclassified(linear.logits_fn)(result.image, {"label": linear.label}))
    np.testing.assert_array_equal(result.image.numpy()[~success], IMAGE.numpy()[~success])
    assert success[exact < 0.97 * epsilon].all() and not success[exact > epsilon].any()
    assert (lengths(result.image - IMAGE, norm) <= epsilon * (1 + 1e-5) + 1e-7).all()
    assert (-result.loss.numpy()[~success] > epsilon).all() and 0 < success.mean() < 1
    np.testing.assert_allclose(-result.loss[success], lengths(result.image - IMAGE, norm)[success], rtol=1e-5)


class Smooth:
    """A small network of tanh units with three classes."""

    inner = tf.constant(_random.normal(size=[PIXELS, 10]), tf.float32)
    outer = tf.constant(_random.normal(size=[10, 3]), tf.float32)

    @classmethod
    def logits_fn(cls, image):
        return tf.tanh(2 * tf.reshape(image - 0.5, [-1, PIXELS]) @ cls.inner) @ cls.outer


LABEL = tf.argmax(Smooth.logits_fn(IMAGE), axis=1, output_type=tf.int32)
EPSILON = {"linf": 0.08, "l2": 0.25}


@pytest.mark.parametrize("targets", [0, 1], ids=["untargeted", "targeted"])
@EVERY_NORM
def test_distance_never_grows_and_every_point_is_in_the_box(norm, targets):
    attack = FAB(norm, EPSILON[norm], steps=12, targets=targets)
    context = {"label": LABEL, "target": ranked_targets(Smooth.logits_fn(IMAGE), LABEL, 1)[:, 0]}
    found = [attack.start(IMAGE, SEED)]
    np.testing.assert_array_equal(found[0].image, IMAGE)
    for _ in range(attack.passes):
        found.append(attack.step(Smooth.logits_fn, found[-1], IMAGE, context))
    assert (np.diff([state.distance for state in found], axis=0) <= 0).all()
    assert (np.diff([state.best.success for state in found], axis=0) >= 0).all()
    assert all(np.min(state.image) >= 0 and np.max(state.image) <= 1 for state in found)
    np.testing.assert_array_equal(found[-1].best.queries, [12] * BATCH)
    assert (found[-1].distance.numpy() < found[1].distance.numpy()).any()


def transcribed(norm, point, image, label, logits, slopes):
    """Return where FAB goes from a point, as the paper's algorithm 1 has it, for one flat image in NumPy."""
    lead, slope = logits - logits[label], slopes - slopes[label]
    others = [each for each in range(len(logits)) if each != label]
    chosen = min(others, key=lambda each: abs(lead[each]) / np.linalg.norm(slope[each], {"linf": 1, "l2": 2}[norm]))

    def move(start):
        gap = -lead[chosen] - slope[chosen] @ (start - point)
        sign = np.sign(gap) * np.sign(slope[chosen])
        room = np.where(sign > 0, 1 - start, start)
        found = shortest(start, slope[chosen], gap, norm)
        if found is None:
            return sign * room
        return sign * np.minimum(np.abs(found).max(), room) if norm == "linf" else found

    moves = [move(start) for start in (point, image)]
    here, back = np.maximum(lengths(moves, norm), 1e-8)
    share = min(here / (here + back), 0.1)
    return np.clip((1 - share) * (point + 1.05 * moves[0]) + share * (image + 1.05 * moves[1]), 0, 1)


# 7 goldens: an independent transcription
@EVERY_NORM
def test_step_matches_a_numpy_transcription(norm):
    attack, rows = FAB(norm, 10.0, steps=5), range(BATCH)
    state, fooled = attack.again(IMAGE, SEED), []
    for _ in range(attack.passes):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(state.image)
            logits = Smooth.logits_fn(state.image)
            columns = tf.unstack(logits, axis=1)
        slopes = np.stack([tape.gradient(column, state.image) for column in columns], axis=1)
        flat = [np.float64(each).reshape([BATCH, -1]) for each in (state.image, IMAGE)]
        slopes = np.float64(slopes).reshape([BATCH, len(columns), PIXELS])
        points = [
            transcribed(norm, *(each[row] for each in (*flat, LABEL, np.float64(logits), slopes))) for row in rows
        ]
        state = attack.step(Smooth.logits_fn, state, IMAGE, {"label": LABEL})
        margin = losses.margin(Smooth.logits_fn(np.float32(points).reshape(IMAGE.shape)), LABEL).numpy()
        fools, clear = margin > 0, np.abs(margin) > 1e-4
        expected = np.where(fools[:, None], flat[1] + 0.9 * (points - flat[1]), points).reshape(IMAGE.shape)
        np.testing.assert_allclose(state.image[clear], expected[clear], atol=2e-5)
        assert clear.sum() > BATCH / 2
        fooled.append(fools)
    assert 0.2 < np.mean(fooled) < 0.95


# 13 determinism and equivariance
@EVERY_NORM
def test_result_is_decided_by_seeds_and_not_by_the_place_in_the_batch(norm):
    attack = FAB(norm, EPSILON[norm], steps=5, restarts=2)

    def run(rows):
        image, label, seed = (tf.gather(each, rows) for each in (IMAGE, LABEL, SEED))
        return attack(Smooth.logits_fn, image, label, seed)

    whole = run(list(range(BATCH)))
    np.testing.assert_array_equal(run(list(range(BATCH))).image, whole.image)
    for rows in ([7, 2, 0, 1, 3, 5, 4, 6], [4]):
        for of_whole, of_part in zip(whole, run(rows)):
            np.testing.assert_allclose(of_part, of_whole.numpy()[rows], rtol=1e-4, atol=1e-5)


# 13 nested seeds
@EVERY_NORM
def test_more_restarts_only_shrink_the_robust_set_and_the_distance(norm):
    one, three = (
        FAB(norm, EPSILON[norm], steps=3, restarts=count)(Smooth.logits_fn, IMAGE, LABEL, SEED) for count in (1, 3)
    )
    assert (three.success.numpy() >= one.success.numpy()).all()
    both = one.success.numpy() == three.success.numpy()
    assert (three.loss.numpy()[both] >= one.loss.numpy()[both]).all()
    np.testing.assert_array_equal(three.queries, [9] * BATCH)


@EVERY_NORM
def test_restart_begins_at_half_the_radius(norm):
    gray = tf.fill(IMAGE.shape, 0.5)
    state = FAB(norm, 0.2).again(gray, SEED)
    np.testing.assert_allclose(lengths(state.image - gray, norm), 0.1, rtol=1e-5)
    np.testing.assert_array_equal(state.best.image, gray)


# 13 constant model
@pytest.mark.parametrize("targets", [0, 1], ids=["untargeted", "targeted"])
@pytest.mark.parametrize(
    "constant",
    [lambda image: 0 * Smooth.logits_fn(image), lambda image: tf.zeros([tf.shape(image)[0], 3])],
    ids=["zero_gradient", "no_gradient"],
)
@EVERY_NORM
def test_constant_model_gives_no_nan(norm, constant, targets):
    context = {"label": tf.zeros_like(LABEL), "target": tf.ones_like(LABEL)}
    result = FAB(norm, 0.1, steps=3, targets=targets)(constant, IMAGE, context, SEED)
    np.testing.assert_array_equal(result.image, IMAGE)
    assert not result.success.numpy().any() and not np.isnan(result.loss).any()


@pytest.mark.parametrize("dtype", [tf.float16, tf.float64])
@pytest.mark.parametrize("targets", [0, 1], ids=["untargeted", "targeted"])
def test_logits_of_other_precision_are_taken(dtype, targets):
    context = {"label": LABEL, "target": ranked_targets(Smooth.logits_fn(IMAGE), LABEL, 1)[:, 0]}
    attack, logits_fn = FAB("l2", 5.0, steps=2, targets=targets), Smooth.logits_fn
    result = attack(lambda image: tf.cast(logits_fn(image), dtype), IMAGE, context, SEED)
    assert result.loss.dtype == tf.float32
    np.testing.assert_array_equal(result.success, attack(logits_fn, IMAGE, context, SEED).success)
    assert result.success.numpy().any()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"norm": "l1"}, "unknown norm 'l1'; valid: linf, l2"),
        ({"epsilon": -1.0}, "epsilon must be a finite number of at least 0"),
        ({"steps": 0}, "steps and restarts must be at least 1 and targets at least 0, not 0, 1 and 0"),
        ({"restarts": 0}, "steps and restarts must be at least 1 and targets at least 0, not 100, 0 and 0"),
        ({"targets": -1}, "steps and restarts must be at least 1 and targets at least 0, not 100, 1 and -1"),
        (
            {"alpha_max": 1.1},
            r"alpha_max must be in \[0, 1\], eta at least 1 and beta in \(0, 1\), not 1.1, 1.05 and 0.9",
        ),
        ({"eta": 0.9}, "eta at least 1"),
        ({"beta": 1.0}, r"beta in \(0, 1\)"),
        ({"beta": float("nan")}, r"beta in \(0, 1\)"),
    ],
)
def test_fab_refuses_illegal_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        FAB(**settings)
