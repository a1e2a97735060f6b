"""The head of frozen orthonormal axes: the acceptance properties of DFA's specification, precision, errors."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import scipy.special
import tensorflow as tf

from kerasdefense.layers import OrthogonalHead
from kerasdefense.types import UsageError

DIMENSIONS, CLASSES = 12, 5
EMBEDDING = np.random.default_rng(0).normal(size=(64, DIMENSIONS)).astype("float32")


def built(classes=CLASSES, dimensions=DIMENSIONS, **settings):
    head = OrthogonalHead(classes, **{"seed": 0, **settings})
    head.build(tf.TensorShape([None, dimensions]))
    return head


# dfa 1: orthonormal axes, by the seed
@pytest.mark.parametrize(("classes", "dimensions"), [(10, 640), (100, 640), (20, 64), (5, 5)])
def test_axes_are_orthonormal(classes, dimensions):
    kernel = built(classes, dimensions).kernel.numpy()
    assert kernel.shape == (dimensions, classes)
    np.testing.assert_allclose(kernel.T @ kernel, np.eye(classes), atol=1e-5)


def test_axes_are_drawn_by_the_seed():
    np.testing.assert_array_equal(built(seed=7).kernel, built(seed=7).kernel)
    assert np.abs(built(seed=7).kernel - built(seed=8).kernel).max() > 0.1
    assert np.abs(built(seed=None).kernel - built(seed=None).kernel).max() > 0.1


def test_more_classes_than_dimensions_are_refused():
    message = "an axis for each of 13 classes, but the embedding has only 12 dimensions; use a wider backbone"
    with pytest.raises(UsageError, match=message):
        built(13)


# dfa 2: nothing of it is trained, and no gradient reaches it
def test_axes_are_not_trained():
    head = built()
    assert head.trainable_variables == [] and len(head.non_trainable_variables) == 1


# dfa 3: the range of logits, and the embeddings on an axis
def test_logits_are_absolute_cosines():
    logits = built()(EMBEDDING).numpy()
    expected = np.abs(EMBEDDING @ built().kernel.numpy()) / np.linalg.norm(EMBEDDING, axis=1, keepdims=True)
    np.testing.assert_allclose(logits, expected, atol=1e-6)
    assert logits.min() >= 0 and logits.max() <= 1 + 1e-6
    assert np.sum(logits**2, axis=1).max() <= 1 + 1e-5


def test_squares_of_logits_add_up_to_one_where_axes_span_the_space():
    logits = built(DIMENSIONS)(EMBEDDING).numpy()
    np.testing.assert_allclose(np.sum(logits**2, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("scale", [-300.0, -1.0, 1e-3, 5.0])
def test_embedding_on_an_axis_has_one_hot_logits(scale):
    head = built()
    np.testing.assert_allclose(head(scale * tf.transpose(head.kernel)), np.eye(CLASSES), atol=1e-5)


# dfa 4: neither sign nor length count, and zero has no direction
@pytest.mark.parametrize("factor", [-1.0, 7.0])
def test_logits_do_not_depend_on_sign_and_length(factor):
    np.testing.assert_allclose(built()(factor * EMBEDDING), built()(EMBEDDING), atol=1e-6)


def test_embedding_of_zero_has_finite_logits_and_gradients():
    head, embedding = built(), tf.zeros([2, DIMENSIONS])
    with tf.GradientTape() as tape:
        tape.watch(embedding)
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits([0, 1], head(embedding))
    np.testing.assert_array_equal(head(embedding), np.zeros([2, CLASSES]))
    assert np.isfinite(tape.gradient(loss, embedding)).all()


# dfa 5: how sure of itself it can be at most
def test_highest_probability_of_ten_classes_is_low():
    head = built(10)
    probability = scipy.special.softmax(head(tf.transpose(head.kernel)), axis=1)
    np.testing.assert_allclose(np.diag(probability), 0.23197, atol=1e-5)
    assert np.max(probability) == pytest.approx(np.e / (np.e + 9), abs=1e-5)


def test_logits_are_the_sizes_of_signed_scores():
    head = built()
    direction = head.direction(EMBEDDING)
    np.testing.assert_allclose(np.linalg.norm(direction, axis=1), 1, atol=1e-5)
    scores = head.signed_scores(direction).numpy()
    assert scores.min() < 0 < scores.max()
    np.testing.assert_array_equal(head(EMBEDDING), np.abs(scores))
    np.testing.assert_array_equal(head.logits_of(direction), np.abs(scores))
    np.testing.assert_array_equal(built(use_abs=False)(EMBEDDING), scores)


def test_logits_of_a_mixture_are_not_divided_by_its_length():
    head = built()
    np.testing.assert_allclose(head.logits_of(head.direction(EMBEDDING) / 2), head(EMBEDDING) / 2, atol=1e-6)


def test_gain_is_the_length_of_the_axes():
    kernel = built(gain=3.0).kernel.numpy()
    np.testing.assert_allclose(kernel.T @ kernel, 9 * np.eye(CLASSES), atol=1e-4)
    np.testing.assert_allclose(built(gain=3.0)(EMBEDDING), 3 * built()(EMBEDDING), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_it_computes_in_float32_under_any_policy(policy):
    embedding = tf.cast(300 * EMBEDDING, policy.removeprefix("mixed_"))  # squares of these overflow in float16
    keras.mixed_precision.set_global_policy(policy)
    try:
        head = OrthogonalHead(CLASSES, seed=0)
        logits = head(embedding)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert logits.dtype == head.kernel.dtype == tf.float32
    np.testing.assert_array_equal(logits, built()(tf.cast(embedding, tf.float32)))


def test_it_comes_back_from_its_config():
    head = OrthogonalHead(CLASSES, gain=2.0, use_abs=False, seed=4, name="axes")
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(head))
    assert again.get_config() == head.get_config() and again.name == "axes"
    np.testing.assert_array_equal(again(EMBEDDING), head(EMBEDDING))


@pytest.mark.parametrize(
    ("classes", "settings", "message"),
    [
        (1, {}, "a classifier needs at least 2 classes, not 1"),
        (2, {"gain": 0.0}, "gain must be above 0, not 0.0"),
        (2, {"gain": float("nan")}, "gain must be above 0, not nan"),
    ],
)
def test_orthogonal_head_refuses(classes, settings, message):
    with pytest.raises(UsageError, match=f"^{message}$"):
        OrthogonalHead(classes, **settings)
