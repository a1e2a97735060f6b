from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import losses
from kerasdefense.attacks import (
    FEATURE_DISTANCE,
    OBJECTIVES,
    PGD,
    TARGETED,
    check_logits,
    hit_target,
    misclassified,
    ranked_targets,
    seeds,
    share_pass,
)
from kerasdefense.attacks.objectives import matching
from kerasdefense.attacks.wrappers import smooth_abs
from kerasdefense.types import InputError

LOGITS = tf.constant([[3.0, 1, 0, -1], [0, 1, 4, 2], [2, 5, 1, 0], [0, 0, 9, 1]])
LABEL = tf.constant([0, 1, 1, 0])
TARGET = tf.constant([1, 2, 0, 1])


def as_image(logits):
    return tf.reshape(logits, [-1, 1, 1, 4])


def logits_fn(image):
    return tf.reshape(image, [-1, 4])


REFERENCE = tf.reverse(LOGITS, [0])
CONTEXT = {"label": LABEL, "target": TARGET, "logits": REFERENCE, "reference": REFERENCE}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("cross_entropy", losses.cross_entropy(LOGITS, LABEL)),
        ("cross_entropy_x10", losses.cross_entropy(10 * LOGITS, LABEL)),
        ("cross_entropy_x50", losses.cross_entropy(50 * LOGITS, LABEL)),
        ("dlr", losses.dlr(LOGITS, LABEL)),
        ("feature_matching", tf.constant([902**-0.5, 9 * 630**-0.5, 9 * 630**-0.5, 902**-0.5]) - 1),
        ("kl_divergence", losses.kl_divergence(REFERENCE, LOGITS)),
        ("logit_matching", tf.constant([-23.75, -8.25, -8.25, -23.75])),
        ("margin", tf.constant([-2.0, 3, -3, 9])),
        ("signed_target", tf.constant([-2.0, 3, -3, 0])),
        ("targeted_cross_entropy", tf.gather(tf.nn.log_softmax(LOGITS), TARGET, batch_dims=1)),
        ("targeted_dlr", losses.targeted_dlr(LOGITS, LABEL, TARGET)),
    ],
)
def test_objective_is_its_loss_on_the_context(name, expected):
    np.testing.assert_allclose(OBJECTIVES[name](logits_fn)(as_image(LOGITS), CONTEXT), expected, rtol=1e-6)


def test_objectives_are_all_tested_and_targeted_ones_need_something_to_go_to():
    untargeted = {"cross_entropy", "cross_entropy_x10", "cross_entropy_x50", "dlr", "kl_divergence", "margin"}
    assert set(OBJECTIVES) == untargeted | {FEATURE_DISTANCE} | set(TARGETED)
    for name, objective in OBJECTIVES.items():
        context = {key: CONTEXT[key] for key in ("label", "logits")}
        if name in (FEATURE_DISTANCE, *TARGETED):
            with pytest.raises(KeyError, match=r"target|reference"):
                objective(logits_fn)(as_image(LOGITS), context)
        else:
            objective(logits_fn)(as_image(LOGITS), context)


def test_signed_target_comes_to_the_far_end_of_an_axis_which_the_margin_turns_away_from():
    """At 0 the score of class 1 is 0.1, and the way to |score| > 0.3 leads through 0."""

    def scores_fn(image):
        pixel = image[:, 0, 0]
        return tf.concat([tf.fill(tf.shape(pixel), 0.3), 0.1 - 0.6 * pixel], axis=1)

    attack, image, seed = (
        PGD(epsilon=0.9, steps=10, random_start=False),
        tf.zeros([1, 1, 1, 1]),
        tf.zeros([1, 2], tf.int32),
    )

    def found(objective, logits_fn, **context):
        context = {name: tf.constant([value]) for name, value in {"label": 0, **context}.items()}
        return attack(OBJECTIVES[objective](logits_fn), image, context, seed).image[0, 0, 0, 0].numpy()

    def beaten(pixel):
        return abs(0.1 - 0.6 * pixel) > 0.3

    assert beaten(found("signed_target", scores_fn, target=1 + 2))
    assert not beaten(found("signed_target", scores_fn, target=1))
    for objective in ("margin", "cross_entropy", "cross_entropy_x50"):
        assert not beaten(found(objective, lambda image: tf.abs(scores_fn(image))))


def test_smooth_abs_has_the_values_of_abs_and_a_gradient_that_does_not_jump():
    scores = tf.constant([-2.0, -0.1, 0.0, 0.1, 2.0])

    def values_and_slopes(length):
        with tf.GradientTape() as tape:
            tape.watch(scores)
            values = smooth_abs(length)(scores)
        return values, tape.gradient(values, scores)

    values, slopes = values_and_slopes(0.1)
    np.testing.assert_array_equal(values, tf.abs(scores))
    np.testing.assert_allclose(slopes, scores / tf.sqrt(scores**2 + 0.01), rtol=1e-6)
    np.testing.assert_allclose(values_and_slopes(1e-4)[1], tf.sign(scores), atol=1e-4)


def test_matching_compares_features_of_any_shape_with_those_of_another_image():
    feature_map = tf.random.stateless_normal([4, 2, 3, 5], [0, 0])
    context = {"reference": tf.reverse(feature_map, [0])}
    loss = matching(lambda image: feature_map)(tf.zeros([4, 1, 1, 1]), context)
    np.testing.assert_allclose(loss, -np.mean((feature_map - feature_map[::-1]) ** 2, axis=(1, 2, 3)), rtol=1e-5)


# 13 APGD-T: targets
def test_ranked_targets_are_the_other_classes_likeliest_first():
    np.testing.assert_array_equal(ranked_targets(LOGITS, LABEL, 1)[:, 0], [1, 2, 0, 2])
    np.testing.assert_array_equal(ranked_targets(LOGITS, LABEL, 3), [[1, 2, 3], [2, 3, 0], [0, 2, 3], [2, 3, 1]])


# 13 APGD-T: targets
@pytest.mark.parametrize("classes", [2, 5, 10, 12])
def test_ranked_targets_are_never_the_label_even_at_extreme_logits(classes):
    logits = 1e30 * tf.random.stateless_normal([50, classes], [0, 0])
    label = tf.range(50) % classes
    for count in (1, classes - 1):
        found = ranked_targets(logits, label, count)
        assert found.dtype == tf.int32 and found.shape == [50, count]
        assert not (found == label[:, None]).numpy().any()
        assert all(len(set(row)) == count for row in found.numpy())


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
        (tf.one_hot(LABEL, 4), "the classifier returns probabilities"),
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
