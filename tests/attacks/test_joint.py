"""The joint attack: two objectives on linear functions, where the outcome can be worked out."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense.attacks import JointPGD, Pair, norms, seeds
from kerasdefense.attacks.joint import without
from kerasdefense.types import UsageError

EPSILON = 0.1
RANDOM = np.random.default_rng(3)
IMAGE = RANDOM.uniform(0.3, 0.7, [4, 6, 6, 1]).astype(np.float32)
FIRST, SECOND = RANDOM.normal(size=[2, 6, 6, 1]).astype(np.float32)
SEED = seeds.per_example(0, 0, tf.range(4))


def linear(image, context):
    """Return two linear objectives, less what `context` asks of the first; both are 0 at most at the clean image."""
    first = tf.reduce_sum((image - IMAGE[0]) * FIRST, axis=[1, 2, 3]) - context["needed"]
    return Pair(first, tf.reduce_sum((image - IMAGE[0]) * SECOND, axis=[1, 2, 3]))


def run(attack, needed, image=IMAGE[:1], fn=linear):
    return attack(fn, image, {"needed": tf.constant([needed] * len(image), tf.float32)}, SEED[: len(image)])


@pytest.mark.parametrize("shape", [[3, 5, 5, 2], [3, 7]])
def test_orthogonal_gradient_has_no_component_along_the_other(shape):
    """evaluation 13: |<g_d', g_c>| < 1e-5 |g_d'| |g_c|, also for gradients whose squares vanish in float32."""
    gradient, other = RANDOM.normal(size=[2, *shape]).astype(np.float32)
    for scale in (1.0, 1e-25):
        left = without(gradient, other * np.float32(scale)).numpy().reshape(3, -1).astype(np.float64)
        flat = other.reshape(3, -1).astype(np.float64)
        product = np.abs((left * flat).sum(axis=1))
        assert (product < 1e-5 * np.linalg.norm(left, axis=1) * np.linalg.norm(flat, axis=1)).all()
        kept = (
            gradient.reshape(3, -1)
            - (gradient.reshape(3, -1) * flat).sum(1, keepdims=True) / (flat**2).sum(1, keepdims=True) * flat
        )
        np.testing.assert_allclose(left, kept, atol=1e-5)


def test_orthogonal_gradient_is_untouched_where_the_other_is_zero():
    gradient = RANDOM.normal(size=[2, 4]).astype(np.float32)
    np.testing.assert_array_equal(without(gradient, np.zeros_like(gradient)), gradient)


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_joint_attack_reaches_the_first_objective_and_then_raises_the_second(norm, orthogonal):
    attack = JointPGD(norm, EPSILON, steps=60, orthogonal=orthogonal, slack=0.01)
    reachable = EPSILON * (np.abs(FIRST).sum() if norm == "linf" else np.linalg.norm(FIRST))
    result = run(attack, 0.3 * reachable)
    first, second = linear(result.image, {"needed": 0.3 * reachable})
    assert bool(result.success[0]) and float(first[0]) > 0
    assert float(result.loss[0]) == pytest.approx(float(second[0]), abs=1e-4)
    alone = run(JointPGD(norm, EPSILON, steps=60, orthogonal=orthogonal, slack=1e6), 0.3 * reachable)
    assert float(result.loss[0]) > float(linear(alone.image, {"needed": 0.0}).second[0])  # for the first alone


def test_joint_attack_keeps_the_highest_second_objective_among_those_that_reach_the_first():
    seen = []

    def watched(image, context):
        pair = linear(image, context)
        seen.append((float(pair.first[0]), float(pair.second[0])))
        return pair

    attack, context = JointPGD(epsilon=EPSILON, steps=12), {"needed": tf.constant([0.2])}
    state = attack.start(tf.constant(IMAGE[:1]), SEED[:1])
    for _ in range(attack.passes):
        state = attack.step(watched, state, tf.constant(IMAGE[:1]), context)
    assert any(first <= 0 for first, _ in seen) and any(first > 0 for first, _ in seen)
    assert float(state.best.loss[0]) == max(second for first, second in seen if first > 0)


def test_joint_attack_without_success_returns_the_image():
    result = run(JointPGD(epsilon=EPSILON, steps=5, restarts=2), 1e3)
    assert not result.success.numpy().any()
    assert result.loss.numpy() == -np.inf
    np.testing.assert_array_equal(result.image, IMAGE[:1])
    assert result.queries.numpy() == 12


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_joint_attack_stays_in_ball_and_box(norm):
    image = np.clip(IMAGE * 3 - 1, 0, 1).astype(np.float32)

    def fn(each, _):
        return Pair(tf.reduce_sum(each * FIRST, axis=[1, 2, 3]) + 100, tf.reduce_sum(each * SECOND, axis=[1, 2, 3]))

    result = JointPGD(norm, EPSILON, steps=9, restarts=3)(fn, image, {"label": np.zeros(4, np.int32)}, SEED)
    assert (norms.length(result.image - image, norm).numpy() <= EPSILON * (1 + 1e-5) + 1e-7).all()
    assert result.image.numpy().min() >= 0 and result.image.numpy().max() <= 1


def test_joint_attack_at_radius_zero_returns_the_image():
    result = run(JointPGD(epsilon=0.0, steps=3, restarts=2), -1.0)
    np.testing.assert_array_equal(result.image, IMAGE[:1])
    assert result.success.numpy().all()


def test_joint_attack_survives_serialisation():
    attack = JointPGD("l2", 0.5, steps=7, orthogonal=False, slack=0.1, restarts=2)
    assert keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(attack)) == attack


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"steps": 0}, "steps and restarts"),
        ({"restarts": 0}, "steps and restarts"),
        ({"step_size": 0.0}, "step_size"),
        ({"slack": -0.1}, "slack"),
    ],
)
def test_joint_attack_refuses_settings(settings, words):
    with pytest.raises(UsageError, match=words):
        JointPGD(**settings)
