from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import losses
from kerasdefense.attacks import OBJECTIVES, PGD, check_logits, hit_target, misclassified, seeds, share_pass
from kerasdefense.types import InputError

LOGITS = tf.constant([[3.0, 1, 0], [0, 1, 4], [2, 5, 1], [0, 0, 9]])
LABEL = tf.constant([0, 1, 1, 0])
TARGET = tf.constant([1, 2, 0, 1])


def as_image(logits):
    return tf.reshape(logits, [-1, 1, 1, 3])


def logits_fn(image):
    return tf.reshape(image, [-1, 3])


CONTEXT = {"label": LABEL, "target": TARGET, "logits": tf.reverse(LOGITS, [0])}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("cross_entropy", losses.cross_entropy(LOGITS, LABEL)),
        ("kl_divergence", losses.kl_divergence(tf.reverse(LOGITS, [0]), LOGITS)),
        ("margin", tf.constant([-2.0, 3, -3, 9])),
        ("targeted_cross_entropy", tf.gather(tf.nn.log_softmax(LOGITS), TARGET, batch_dims=1)),
    ],
)
def test_objective_is_its_loss_on_the_context(name, expected):
    np.testing.assert_allclose(OBJECTIVES[name](logits_fn)(as_image(LOGITS), CONTEXT), expected, rtol=1e-6)


def test_objectives_are_all_tested():
    assert set(OBJECTIVES) == {"cross_entropy", "kl_divergence", "margin", "targeted_cross_entropy"}


def test_misclassified_and_hit_target_by_hand():
    np.testing.assert_array_equal(misclassified(logits_fn)(as_image(LOGITS), CONTEXT), [False, True, False, True])
    np.testing.assert_array_equal(hit_target(logits_fn)(as_image(LOGITS), CONTEXT), [False, True, False, False])


def test_kl_objective_moves_the_prediction_without_a_label(trained):
    clean = trained.logits_fn(trained.image)
    seed = seeds.per_example(0, 0, tf.range(len(trained.label)))
    loss_fn = OBJECTIVES["kl_divergence"](trained.logits_fn)
    result = PGD("linf", 0.15, steps=5)(loss_fn, trained.image, {"logits": clean}, seed)
    moved = tf.argmax(trained.logits_fn(result.image), axis=1) != tf.argmax(clean, axis=1)
    assert result.loss.numpy().min() > 0 and moved.numpy().mean() > 0.3


def test_share_pass_computes_a_tensor_once_and_any_other_anew():
    calls = []

    def path(image, seed):
        calls.append(image)
        return logits_fn(image)

    shared, first, second = share_pass(path), as_image(LOGITS), as_image(2 * LOGITS)
    np.testing.assert_array_equal(shared(first, None), LOGITS)
    assert shared(first, None) is shared(first, None) and len(calls) == 1
    np.testing.assert_array_equal(shared(second, None), 2 * LOGITS)
    np.testing.assert_array_equal(shared(first, None), LOGITS)
    assert len(calls) == 3


@pytest.mark.parametrize(
    "logits",
    [LOGITS, tf.nn.log_softmax(LOGITS), tf.sigmoid(LOGITS), tf.zeros([4, 3]), -tf.nn.softmax(LOGITS)],
    ids=["logits", "log_probabilities", "sigmoids", "zeros", "negative"],
)
def test_logits_are_accepted(logits):
    check_logits(logits)


@pytest.mark.parametrize(
    "output, message",
    [
        (tf.nn.softmax(LOGITS), "the classifier returns probabilities; an attack needs logits"),
        (tf.one_hot(LABEL, 3), "the classifier returns probabilities"),
        (tf.constant([[1.0, float("nan")]]), "NaN or infinite logits"),
        (tf.constant([[1.0, float("inf")]]), "NaN or infinite logits"),
        (tf.zeros([4]), r"logits of shape \[batch, classes >= 2\], not \(4,\)"),
        (tf.zeros([4, 1]), r"logits of shape \[batch, classes >= 2\], not \(4, 1\)"),
        (tf.zeros([4, 2, 2, 3]), r"logits of shape \[batch, classes >= 2\], not \(4, 2, 2, 3\)"),
        ({"logits": LOGITS}, r"logits of shape \[batch, classes >= 2\], not a dict"),
    ],
)
def test_outputs_that_are_no_logits_are_refused(output, message):
    with pytest.raises(InputError, match=message):
        check_logits(output)
