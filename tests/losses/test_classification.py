from __future__ import annotations

import keras
import numpy as np
import pytest
import scipy.special
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from kerasdefense import losses
from kerasdefense.types import UsageError

seeds = st.integers(0, 2**32 - 1)
classes = st.integers(2, 12)
scales = st.sampled_from([0.01, 1.0, 30.0])


def draw(seed, classes, scale, batch=6):
    random = np.random.default_rng(seed)
    logits = (scale * random.normal(size=(batch, classes))).astype(np.float32)
    return tf.constant(logits), random.integers(0, classes, batch).astype(np.int32)


@given(seeds, classes, scales)
def test_cross_entropy_matches_scipy(seed, classes, scale):
    logits, label = draw(seed, classes, scale)
    expected = -scipy.special.log_softmax(logits.numpy().astype(np.float64), axis=1)[np.arange(6), label]
    np.testing.assert_allclose(losses.cross_entropy(logits, label), expected, rtol=1e-5, atol=1e-5 * scale)


@given(seeds, classes, st.floats(0, 0.99))
def test_cross_entropy_with_smoothing_matches_smoothed_one_hot_labels(seed, classes, smoothing):
    logits, label = draw(seed, classes, 3.0)
    target = (1 - smoothing) * np.eye(classes)[label] + smoothing / classes
    expected = -np.sum(target * scipy.special.log_softmax(logits.numpy().astype(np.float64), axis=1), axis=1)
    np.testing.assert_allclose(losses.cross_entropy(logits, label, smoothing=smoothing), expected, rtol=1e-5, atol=1e-5)


# agkd_bml 11: mass over the others, written as smoothing over all
@given(seeds, classes, st.floats(0, 0.49))
def test_smoothing_over_others_leaves_the_label_the_rest(seed, classes, mass):
    logits, label = draw(seed, classes, 3.0)
    smoothing = losses.smoothing_over_others(mass, classes)
    own = np.eye(classes)[label]
    target = np.where(own, 1 - mass, mass / (classes - 1))
    np.testing.assert_allclose(target.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose((1 - smoothing) * own + smoothing / classes, target, atol=1e-5)
    found = losses.cross_entropy(logits, label, smoothing=smoothing)
    expected = -np.sum(target * scipy.special.log_softmax(logits.numpy().astype(np.float64), axis=1), axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    of_keras = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing, reduction="none")
    np.testing.assert_allclose(found, of_keras(own.astype(np.float32), logits), rtol=1e-5, atol=1e-5)


# agkd_bml 11: a half of ten classes
def test_half_over_others_of_ten_classes_is_five_ninths():
    assert losses.smoothing_over_others(0.5, 10) == pytest.approx(5 / 9, abs=1e-12)


@pytest.mark.parametrize(("mass", "classes"), [(0.5, 2), (0.9, 10), (-0.1, 10), (float("nan"), 10)])
def test_smoothing_that_leaves_the_label_no_more_than_the_others_is_refused(mass, classes):
    with pytest.raises(UsageError, match=r"leaves nothing to learn.* --defense_label_smoothing"):
        losses.smoothing_over_others(mass, classes)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_gradient_is_softmax_minus_target_and_its_rows_sum_to_zero(smoothing):
    logits, label = draw(0, 7, 3.0)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = losses.cross_entropy(logits, label, smoothing=smoothing)
    gradient = tape.gradient(loss, logits).numpy()
    target = (1 - smoothing) * np.eye(7)[label] + smoothing / 7
    np.testing.assert_allclose(gradient, scipy.special.softmax(logits, axis=1) - target, atol=1e-6)
    np.testing.assert_allclose(gradient.sum(axis=1), 0, atol=1e-6)


def test_cross_entropy_of_huge_logits_is_finite():
    logits = tf.constant([[1e4, -1e4, 0], [-1e4, 1e4, 0]])
    np.testing.assert_allclose(losses.cross_entropy(logits, np.array([0, 0])), [0, 2e4])


@given(seeds, classes, scales)
def test_margin_matches_numpy_and_its_sign_is_correctness(seed, classes, scale):
    logits, label = draw(seed, classes, scale)
    others = np.where(np.eye(classes, dtype=bool)[label], -np.inf, logits)
    margin = losses.margin(logits, label).numpy()
    np.testing.assert_array_equal(margin, others.max(axis=1) - logits.numpy()[np.arange(6), label])
    np.testing.assert_array_equal(margin < 0, logits.numpy().argmax(axis=1) == label)


def test_margin_by_hand():
    logits = tf.constant([[1.0, 4, 2], [1, 4, 2], [5, 5, 0]])
    np.testing.assert_array_equal(losses.margin(logits, np.array([1, 2, 0])), [-2, 2, 0])


# osdn_caml 6: at least 0
@given(seeds, classes, st.sampled_from([0.01, 1.0, 5.0]))
def test_kl_divergence_matches_scipy_and_is_not_negative(seed, classes, scale):
    reference, _ = draw(seed, classes, scale)
    logits, _ = draw(seed + 1, classes, scale)
    p = scipy.special.softmax(reference.numpy().astype(np.float64), axis=1)
    q = scipy.special.softmax(logits.numpy().astype(np.float64), axis=1)
    divergence = losses.kl_divergence(reference, logits).numpy()
    np.testing.assert_allclose(divergence, scipy.special.rel_entr(p, q).sum(axis=1), rtol=1e-4, atol=1e-6)
    assert (divergence >= -1e-6).all()


# osdn_caml 6: 0 for logits that differ by a constant
@given(seeds, classes, st.floats(-100, 100))
def test_kl_divergence_of_equal_distributions_is_zero(seed, classes, shift):
    logits, _ = draw(seed, classes, 3.0)
    np.testing.assert_allclose(losses.kl_divergence(logits, logits + shift), 0, atol=1e-5)


# osdn_caml 6: asymmetric in general
def test_kl_divergence_takes_the_reference_first():
    reference, logits = tf.constant([[2.0, 0, 0]]), tf.constant([[0.0, 1, -3]])
    p, q = scipy.special.softmax(reference.numpy()), scipy.special.softmax(logits.numpy())
    np.testing.assert_allclose(losses.kl_divergence(reference, logits), [np.sum(p * np.log(p / q))], rtol=1e-5)
    assert abs(losses.kl_divergence(reference, logits) - losses.kl_divergence(logits, reference)) > 0.1


# osdn_caml 7, 8: mutual learning pulls the student alone, by softmax(student) - teacher
def test_kl_divergence_gradient_is_the_difference_of_the_distributions():
    teacher, student = draw(1, 6, 3.0)[0], draw(2, 6, 3.0)[0]
    with tf.GradientTape() as tape:
        tape.watch([teacher, student])
        loss = losses.kl_divergence(tf.stop_gradient(teacher), student)
    to_teacher, to_student = tape.gradient(loss, [teacher, student])
    expected = scipy.special.softmax(student, axis=1) - scipy.special.softmax(teacher, axis=1)
    np.testing.assert_allclose(to_student, expected, atol=1e-6)
    assert to_teacher is None


# agkd_bml 12: the part that compares is zero where the attack changes nothing, and both its factors have gradients
@given(seeds, classes, scales)
def test_doubted_divergence_matches_scipy_and_is_zero_of_equal_logits(seed, classes, scale):
    (logits, label), (logits_adv, _) = draw(seed, classes, scale), draw(seed + 1, classes, scale)
    np.testing.assert_array_equal(losses.doubted_divergence(logits, logits, label), np.zeros(6))
    log_p, log_adv = (
        scipy.special.log_softmax(each.numpy().astype(np.float64), axis=1) for each in (logits, logits_adv)
    )
    p = np.exp(log_p)
    expected = (1 - p[np.arange(6), label]) * np.sum(p * (log_p - log_adv), axis=1)
    found = losses.doubted_divergence(logits, logits_adv, label)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# agkd_bml 12: gradients flow to the clean image through the doubt and the divergence
def test_doubted_divergence_has_the_gradient_of_all_its_factors():
    logits, logits_adv = (tf.cast(draw(place, 5, 2.0)[0], tf.float64) for place in (4, 5))
    label = np.array([0, 1, 2, 3, 4, 0], np.int32)
    with tf.GradientTape() as tape:
        tape.watch([logits, logits_adv])
        loss = losses.doubted_divergence(logits, logits_adv, label)
    gradients = tape.gradient(loss, [logits, logits_adv])
    steps = [1e-6 * np.eye(5)[column] for column in range(5)]

    def difference(which, step):
        ends = [
            losses.doubted_divergence(logits + sign * step * (not which), logits_adv + sign * step * which, label)
            for sign in (1, -1)
        ]
        return (ends[0] - ends[1]) / 2e-6

    for which, gradient in enumerate(gradients):
        np.testing.assert_allclose(gradient, np.transpose([difference(which, step) for step in steps]), atol=1e-6)


# agkd_bml 12: the margin part is at least about 0, and rises with the likeliest wrong class
@given(seeds, classes, scales)
def test_runner_up_penalty_matches_scipy_and_is_hardly_below_zero(seed, classes, scale):
    logits, label = draw(seed, classes, scale)
    p = scipy.special.softmax(logits.numpy().astype(np.float64), axis=1)
    others = np.where(np.eye(classes, dtype=bool)[label], 0, p).max(axis=1)
    found = losses.runner_up_penalty(logits, label).numpy()
    np.testing.assert_allclose(found, -np.log(1.0001 - others), rtol=1e-3, atol=1e-5)
    assert (found >= -1.01e-4).all() and (found <= np.log(1.01e4)).all()


# agkd_bml 12: and rises with the likeliest wrong class, whatever the label
def test_runner_up_penalty_rises_with_the_likeliest_wrong_class():
    logits = tf.stack([tf.zeros(9), tf.range(-4, 5, dtype=tf.float32), -5 * tf.ones(9)], axis=1)
    found = losses.runner_up_penalty(logits, np.zeros(9, np.int32)).numpy()
    assert (np.diff(found) > 0).all() and found[0] < 0.02 and found[-1] > 3
    by_label = losses.runner_up_penalty(logits, np.ones(9, np.int32)).numpy()
    assert (np.diff(by_label) < 0).all()


# agkd_bml 12: it is the margin term of MART
@given(seeds, classes, st.sampled_from([0.0, 0.3]))
def test_boosted_cross_entropy_is_cross_entropy_and_the_penalty(seed, classes, smoothing):
    logits, label = draw(seed, classes, 1.0)
    expected = losses.cross_entropy(logits, label, smoothing=smoothing) + losses.runner_up_penalty(logits, label)
    np.testing.assert_allclose(
        losses.boosted_cross_entropy(logits, label, smoothing=smoothing), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "loss",
    [losses.cross_entropy, losses.margin, lambda logits, label: losses.kl_divergence(logits[::-1], logits)],
    ids=["cross_entropy", "margin", "kl_divergence"],
)
def test_losses_give_one_value_per_example(loss):
    logits, label = draw(0, 5, 1.0)
    assert loss(logits, label).shape == [6]


def ratio(logits, label, target=None):
    """Return the difference of logits ratio in NumPy, untargeted, or targeted at `target`."""
    logits, rows = np.asarray(logits, np.float64), np.arange(len(label))
    top = -np.sort(-logits, axis=1)
    if target is None:
        others = np.where(np.eye(logits.shape[1], dtype=bool)[label], -np.inf, logits).max(axis=1)
        return -(logits[rows, label] - others) / (top[:, 0] - top[:, 2] + 1e-12)
    lead = logits[rows, target] - logits[rows, label]
    return lead / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def both(logits, label):
    """Return the untargeted loss, and the targeted one at the next class."""
    target = (label + 1) % logits.shape[1]
    return losses.dlr(logits, label), losses.targeted_dlr(logits, label, target)


@given(seeds, st.integers(4, 12), scales)
def test_dlr_and_targeted_dlr_match_numpy(seed, classes, scale):
    logits, label = draw(seed, classes, scale)
    for loss, expected in zip(both(logits, label), (ratio(logits, label), ratio(logits, label, (label + 1) % classes))):
        assert loss.shape == [6] and loss.dtype == tf.float32
        np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)


def test_dlr_by_hand():
    logits = tf.constant([[5.0, 3, 1, 0], [5, 3, 1, 0], [5, 3, 1, 0]])
    np.testing.assert_allclose(losses.dlr(logits, np.array([0, 1, 3])), [-0.5, 0.5, 1.25])
    loss = losses.targeted_dlr(logits, np.array([0, 0, 1]), np.array([1, 3, 0]))
    np.testing.assert_allclose(loss, np.array([-2, -5, 2]) / 4.5, rtol=1e-6)


# 13 losses: invariance
@given(seeds, st.integers(4, 12), st.sampled_from([0.01, 0.5, 30.0, 1e4]), st.floats(-10, 10))
def test_dlr_and_targeted_dlr_do_not_change_with_shift_and_scale(seed, classes, scale, shift):
    logits, label = draw(seed, classes, 3.0)
    for loss, moved in zip(both(logits, label), both(scale * (logits + shift), label)):
        np.testing.assert_allclose(moved, loss, rtol=1e-4, atol=1e-4)


# 13 losses: ranges
@given(seeds, st.integers(4, 12), scales)
def test_signs_of_dlr_and_targeted_dlr_are_correctness_and_lead(seed, classes, scale):
    logits, label = draw(seed, classes, scale)
    untargeted, targeted = both(logits, label)
    right = logits.numpy().argmax(axis=1) == label
    np.testing.assert_array_equal((untargeted >= -1) & (untargeted <= 0), right)
    rows = np.arange(6)
    leads = logits.numpy()[rows, (label + 1) % classes] >= logits.numpy()[rows, label]
    np.testing.assert_array_equal(targeted >= 0, leads)


# 13 losses: the gradient flows through numerator and denominator
def test_gradients_of_dlr_and_targeted_dlr_match_differences():
    logits = tf.cast(draw(4, 5, 2.0)[0], tf.float64)
    label = np.array([0, 1, 2, 3, 4, 0], np.int32)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(logits)
        found = both(logits, label)
    for place, loss in enumerate(found):
        steps = [1e-6 * np.eye(5)[column] for column in range(5)]
        expected = [(both(logits + step, label)[place] - both(logits - step, label)[place]) / 2e-6 for step in steps]
        gradient = tape.gradient(loss, logits).numpy()
        np.testing.assert_allclose(gradient, np.transpose(expected), atol=1e-6)
        np.testing.assert_allclose(gradient.sum(axis=1), 0, atol=1e-6)
        np.testing.assert_allclose(np.sum(gradient * logits, axis=1), 0, atol=1e-6)


def test_dlr_and_targeted_dlr_of_equal_logits_are_zero_without_nan():
    logits, label = tf.zeros([6, 5]), np.zeros(6, np.int32)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(logits)
        found = both(logits, label)
    for loss in found:
        np.testing.assert_array_equal(loss, np.zeros(6))
        assert np.isfinite(tape.gradient(loss, logits)).all()


# 13 losses: numbers of classes
def test_dlr_and_targeted_dlr_refuse_too_few_classes():
    label = np.zeros(6, np.int32)
    message = "dlr needs at least 3 classes, not 2; use margin or cross_entropy"
    with pytest.raises(UsageError, match=f"^{message}"):
        losses.dlr(draw(0, 2, 1.0)[0], label)
    with pytest.raises(UsageError, match=r"^targeted_dlr needs at least 4 classes, not 3; use "):
        losses.targeted_dlr(draw(0, 3, 1.0)[0], label, label + 1)
    assert np.isfinite(losses.dlr(draw(0, 3, 1.0)[0], label)).all()
