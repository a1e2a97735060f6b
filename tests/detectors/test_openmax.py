from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import scipy.stats
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from kerasdefense.detectors import Energy, OpenMax
from kerasdefense.detectors.openmax import VARIANTS
from kerasdefense.types import InputError, UsageError

EVERY = pytest.mark.parametrize("variant", VARIANTS)


def restored(variant, classes, *, share, alpha=3):
    """Return a detector whose w is 0 or 1 for all classes, or a list of the classes' own."""
    taken = np.broadcast_to(share, [classes])
    assert set(taken) <= {0, 1}
    state = {
        "means": np.full([classes, classes], -77.0),
        "least": np.full(classes, -1.0),
        "shape": np.full(classes, np.inf),
        "scale": np.ones(classes),
        "tail_size": taken.astype(np.int32),
    }
    return OpenMax(variant, alpha=alpha).restore(state)


def transcribed(variant, training, label, logits, tail, alpha):
    """Return the scores in NumPy, class by class."""
    classes = training.shape[1]
    share = np.zeros(logits.shape)
    for each in range(classes):
        kept = training[(label == each) & (training.argmax(axis=1) == each)]
        largest = np.sort(np.linalg.norm(kept - kept.mean(axis=0), axis=1))[-tail:]
        shape, _, scale = scipy.stats.weibull_min.fit(largest - largest[0] + 1, floc=0)
        t = np.linalg.norm(logits - kept.mean(axis=0), axis=1) - largest[0] + 1
        share[:, each] = np.where(t > 0, -np.expm1(-((np.maximum(t, 0) / scale) ** shape)), 0)
    positive = logits - logits.min(axis=1, keepdims=True)
    if variant != "openmax":
        kept = positive if variant == "shifted" else logits
        return -scipy.special.logsumexp(kept * (1 - share), axis=1)
    score = []
    for values, taken in zip(positive, share):
        changed = values.copy()
        for rank, each in enumerate(np.argsort(-values)[:alpha]):
            changed[each] *= 1 - (alpha - rank) / alpha * taken[each]
        unknown = (values - changed).sum()
        score.append(unknown - np.log(np.exp(changed).sum()))
    return np.array(score)


@pytest.fixture(scope="module")
def data():
    """Return logits about 4 on the class's own, their labels, a few of them wrong, and logits from all over."""
    random = np.random.default_rng(3)
    label = random.integers(0, 5, 300)
    training = (4 * np.eye(5)[label] + 1.3 * random.normal(size=[300, 5])).astype(np.float32)
    probe = np.concatenate([training[:40], 3 * random.normal(size=[40, 5])]).astype(np.float32)
    assert 0 < np.mean(training.argmax(axis=1) != label) < 0.1
    return training, label, probe


@EVERY
@pytest.mark.parametrize("tail, alpha", [(20, 3), (8, 2), (1000, 5)])
def test_score_matches_numpy(data, variant, tail, alpha):
    training, label, probe = data
    detector = OpenMax(variant, tail, alpha).fit({"logits": training}, label)
    expected = transcribed(variant, np.float64(training), label, np.float64(probe), tail, alpha)
    np.testing.assert_allclose(detector.score({"logits": probe}), expected, rtol=2e-3, atol=1e-4)
    assert detector.notes == ()


def test_score_of_openmax_by_hand():
    # w_c = 1 - 2^-t with t = d - least + 1: d is 3 to class 0 with least 3, and 0 to class 1 with least 0: both 1/2.
    # Ranks: class 0 with 3 of weight 1, class 1 with 1 of weight 1/2. z' = (1.5, 0.75, 0), z_0 = 1.5 + 0.25.
    state = {
        "means": np.array([[3.0, 1, 3], [3, 1, 0], [0, 0, 0]]),
        "least": np.array([3.0, 0, 0]),
        "shape": np.ones(3),
        "scale": np.full(3, 1 / np.log(2)),
        "tail_size": np.array([5, 5, 5], np.int32),
    }
    detector = OpenMax(alpha=2).restore(state)
    np.testing.assert_allclose(detector.recalibrated({"logits": [[3.0, 1, 0]]}), [[1.75, 1.5, 0.75, 0]], rtol=1e-6)
    expected = 1.75 - np.log(np.exp(1.5) + np.exp(0.75) + 1)
    np.testing.assert_allclose(detector.score({"logits": [[3.0, 1, 0]]}), [expected], rtol=1e-6)
    # With the smallest logit other than 0 it is subtracted first, the distances moving along with the means.
    lower = OpenMax(alpha=2).restore({**state, "means": state["means"] - 4})
    np.testing.assert_allclose(lower.score({"logits": [[-1.0, -3, -4]]}), [expected], rtol=1e-6)
    # "paper" on the same: class 2 lies sqrt(10) from its mean with least 0.
    omega = np.array([0.5, 0.5, 2 ** -(1 + np.sqrt(10))])
    paper = OpenMax("paper").restore(state).score({"logits": [[3.0, 1, 0]]})
    np.testing.assert_allclose(paper, [-scipy.special.logsumexp([3, 1, 0] * omega)], rtol=1e-6)


def test_paper_variant_raises_negative_logits_and_shifted_does_not():
    # osdn_caml section 6, its own arithmetic, and property 18: "paper" need not rise as omega falls.
    low, high = np.float32([[-1, -3, -3, -3, -3, -3]]), np.float32([[8, -3, -3, -3, -3, -3]])
    kept, taken = (restored("paper", 6, share=share) for share in (0, 1))
    np.testing.assert_allclose(kept.score({"logits": low}), [0.48], atol=0.005)
    np.testing.assert_allclose(kept.score({"logits": high}), [-8.0], atol=0.005)
    for logits in (low, high):
        np.testing.assert_allclose(taken.score({"logits": logits}), [-1.79], atol=0.005)
        shifted = [restored("shifted", 6, share=share).score({"logits": logits})[0] for share in (0, 1)]
        assert shifted[0] < shifted[1]


@given(st.integers(0, 2**32 - 1), st.integers(2, 9))
def test_score_without_and_with_full_weibull_mass(seed, classes):
    # osdn_caml 17: omega = 1 -> -logsumexp(v); omega = 0 -> -ln K.
    logits = (3 * np.random.default_rng(seed).normal(size=[5, classes])).astype(np.float32)
    activations = {"logits": logits}
    energy = Energy().score(activations)
    np.testing.assert_allclose(restored("paper", classes, share=0).score(activations), energy, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        restored("shifted", classes, share=0).score(activations), energy + logits.min(axis=1), rtol=1e-4, atol=1e-5
    )
    for variant in ("paper", "shifted"):
        full = restored(variant, classes, share=1).score(activations)
        np.testing.assert_allclose(full, np.full(5, -np.log(classes)), rtol=1e-5)
    # evaluation 13: OpenMax with zero Weibull mass == softmax argmax, and so is the order of all classes.
    recalibrated = restored("openmax", classes, share=0).recalibrated(activations).numpy()
    np.testing.assert_array_equal(recalibrated.argmax(axis=1), 1 + logits.argmax(axis=1))
    np.testing.assert_array_equal(recalibrated[:, 1:].argsort(axis=1), logits.argsort(axis=1))
    np.testing.assert_array_equal(recalibrated[:, 0], 0)


@given(st.integers(0, 2**32 - 1), st.integers(2, 9))
def test_recalibration_takes_from_the_classes_what_it_gives_the_unknown(seed, classes):
    random = np.random.default_rng(seed)
    logits = (3 * random.normal(size=[5, classes])).astype(np.float32)
    detector = restored("openmax", classes, share=random.integers(0, 2, classes), alpha=3)
    recalibrated = detector.recalibrated({"logits": logits}).numpy()
    positive = logits - logits.min(axis=1, keepdims=True)
    np.testing.assert_allclose(recalibrated.sum(axis=1), positive.sum(axis=1), rtol=1e-5)
    assert (recalibrated >= 0).all() and (recalibrated[:, 1:] <= positive).all()
    changed = recalibrated[:, 1:] != positive
    assert (changed.sum(axis=1) <= 3).all()
    np.testing.assert_allclose(
        scipy.special.expit(detector.score({"logits": logits})),
        scipy.special.softmax(recalibrated, axis=1)[:, 0],
        rtol=1e-4,
    )


@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.data())
def test_shifted_score_never_falls_as_a_class_is_taken_away(seed, classes, data):
    # osdn_caml 18.
    logits = {"logits": (5 * np.random.default_rng(seed).normal(size=[6, classes])).astype(np.float32)}
    taken = np.array(data.draw(st.lists(st.integers(0, 1), min_size=classes, max_size=classes)))
    more = taken.copy()
    more[data.draw(st.integers(0, classes - 1))] = 1
    scores = [restored("shifted", classes, share=share).score(logits).numpy() for share in (taken, more)]
    assert (scores[1] >= scores[0] - 1e-5).all()


@EVERY
@pytest.mark.parametrize("share", [0, 1])
def test_huge_logits_do_not_overflow(variant, share):
    # osdn_caml 17: no overflow for |v| = 1e4.
    detector = restored(variant, 3, share=share)
    logits = tf.constant([[1e4, -1e4, 0], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4], [0, 0, 0]])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        score = detector.score({"logits": logits})
    assert np.isfinite(score).all() and np.isfinite(tape.gradient(score, logits)).all()


@EVERY
def test_only_correctly_classified_images_of_known_classes_are_fitted_to(data, variant):
    training, label, probe = data
    is_correct = training.argmax(axis=1) == label
    whole = OpenMax(variant).fit({"logits": training}, label)
    part = OpenMax(variant).fit({"logits": training[is_correct]}, label[is_correct])
    np.testing.assert_array_equal(whole.score({"logits": probe}), part.score({"logits": probe}))
    np.testing.assert_allclose(
        whole.state()["means"][2], training[is_correct & (label == 2)].mean(axis=0), rtol=1e-5, atol=1e-6
    )
    # osdn_caml 20: unknown labels never reach a fit.
    with pytest.raises(InputError, match="labels 0 to 4, not -1"):
        OpenMax(variant).fit({"logits": training}, np.where(label == 0, -1, label))


@EVERY
def test_class_without_correct_samples_is_never_recalibrated_and_noted(data, variant):
    training, label, probe = data
    is_kept = (label != 3) | (training.argmax(axis=1) != 3)
    detector = OpenMax(variant).fit({"logits": training[is_kept]}, label[is_kept])
    assert detector.notes == ("class 3: no correctly classified sample, so its logit is never recalibrated",)
    assert detector.recorded()["classes_without_samples"] == [3]
    recalibrated = detector.recalibrated({"logits": probe}).numpy()[:, 1:]
    positive = probe - probe.min(axis=1, keepdims=True)
    np.testing.assert_array_equal(recalibrated[:, 3], positive[:, 3])
    assert (recalibrated[:, :3] < positive[:, :3]).any()
    # The stand-in takes no distance to it either: class 3's filler mean is far from nothing here.
    stand_in = detector.stand_ins()["distance"]({"logits": np.zeros([1, 5])})
    means = np.delete(detector.state()["means"], 3, axis=0)
    np.testing.assert_allclose(stand_in, [np.linalg.norm(means, axis=1).min()], rtol=1e-5)


def test_class_of_few_samples_has_a_step_and_is_recorded(data):
    training, label, probe = data
    of_class = np.flatnonzero((label == 1) & (training.argmax(axis=1) == 1))
    keep = np.setdiff1d(np.arange(300), of_class[2:])
    detector = OpenMax(tail=20).fit({"logits": training[keep]}, label[keep])
    assert detector.notes == ("class 1: fewer than 3 different distances, so a step replaces the distribution",)
    record = detector.recorded()
    assert record["degenerate_classes"] == [1] and record["classes_without_samples"] == []
    assert record["tail_sizes"] == [20, 2, 20, 20, 20] and record["variant"] == "openmax"
    assert np.isfinite(detector.score({"logits": probe})).all()


def test_no_correct_image_at_all_is_refused(data):
    training, _, _ = data
    with pytest.raises(InputError, match="no training image is classified correctly"):
        OpenMax().fit({"logits": training}, (training.argmax(axis=1) + 1) % 5)


def test_alpha_beyond_the_classes_counts_all(data):
    training, label, probe = data
    five, many = (OpenMax(alpha=alpha).fit({"logits": training}, label) for alpha in (5, 50))
    np.testing.assert_array_equal(five.score({"logits": probe}), many.score({"logits": probe}))


def test_stand_in_is_the_distance_to_the_nearest_mean_less_the_largest_logit(data):
    training, label, probe = data
    detector = OpenMax("paper").fit({"logits": training}, label)
    distance = np.linalg.norm(probe[:, np.newaxis] - detector.state()["means"], axis=2).min(axis=1)
    stand_in = detector.stand_ins()["distance"]({"logits": probe})
    np.testing.assert_allclose(stand_in, distance - probe.max(axis=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"variant": "libmr"}, "unknown variant 'libmr' of openmax; valid: openmax, paper, shifted"),
        ({"tail": 0}, "tail and alpha of openmax must be at least 1, not 0 and 3"),
        ({"alpha": 0}, "tail and alpha of openmax must be at least 1, not 20 and 0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(UsageError, match=message):
        OpenMax(**settings)
