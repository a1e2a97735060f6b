from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as reference

from kerasdefense.evaluation.open_set import metrics
from kerasdefense.types import InputError, UsageError

# Few distinct values, so that ties within and across the two sides are common.
TIED = st.lists(st.sampled_from([-np.inf, -2.0, -1.0, 0.0, 0.5, 3.0, np.inf]), min_size=1, max_size=25).map(np.array)
ANY = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=25).map(np.array)
SCORES = st.one_of(TIED, ANY)
PAIRWISE = (
    metrics.auroc,
    metrics.aupr_in,
    metrics.aupr_out,
    metrics.fpr_at_95_id_tpr,
    metrics.fpr_at_95_ood_tpr,
    metrics.detection_error,
)

# Six points by hand: in order known, known, unknown, known, unknown, unknown.
KNOWN, RIGHT, UNKNOWN = np.array([1.0, 2.0, 4.0]), np.array([True, False, True]), np.array([3.0, 5.0, 6.0])


def some_scores(n=300, m=200, *, step=0.0, shift=1.0):
    """Return scores of two overlapping groups, rounded to multiples of `step` for ties."""
    random = np.random.RandomState(5)
    known, unknown = random.randn(n), random.randn(m) + shift
    return (np.round(known / step) * step, np.round(unknown / step) * step) if step else (known, unknown)


def joined(known, unknown):
    return np.repeat([0, 1], [len(known), len(unknown)]), np.concatenate([known, unknown])


def pairs(known, unknown):
    """Return [n, m]: 1 where a known score is below an unknown one, 1/2 where they are equal."""
    return (known[:, None] < unknown) + (known[:, None] == unknown) / 2


# The area under the ROC curve.


def test_property_23_six_points_by_hand():
    # Pairs in order: 3 + 3 + 2 of 9. Precision over recall, both ways: 1, 1, 2/3 and 3/4 at recall 1.
    assert metrics.auroc(KNOWN, UNKNOWN) == pytest.approx(8 / 9)
    assert metrics.aupr_out(KNOWN, UNKNOWN) == pytest.approx(2 / 3 + (2 / 3 + 3 / 4) / 2 / 3)
    assert metrics.aupr_in(KNOWN, UNKNOWN) == pytest.approx(2 / 3 + (2 / 3 + 3 / 4) / 2 / 3)
    assert metrics.fpr_at_95_id_tpr(KNOWN, UNKNOWN) == pytest.approx(1 / 3)
    assert metrics.fpr_at_95_ood_tpr(KNOWN, UNKNOWN) == pytest.approx(1 / 3)
    assert metrics.detection_error(KNOWN, UNKNOWN) == pytest.approx(1 / 6)
    # The curve: (0, 1/3), (1/3, 1/3), (1/3, 2/3), (2/3, 2/3), (1, 2/3).
    assert metrics.oscr(KNOWN, RIGHT, UNKNOWN) == pytest.approx(5 / 9)
    ccr = [metrics.ccr_at_fpr(KNOWN, RIGHT, UNKNOWN, q) for q in (0, 0.33, 1 / 3, 0.9, 1)]
    np.testing.assert_allclose(ccr, [1 / 3, 1 / 3, 2 / 3, 2 / 3, 2 / 3])


@pytest.mark.parametrize("step", [0, 0.5])
def test_auroc_is_mann_whitney_with_ties(step):
    # evaluation 13
    known, unknown = some_scores(step=step)
    expected = stats.mannwhitneyu(unknown, known).statistic / (len(known) * len(unknown))
    assert metrics.auroc(known, unknown) == pytest.approx(expected, abs=1e-12)


@given(SCORES, SCORES)
def test_auroc_counts_pairs(known, unknown):
    assert metrics.auroc(known, unknown) == pytest.approx(pairs(known, unknown).mean(), abs=1e-12)


@given(SCORES, SCORES)
def test_property_23_auroc_of_negated_scores_is_the_rest(known, unknown):
    # evaluation 13
    assert metrics.auroc(-known, -unknown) == pytest.approx(1 - metrics.auroc(known, unknown), abs=1e-12)
    assert metrics.auroc(unknown, known) == pytest.approx(1 - metrics.auroc(known, unknown), abs=1e-12)


@pytest.mark.parametrize(("unknown", "expected"), [([3, 4, 5], 1.0), ([0, 1, 2], 0.5), ([-3, -2, -1], 0.0)])
def test_auroc_of_separate_identical_and_reversed_scores(unknown, expected):
    # osdn_caml 19
    assert metrics.auroc(np.arange(3), np.array(unknown)) == expected


def test_auroc_of_constant_scores_is_chance():
    # evaluation 13
    assert metrics.auroc(np.full(7, 0.3), np.full(4, 0.3)) == 0.5
    assert metrics.oscr(np.full(7, 0.3), np.ones(7, bool), np.full(4, 0.3)) == 0.5


@pytest.mark.parametrize("transform", [np.cbrt, lambda score: 1e5 + 3 * score, np.arctan])
@pytest.mark.parametrize("step", [0, 0.5])
def test_every_metric_depends_on_order_alone(transform, step):
    # evaluation 13
    known, unknown = some_scores(step=step)
    right = np.arange(len(known)) % 3 > 0
    assert metrics.summary(transform(known), right, transform(unknown)) == metrics.summary(known, right, unknown)


def test_every_metric_orders_infinities_and_keeps_single_precision_ties():
    known, unknown = some_scores(step=0.5)
    right = np.arange(len(known)) % 3 > 0
    expected = metrics.summary(known, right, unknown)
    extreme = [np.where(score == max(known.max(), unknown.max()), np.inf, score) for score in (known, unknown)]
    assert metrics.summary(extreme[0], right, extreme[1]) == expected
    assert metrics.summary(np.float32(known), right, np.float32(unknown)) == expected


# Against scikit-learn.


@pytest.mark.parametrize("step", [0, 0.5])
def test_areas_equal_scikit_learn(step):
    # evaluation 13
    known, unknown = some_scores(step=step)
    is_unknown, score = joined(known, unknown)
    assert metrics.auroc(known, unknown) == pytest.approx(reference.roc_auc_score(is_unknown, score), abs=1e-9)
    for area, positive, sign in ((metrics.aupr_out, is_unknown, 1), (metrics.aupr_in, 1 - is_unknown, -1)):
        precision, recall, _ = reference.precision_recall_curve(positive, sign * score)
        assert area(known, unknown) == pytest.approx(reference.auc(recall, precision), abs=1e-9)


@pytest.mark.parametrize("step", [0, 0.5])
def test_rates_equal_scikit_learn(step):
    known, unknown = some_scores(step=step)
    is_unknown, score = joined(known, unknown)
    rejected_known, rejected_unknown, _ = reference.roc_curve(is_unknown, score, drop_intermediate=False)
    at_95 = rejected_known[np.argmax(rejected_unknown >= 0.95)]
    assert metrics.fpr_at_95_ood_tpr(known, unknown) == pytest.approx(at_95, abs=1e-9)
    error = np.min(rejected_known + 1 - rejected_unknown) / 2
    assert metrics.detection_error(known, unknown) == pytest.approx(error, abs=1e-9)
    accepted_unknown, accepted_known, _ = reference.roc_curve(1 - is_unknown, -score, drop_intermediate=False)
    at_95 = accepted_unknown[np.argmax(accepted_known >= 0.95)]
    assert metrics.fpr_at_95_id_tpr(known, unknown) == pytest.approx(at_95, abs=1e-9)


@given(SCORES, SCORES)
def test_precision_areas_swap_with_the_sides_and_the_sign(known, unknown):
    # evaluation 13
    assert metrics.aupr_in(known, unknown) == metrics.aupr_out(-unknown, -known)
    assert metrics.aupr_out(known, unknown) == metrics.aupr_in(-unknown, -known)


# Rates at a threshold.


def test_both_conventions_of_the_rate_at_95_differ():
    # evaluation 13. (A) accepts 19 of the 20 known, to 18, which lets in 17.5 of the 4 unknown; (B) must reject all 4,
    # from 17.5 on, which costs the known 18 and 100.
    known, unknown = np.append(np.arange(19.0), 100), np.array([17.5, 30, 40, 50])
    assert metrics.fpr_at_95_id_tpr(known, unknown) == 1 / 4
    assert metrics.fpr_at_95_ood_tpr(known, unknown) == 2 / 20


def test_rates_at_95_treat_equal_scores_alike():
    # (A) needs all 4 known, so the threshold is 2 and both unknown 2 pass. (B) needs all 3 unknown, so both known 2 go.
    known, unknown = np.array([0.0, 1, 2, 2]), np.array([2.0, 2, 3])
    assert metrics.fpr_at_95_id_tpr(known, unknown) == 2 / 3
    assert metrics.fpr_at_95_ood_tpr(known, unknown) == 2 / 4


@given(SCORES, SCORES)
def test_rates_at_95_keep_their_promise(known, unknown):
    threshold = metrics.threshold_at(known, 0.95)
    assert np.mean(known <= threshold) >= 0.95 > np.mean(known < threshold)
    assert metrics.fpr_at_95_id_tpr(known, unknown) == np.mean(unknown <= threshold)
    detecting = [score for score in unknown if np.mean(unknown >= score) >= 0.95]
    assert metrics.fpr_at_95_ood_tpr(known, unknown) == np.mean(known >= max(detecting))


@given(SCORES, SCORES)
def test_property_23_detection_error_is_at_most_a_half(known, unknown):
    error = metrics.detection_error(known, unknown)
    cuts = np.concatenate([[-np.inf], known, unknown])
    by_hand = [0.5] + [np.mean(known > cut) / 2 + np.mean(unknown <= cut) / 2 for cut in cuts]
    assert 0 <= error <= 0.5
    assert error == pytest.approx(min(by_hand), abs=1e-12)


@pytest.mark.parametrize("n", [20, 60, 100, 140, 1000])
def test_threshold_accepts_exactly_the_share_where_that_is_possible(n):
    score = np.random.RandomState(n).permutation(n)
    assert metrics.threshold_at(score, 0.95) == n * 95 // 100 - 1
    assert metrics.threshold_at(score, 1) == n - 1


def test_threshold_is_the_smallest_that_accepts_the_share():
    score = np.array([5.0, 1, 2, 2, 2])
    found = [metrics.threshold_at(score, retention) for retention in (1e-9, 0.2, 0.21, 0.8, 0.81, 1)]
    assert found == [1, 1, 2, 2, 5, 5]


# What is accepted and right.


@given(SCORES, SCORES, st.data())
def test_oscr_counts_pairs_of_right_images(known, unknown, data):
    # evaluation 13: at most the accuracy and the AUROC, ties half.
    right = np.array(data.draw(st.lists(st.booleans(), min_size=len(known), max_size=len(known))))
    area = metrics.oscr(known, right, unknown)
    assert area == pytest.approx((right[:, None] * pairs(known, unknown)).mean(), abs=1e-12)
    assert area <= min(right.mean(), metrics.auroc(known, unknown)) + 1e-12


@given(SCORES, SCORES)
def test_oscr_of_a_perfect_classifier_is_the_auroc(known, unknown):
    # evaluation 13
    right = np.ones(len(known), bool)
    assert metrics.oscr(known, right, unknown) == pytest.approx(metrics.auroc(known, unknown), abs=1e-12)
    assert metrics.oscr(known, ~right, unknown) == 0


def test_oscr_counts_the_last_cut_offs():
    # By hand: known 1 < unknown 4, 8 and known 6 < unknown 8, so 3 of 4 pairs. The authors' loop counts known images
    # from one place after the unknown ones, reaches (1, 1), (1/2, 1/2), (0, 0) and so 1/2.
    assert metrics.oscr(np.array([1.0, 6]), np.array([True, True]), np.array([4.0, 8])) == 3 / 4


def test_oscr_joins_equal_scores_by_a_straight_line():
    # (0, 1/4), (1/2, 1/2) for the three scores of 1, (1, 1/2), (1, 3/4): 3/16 + 1/4.
    known, right, unknown = np.array([0.0, 1, 1, 3]), np.array([True, False, True, True]), np.array([1.0, 2])
    assert metrics.oscr(known, right, unknown) == 7 / 16
    order = [2, 3, 1, 0]
    assert metrics.oscr(known[order], right[order], unknown[::-1]) == 7 / 16


@given(SCORES, SCORES, st.data())
def test_ccr_rises_with_the_rate_from_its_largest_threshold(known, unknown, data):
    # evaluation 13
    right = np.array(data.draw(st.lists(st.booleans(), min_size=len(known), max_size=len(known))))
    rates = np.sort(data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=5)))
    found = [metrics.ccr_at_fpr(known, right, unknown, q) for q in rates]
    assert (np.diff(found) >= 0).all()
    cuts = np.concatenate([known, unknown])
    for q, ccr in zip(rates, found):
        allowed = [np.mean(right & (known <= cut)) for cut in cuts if np.mean(unknown <= cut) <= q]
        assert ccr == pytest.approx(max([0.0, *allowed]), abs=1e-12)
    assert metrics.ccr_at_fpr(known, right, unknown, 1) == right.mean()


def test_ccr_does_not_let_equal_unknown_scores_pass():
    known, unknown, right = np.array([0.0, 1, 1]), np.array([1.0, 1, 2, 3]), np.ones(3, bool)
    found = [metrics.ccr_at_fpr(known, right, unknown, q) for q in (0, 0.25, 0.49, 0.5)]
    np.testing.assert_allclose(found, [1 / 3, 1 / 3, 1 / 3, 1])


# F1 at a threshold.


def test_f1_by_hand():
    # Above 3 are known 4 (false) and unknown 5, 6 (true); unknown 3 is missed.
    assert metrics.f1_binary(KNOWN, UNKNOWN, 3.0) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert metrics.f1_binary(KNOWN, UNKNOWN, np.inf) == 0
    # Decisions 0, 1, rejected for labels 0, 0, 1 and 1, rejected, rejected for the unknown: class 0 has TP 1, FP 0,
    # FN 1; class 1 TP 0; rejected TP 2, FP 1, FN 1.
    found = metrics.f1_macro(KNOWN, [0, 1, 1], [0, 0, 1], UNKNOWN, [1, 0, 0], 3.0, classes=2)
    assert found == pytest.approx((2 / 3 + 0 + 4 / 6) / 3)


def test_f1_macro_equals_scikit_learn():
    known, unknown = some_scores()
    random = np.random.RandomState(0)
    label, prediction = random.randint(0, 4, (2, len(known)))
    prediction[:200] = label[:200]
    unknown_prediction = random.randint(0, 4, len(unknown))
    threshold = metrics.threshold_at(known, 0.95)
    decision = np.concatenate([prediction, unknown_prediction])
    decision[np.concatenate([known, unknown]) > threshold] = 4
    truth = np.append(label, np.full(len(unknown), 4))
    found = metrics.f1_macro(known, prediction, label, unknown, unknown_prediction, threshold, classes=4)
    assert found == pytest.approx(reference.f1_score(truth, decision, average="macro"), abs=1e-9)


def test_f1_macro_of_perfect_decisions_is_one_and_counts_absent_classes():
    settings = ([0.0, 0, 1], [0, 1, 2], [0, 1, 2], [5.0, 6], [0, 0], 1.0)
    assert metrics.f1_macro(*settings, classes=3) == 1
    assert metrics.f1_macro(*settings, classes=4) == pytest.approx(4 / 5)


# The interval.


def test_interval_by_hand():
    # Shares 1, 1, 2/3 of the unknown above and 2/3, 1, 1 of the known below: variance 1/27 each.
    half = 1.959963984540054 * np.sqrt(2 / 81)
    np.testing.assert_allclose(metrics.auroc_interval(KNOWN, UNKNOWN), [8 / 9 - half, 1], atol=1e-12)


@pytest.mark.parametrize("step", [0, 0.5])
def test_interval_agrees_with_the_bootstrap(step):
    known, unknown = some_scores(80, 50, step=step)

    def area(known, unknown, axis):
        first, second = known[..., :, None], unknown[..., None, :]
        return ((first < second) + (first == second) / 2).mean((-2, -1))

    settings = {"n_resamples": 999, "method": "percentile", "random_state": np.random.RandomState(0)}
    expected = stats.bootstrap((known, unknown), area, vectorized=True, **settings).confidence_interval
    np.testing.assert_allclose(metrics.auroc_interval(known, unknown), [expected.low, expected.high], atol=0.015)


@given(SCORES, SCORES)
def test_interval_holds_the_auroc(known, unknown):
    assume(min(len(known), len(unknown)) > 1)
    low, high = metrics.auroc_interval(known, unknown)
    assert 0 <= low <= metrics.auroc(known, unknown) + 1e-12
    assert metrics.auroc(known, unknown) - 1e-12 <= high <= 1


def test_interval_of_separate_scores_is_a_point():
    assert metrics.auroc_interval(np.arange(5), np.arange(5) + 9) == [1, 1]


# The summary, and what is refused.


def test_summary_names_every_metric():
    known, unknown = some_scores()
    right = np.arange(len(known)) % 3 > 0
    found = metrics.summary(known, right, unknown)
    expected = {metric.__name__: metric(known, unknown) for metric in PAIRWISE}
    expected |= {"oscr": metrics.oscr(known, right, unknown)}
    expected |= {"ccr_at_fpr_10": metrics.ccr_at_fpr(known, right, unknown, 0.1)}
    assert found == expected
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize("metric", [*PAIRWISE, metrics.auroc_interval, lambda *both: metrics.f1_binary(*both, 0.0)])
def test_scores_that_are_missing_or_broken_are_refused(metric):
    good = np.arange(4.0)
    for known, unknown, name in (([], good, "known"), (good, [], "unknown")):
        with pytest.raises(InputError, match=f"no {name} scores; at least one image is needed"):
            metric(np.array(known), np.array(unknown))
    with pytest.raises(InputError, match="2 of 4 unknown scores are NaN"):
        metric(good, np.array([0, np.nan, 1, np.nan]))
    with pytest.raises(UsageError, match=r"known scores must be one number per image, not .* \(2, 2\)"):
        metric(good.reshape(2, 2), good)


def test_arguments_out_of_range_are_refused():
    for retention in (0, -0.1, 1.01, np.nan):
        with pytest.raises(UsageError, match=r"retention .* must be above 0 and at most 1"):
            metrics.threshold_at(KNOWN, retention)
    for q in (-0.1, 1.01, np.nan):
        with pytest.raises(UsageError, match=r"q .* must be in \[0, 1\]"):
            metrics.ccr_at_fpr(KNOWN, RIGHT, UNKNOWN, q)
    assert metrics.auroc_interval(KNOWN, UNKNOWN[:1]) == [0, 1]  # which says nothing


def test_companions_of_another_shape_or_range_are_refused():
    with pytest.raises(UsageError, match="right must have one value for each of 3 scores"):
        metrics.oscr(KNOWN, RIGHT[:2], UNKNOWN)
    good = {"prediction": [0, 1, 1], "label": [0, 0, 1], "unknown_prediction": [1, 0, 0]}
    for name in good:
        with pytest.raises(UsageError, match=f"{name.replace('_', ' ')} must have one value for each of 3 scores"):
            metrics.f1_macro(KNOWN, unknown=UNKNOWN, threshold=3.0, classes=2, **{**good, name: [0, 1]})
        with pytest.raises(InputError, match=r"class -1 is not one of the 2 known classes 0..1"):
            metrics.f1_macro(KNOWN, unknown=UNKNOWN, threshold=3.0, classes=2, **{**good, name: [0, 1, -1]})
