from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import losses
from kerasdefense.attacks import DeepFool, norms
from kerasdefense.types import UsageError

EVERY_NORM = pytest.mark.parametrize("norm", norms.NORMS)


class Linear:
    """A linear classifier of gray 4x4 images far from the box, and what it says of them."""

    def __init__(self, classes=2, batch=8, scale=1.0):
        random = np.random.default_rng(0)
        self.weights = (scale * random.normal(size=[16, classes]) * np.linspace(0.5, 2, classes)).astype(np.float32)
        self.image = random.uniform(0.3, 0.7, size=[batch, 4, 4, 1]).astype(np.float32)
        self.label = np.argmax(self.logits_fn(self.image), axis=1).astype(np.int32)

    def logits_fn(self, image):
        return tf.reshape(image - 0.5, [-1, 16]) @ self.weights

    def run(self, attack):
        return attack(self.logits_fn, self.image, self.label, tf.zeros([len(self.label), 2], tf.int32))

    def distance(self, norm, rival):
        """Return how far the boundary to the class `rival` [batch] is."""
        slope = self.weights[:, rival] - self.weights[:, self.label]
        lead = np.sum(np.reshape(self.image - 0.5, [-1, 16]).T * slope, axis=0)
        return np.abs(lead) / (np.abs(slope).sum(axis=0) if norm == "linf" else np.linalg.norm(slope, axis=0))


@EVERY_NORM
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_distance_to_a_linear_boundary_is_exact_but_for_the_overshoot(norm, scale):
    linear = Linear(scale=scale)
    result = linear.run(DeepFool(norm, 10.0, steps=3))
    exact = linear.distance(norm, 1 - linear.label)
    length = norms.length(result.image - linear.image, norm).numpy()
    assert result.success.numpy().all()
    assert (length > exact).all() and (length < 1.03 * exact + 2e-4).all()
    np.testing.assert_allclose(length, 1.02 * (exact + 1e-4), rtol=1e-3)


@EVERY_NORM
def test_nearest_of_several_linear_boundaries_is_taken_among_the_likeliest_classes(norm):
    linear = Linear(classes=6)
    rivals = np.stack([np.argsort(-row)[1:] for row in linear.logits_fn(linear.image).numpy()])
    every = np.stack([linear.distance(norm, rival) for rival in rivals.T])
    assert (every.argmin(axis=0) > 0).any()
    for classes, nearest in ((2, every[0]), (4, every[:3].min(axis=0)), (10, every.min(axis=0))):
        result = linear.run(DeepFool(norm, 10.0, steps=1, classes=classes))
        length = norms.length(result.image - linear.image, norm).numpy()
        np.testing.assert_allclose(length, 1.02 * (nearest + 1e-4), rtol=1e-3)


@EVERY_NORM
def test_distances_equal_foolboxs(norm, trained):
    foolbox = pytest.importorskip("kerasdefense.attacks.foolbox")._import_foolbox()
    image, label = trained.image[:16], trained.label[:16]
    kind = {"l2": foolbox.attacks.L2DeepFoolAttack, "linf": foolbox.attacks.LinfDeepFoolAttack}[norm]
    model = foolbox.TensorFlowModel(trained.logits_fn, bounds=(0, 1), device="/CPU:0")
    reference = kind(steps=12, candidates=4, overshoot=0.02, loss="logits").run(
        model, image, foolbox.Misclassification(tf.cast(label, tf.int64))
    )
    result = DeepFool(norm, 8.0, steps=12, classes=4)(trained.logits_fn, image, label, tf.zeros([16, 2], tf.int32))
    assert result.success.numpy().all()
    expected = norms.length(reference - image, norm)
    np.testing.assert_allclose(norms.length(result.image - image, norm), expected, rtol=0.01)


@EVERY_NORM
def test_what_lies_outside_the_ball_is_no_success_and_gives_back_the_image(norm):
    linear = Linear(classes=3)
    far = linear.run(DeepFool(norm, 10.0, steps=3))
    length = norms.length(far.image - linear.image, norm).numpy()
    epsilon = float(np.median(length))
    result = linear.run(DeepFool(norm, epsilon, steps=3))
    inside = length <= epsilon
    assert 0 < inside.sum() < len(inside)
    np.testing.assert_array_equal(result.success, inside)
    np.testing.assert_array_equal(result.image, np.where(inside[:, None, None, None], far.image, linear.image))
    np.testing.assert_allclose(result.loss, losses.margin(linear.logits_fn(result.image), linear.label), atol=1e-6)


@EVERY_NORM
def test_misclassified_image_is_a_success_as_it_is(norm):
    linear = Linear(classes=3)
    linear.label = (linear.label + 1) % 3
    result = linear.run(DeepFool(norm, 0.1, steps=2))
    assert result.success.numpy().all()
    np.testing.assert_array_equal(result.image, linear.image)


def test_compiled_steps_give_what_a_call_gives():
    linear, attack = Linear(classes=4), DeepFool("l2", 0.1, steps=3)
    step = tf.function(lambda state: attack.step(linear.logits_fn, state, linear.image, {"label": linear.label}, None))
    state = attack.start(tf.constant(linear.image), tf.zeros([8, 2], tf.int32))
    for _ in range(attack.passes):
        state = step(state)
    called = linear.run(attack)
    np.testing.assert_array_equal(state.best.success, called.success)
    np.testing.assert_allclose(state.best.image, called.image, rtol=0, atol=1e-5)
    assert (called.queries.numpy() == attack.passes).all() and 0 < called.success.numpy().mean() < 1


@EVERY_NORM
@pytest.mark.parametrize(
    "constant",
    [lambda image: 0 * tf.reshape(image, [-1, 16])[:, :3], lambda image: tf.one_hot(tf.zeros(len(image), tf.int32), 3)],
    ids=["zero_gradient", "no_gradient"],
)
def test_constant_model_gives_back_the_image(norm, constant):
    linear = Linear()
    result = DeepFool(norm, 1.0, steps=2)(constant, linear.image, 0 * linear.label, tf.zeros([8, 2], tf.int32))
    np.testing.assert_array_equal(result.image, linear.image)
    assert not result.success.numpy().any()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"steps": 0}, "steps must be at least 1 and classes at least 2, not 0 and 10"),
        ({"classes": 1}, "steps must be at least 1 and classes at least 2, not 50 and 1"),
        ({"overshoot": -0.1}, "overshoot must be a finite number of at least 0, not -0.1"),
        ({"overshoot": float("inf")}, "overshoot must be a finite number of at least 0"),
    ],
)
def test_deepfool_refuses_illegal_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        DeepFool(**settings)
