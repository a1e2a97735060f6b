"""CAFA: the acceptance properties of its specification, on class activation features of a small network."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import backbones, losses
from kerasdefense.attacks import CAFA, OBJECTIVES, norms, seeds
from kerasdefense.types import UsageError

SHAPE, CLASSES, BATCH, EPSILON = (8, 8, 1), 4, 6, 0.1
SEED = seeds.per_example(0, 0, tf.range(BATCH))


@pytest.fixture(scope="module")
def classifier():
    keras.utils.set_random_seed(2)
    return backbones.small_cnn(SHAPE, CLASSES, width=4)


@pytest.fixture(scope="module")
def image():
    return tf.constant(np.random.default_rng(3).uniform(-0.2, 1.2, (BATCH, *SHAPE)).clip(0, 1), tf.float32)


def features_fn(classifier, legacy_cam=False):
    def features(image):
        outputs = classifier(image, training=False)
        kernel = backbones.last_kernel(classifier)
        found = losses.class_activation_features(outputs["feature_map"], outputs["logits"], kernel)
        return losses.released_maps(found, SHAPE[:2]) if legacy_cam else found

    return features


def attack(classifier, image, seed=SEED, *, legacy_cam=False, **settings):
    features = features_fn(classifier, legacy_cam)
    found = CAFA(**{"epsilon": EPSILON, "steps": 3, **settings})
    return found(OBJECTIVES["class_activation"](features), image, {"reference": features(image)}, seed)


# CAFD 3: it stays in ball and box, goes away from the features and changes no variable
def test_attack_stays_in_the_ball_and_the_box_and_changes_no_variable(classifier, image):
    before = classifier.get_weights()
    for norm, epsilon in (("linf", EPSILON), ("l2", 1.0)):
        result = attack(classifier, image, norm=norm, epsilon=epsilon, step_size=0.4 * epsilon)
        assert (norms.length(result.image - image, norm) <= epsilon + 1e-6).numpy().all()
        assert 0 <= np.min(result.image) <= np.max(result.image) <= 1
        start = attack(classifier, image, norm=norm, epsilon=epsilon, steps=0)
        assert (result.loss > start.loss).numpy().all()
    for one, two in zip(before, classifier.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


# CAFD 4: at the clean image there is no gradient, so that a start elsewhere is a must
def test_attack_needs_a_random_start(classifier, image):
    with pytest.raises(
        UsageError, match=r"^cafa needs a random start: at the clean image the gradient of its distance"
    ):
        CAFA(random_start=False)
    features = features_fn(classifier)
    with tf.GradientTape() as tape:
        tape.watch(image)
        loss = OBJECTIVES["class_activation"](features)(image, {"reference": tf.stop_gradient(features(image))})
    np.testing.assert_array_equal(loss, np.zeros(BATCH))
    np.testing.assert_array_equal(tape.gradient(loss, image), tf.zeros_like(image))
    assert (np.abs(attack(classifier, image).image - image).max(axis=(1, 2, 3)) > EPSILON / 2).all()


# CAFD 5: images of a batch do not depend on each other, but do with the authors' maps
def test_attack_looks_at_each_image_alone(classifier, image):
    def alone(**settings):
        return attack(classifier, image[2:3], SEED[2:3], **settings).image

    np.testing.assert_allclose(alone(), attack(classifier, image).image[2:3], atol=1e-6)
    together = attack(classifier, image, legacy_cam=True).image[2:3]
    assert np.mean(np.abs(alone(legacy_cam=True) - together) > 1e-6) > 0.05


# CAFD 6: nothing to do, nothing left to chance
def test_attack_of_radius_zero_equal_seeds_and_no_steps(classifier, image):
    np.testing.assert_array_equal(attack(classifier, image, epsilon=0.0).image, image)
    first = attack(classifier, image).image
    np.testing.assert_array_equal(attack(classifier, image).image, first)
    other = attack(classifier, image, seeds.per_example(1, 0, tf.range(BATCH))).image
    assert np.abs(other - first).max() > EPSILON / 2
    start = norms.random_point(image, epsilon=EPSILON, norm="linf", seed=SEED)
    np.testing.assert_array_equal(attack(classifier, image, steps=0).image, start)


def test_steps_follow_the_gradient_of_the_distance(classifier, image):
    features = features_fn(classifier)
    reference = features(image)
    found = norms.random_point(image, epsilon=EPSILON, norm="linf", seed=SEED)
    for _ in range(3):
        with tf.GradientTape() as tape:
            tape.watch(found)
            distance = tf.reduce_sum((features(found) - reference) ** 2)
        stepped = found + 0.01 * EPSILON / (8 / 255) * tf.sign(tape.gradient(distance, found))
        found = tf.clip_by_value(tf.clip_by_value(stepped, image - EPSILON, image + EPSILON), 0, 1)
    result = attack(classifier, image)
    np.testing.assert_allclose(result.image, found, atol=1e-5)
    expected = tf.reduce_sum((features(result.image) - reference) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(result.loss, expected, rtol=1e-5)


def test_defaults_are_those_of_the_specification():
    found = CAFA()
    assert (found.steps, found.length, found.random_start, found.keep, found.restarts) == (40, 0.01, True, "last", 1)
    with pytest.raises(UsageError, match="steps and restarts must be at least 0 and 1, not -1 and 1"):
        CAFA(steps=-1)
