"""The paths by which a classifier behind a purifier is attacked: true gradients, a stand-in, and none at all."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from kerasdefense.attacks import seeds
from kerasdefense.defenses.purifying import purified_paths

BATCH, CLASSES = 3, 4
IMAGE = tf.constant(np.random.default_rng(0).uniform(size=(BATCH, 4, 4, 1)), tf.float32)
WEIGHTS = tf.constant(np.random.default_rng(1).normal(size=(16, CLASSES)), tf.float32)
SEED = seeds.per_example(0, 0, tf.range(BATCH))


def logits_fn(image):
    return tf.sin(tf.reshape(image, [-1, 16])) @ WEIGHTS


def purify(image, seed):
    """Lay noise drawn by the seed over brightened images, so that some are clipped."""
    noise = seeds.uniform(seed, tf.zeros_like(seed[:, 0]), 16)
    return tf.clip_by_value(2 * image - 0.5 + 0.1 * tf.reshape(noise, tf.shape(image)), 0, 1)


def with_gradient(path, image):
    with tf.GradientTape() as tape:
        tape.watch(image)
        logits = path(image)
    return logits, tape.gradient(logits, image)


# CAFD 15: true gradients of the whole path
def test_exact_path_has_the_gradient_of_the_whole():
    path = purified_paths(logits_fn, purify)["exact"]
    logits, gradient = with_gradient(lambda image: path(image, SEED), IMAGE)
    purified = purify(IMAGE, SEED)
    expected, of_classifier = with_gradient(logits_fn, purified)
    np.testing.assert_array_equal(logits, expected)
    is_inside = (purified.numpy() > 0) & (purified.numpy() < 1)
    assert 0.2 < is_inside.mean() < 0.9
    np.testing.assert_allclose(gradient, np.where(is_inside, 2 * of_classifier, 0), atol=1e-6)


# CAFD 15: the same logits, with the gradient of the classifier at the purified image
def test_stand_in_has_the_same_logits_and_the_gradient_of_the_classifier():
    path = purified_paths(logits_fn, purify)["bpda_identity"]
    logits, gradient = with_gradient(lambda image: path(image, SEED), IMAGE)
    expected, of_classifier = with_gradient(logits_fn, purify(IMAGE, SEED))
    np.testing.assert_array_equal(logits, expected)
    np.testing.assert_array_equal(gradient, of_classifier)
    assert np.abs(of_classifier - with_gradient(logits_fn, IMAGE)[1]).max() > 0.1


def test_oblivious_path_is_the_classifier_alone():
    path = purified_paths(logits_fn, purify)["oblivious"]
    for found, expected in zip(with_gradient(lambda image: path(image, SEED), IMAGE), with_gradient(logits_fn, IMAGE)):
        np.testing.assert_array_equal(found, expected)


def test_purifier_without_a_gradient_is_attacked_by_its_stand_in():
    def rounded(image, seed):
        return tf.round(4 * image) / 4

    assert list(purified_paths(logits_fn, rounded)) == ["exact", "bpda_identity", "oblivious"]
    paths = purified_paths(logits_fn, rounded, is_differentiable=False)
    assert list(paths) == ["exact", "oblivious"]
    found = with_gradient(lambda image: paths["exact"](image, SEED), IMAGE)
    for one, two in zip(found, with_gradient(logits_fn, rounded(IMAGE, SEED))):
        np.testing.assert_array_equal(one, two)
    assert np.abs(found[1]).max() > 0
