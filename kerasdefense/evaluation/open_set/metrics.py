"""How well anomaly scores tell known from unknown images.

Everywhere `known` [n] and `unknown` [m] hold anomaly scores, higher = more unknown, and unknown is the positive class.
An image is accepted as known where score <= threshold and rejected where score > threshold, so that equal scores share
one fate. Only the order of scores counts: infinities are scores like any other. Scores that are missing or NaN raise an
InputError, arrays of a wrong shape a UsageError.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats
from sklearn import metrics

from kerasdefense.types import InputError, UsageError

RETENTION = 0.95


def auroc(known: np.ndarray, unknown: np.ndarray) -> float:
    """Return P(known < unknown) + P(known = unknown) / 2 of a random pair, the area under the ROC curve."""
    return float(metrics.roc_auc_score(*_ranked(known, unknown)))


def auroc_interval(known: np.ndarray, unknown: np.ndarray) -> list[float]:
    """Return the 95 % interval of the AUROC, AUROC -+ 1.96 sqrt(var(a) / n + var(b) / m), cut to [0, 1].

    a [n] is the share of `unknown` above each known score, b [m] the share of `known` below each unknown score, ties
    counting half. Its width is 0 where the two do not overlap, however few they are.

    Of fewer than two known or two unknown scores it is [0, 1]: they say nothing of the spread.

    Source: DeLong, DeLong and Clarke-Pearson, Biometrics 1988; by ranks as Sun and Xu, IEEE Signal Processing
    Letters 2014. Deviations: the interval is cut to [0, 1].
    """
    is_unknown, rank = _ranked(known, unknown)
    n, m = np.sum(~is_unknown), np.sum(is_unknown)
    if min(n, m) < 2:
        return [0.0, 1.0]
    mid_rank = stats.rankdata(rank)
    above = 1 - (mid_rank[:n] - stats.rankdata(rank[:n])) / m
    below = (mid_rank[n:] - stats.rankdata(rank[n:])) / n
    half = stats.norm.ppf(0.975) * math.sqrt(above.var(ddof=1) / n + below.var(ddof=1) / m)
    area = below.mean()
    return [float(max(area - half, 0)), float(min(area + half, 1))]


def aupr_out(known: np.ndarray, unknown: np.ndarray) -> float:
    """Return the area under precision over recall of finding `unknown`, by trapezoids.

    Source: OpenOOD v1.5, which integrates scikit-learn's curve the same way; step-wise average precision differs.
    Deviations: none.
    """
    precision, recall, _ = metrics.precision_recall_curve(*_ranked(known, unknown))
    return float(metrics.auc(recall, precision))


def aupr_in(known: np.ndarray, unknown: np.ndarray) -> float:
    """Return the area under precision over recall of finding `known` by low scores, by trapezoids as `aupr_out`."""
    return aupr_out(-_scores(unknown, "unknown"), -_scores(known, "known"))


def threshold_at(known_validation: np.ndarray, retention: float) -> float:
    """Return the smallest threshold that accepts a share `retention` of known images, ceil(retention n) at least.

    Args:
        known_validation: [n], scores of clean validation images of known classes; never of unknown ones.
        retention: share to accept, in (0, 1].

    Returns:
        One of the scores; with ties it accepts more than the share.

    Raises:
        UsageError: `retention` is outside (0, 1].
    """
    score = np.sort(_scores(known_validation, "known"))
    if not 0 < retention <= 1:
        raise UsageError(f"retention {retention:g} must be above 0 and at most 1, the share of known images to accept")
    # k / n is rounded as a decimal such as 0.95 is; retention * n may exceed the whole number that it should be.
    share = np.arange(1, len(score) + 1) / len(score)
    return float(score[np.searchsorted(share, retention)])


def fpr_at_95_id_tpr(known: np.ndarray, unknown: np.ndarray) -> float:
    """Return the share of `unknown` accepted where 95 % of `known` are: unknown <= threshold_at(known, 0.95).

    Source: the convention of ODIN (Liang et al., ICLR 2018) and of open-set papers. Deviations: none.
    """
    threshold = threshold_at(known, RETENTION)
    return float(np.mean(_scores(unknown, "unknown") <= threshold))


def fpr_at_95_ood_tpr(known: np.ndarray, unknown: np.ndarray) -> float:
    """Return the share of `known` rejected where 95 % of `unknown` are, at the highest threshold that rejects so many.

    In a formula known >= s, s being the ceil(0.95 m)-th largest of `unknown`.

    Source: the convention of OpenOOD v1.5. Deviations: none.
    """
    return fpr_at_95_id_tpr(-_scores(unknown, "unknown"), -_scores(known, "known"))


def detection_error(known: np.ndarray, unknown: np.ndarray) -> float:
    """Return the least mean of both error rates, min over thresholds of (known rejected + unknown accepted) / 2."""
    unknown_accepted, known_accepted = _accepted(known, np.ones_like(known, bool), unknown)
    return float(np.min(1 - known_accepted + unknown_accepted) / 2)


def ccr_at_fpr(known: np.ndarray, right: np.ndarray, unknown: np.ndarray, q: float) -> float:
    """Return the share of `known` both accepted and `right` where at most a share `q` of `unknown` is accepted.

    The threshold is the largest that keeps to `q`: just below the next unknown score, without interpolation. With
    q = 1 all is accepted and the share is the accuracy.

    Args:
        known: [n].
        right: bool [n], true where the predicted class is the true one.
        unknown: [m].
        q: share in [0, 1].

    Raises:
        UsageError: `q` is outside [0, 1].

    Source: Dhamija et al., Reducing Network Agnostophobia, NeurIPS 2018. Deviations: none.
    """
    if not 0 <= q <= 1:
        raise UsageError(f"q {q:g} must be in [0, 1], the share of unknown images accepted")
    unknown_accepted, right_accepted = _accepted(known, right, unknown)
    return float(right_accepted[np.searchsorted(unknown_accepted, q, side="right") - 1])


def oscr(known: np.ndarray, right: np.ndarray, unknown: np.ndarray) -> float:
    """Return the area under `known` both accepted and `right` over `unknown` accepted, by trapezoids.

    It is at most the accuracy and at most the AUROC, and equals the AUROC where all of `right` [n] are true.

    Source: Chen et al., Adversarial Reciprocal Points Learning, TPAMI 2022. Deviations: exact where the authors' code
    is off by one at its last cut-offs, and equal scores pass the threshold together.
    """
    return float(metrics.auc(*_accepted(known, right, unknown)))


def f1_binary(known: np.ndarray, unknown: np.ndarray, threshold: float) -> float:
    """Return the F1 of rejecting `unknown`: 2 TP / (2 TP + FP + FN), TP unknown and FP known above `threshold`."""
    known, unknown = _scores(known, "known"), _scores(unknown, "unknown")
    is_unknown = np.repeat([False, True], [len(known), len(unknown)])
    return float(metrics.f1_score(is_unknown, np.concatenate([known, unknown]) > threshold, zero_division=0))


def f1_macro(
    known: np.ndarray,
    prediction: np.ndarray,
    label: np.ndarray,
    unknown: np.ndarray,
    unknown_prediction: np.ndarray,
    threshold: float,
    *,
    classes: int,
) -> float:
    """Return the mean F1 over the known classes and the class of all that is rejected, sum(F1_c) / (classes + 1).

    Args:
        known: [n].
        prediction: int [n], classes predicted for known images.
        label: int [n], their true classes.
        unknown: [m].
        unknown_prediction: int [m], classes predicted for unknown images, false where these are accepted.
        threshold: scores above it are rejected, which predicts the class `classes`.
        classes: number K of known classes 0..K-1; one that is neither a label nor predicted has F1 0.

    Raises:
        InputError: a label or a prediction outside 0..K-1.
    """
    known, unknown = _scores(known, "known"), _scores(unknown, "unknown")
    _check_shape(prediction, known, "prediction")
    _check_shape(label, known, "label")
    _check_shape(unknown_prediction, unknown, "unknown prediction")
    predicted, truth = (
        np.concatenate([prediction, unknown_prediction]),
        np.append(label, np.full(len(unknown), classes)),
    )
    strange = np.setdiff1d(np.append(predicted, label), np.arange(classes))
    if strange.size:
        raise InputError(f"class {strange[0]} is not one of the {classes} known classes 0..{classes - 1}")
    decision = np.where(np.concatenate([known, unknown]) > threshold, classes, predicted)
    every = np.arange(classes + 1)
    return float(metrics.f1_score(truth, decision, labels=every, average="macro", zero_division=0))


def summary(known: np.ndarray, right: np.ndarray, unknown: np.ndarray) -> dict[str, float]:
    """Return all that needs no threshold, by name; `right` bool [n] is true where a known image's class is right."""
    return {
        "auroc": auroc(known, unknown),
        "aupr_in": aupr_in(known, unknown),
        "aupr_out": aupr_out(known, unknown),
        "fpr_at_95_id_tpr": fpr_at_95_id_tpr(known, unknown),
        "fpr_at_95_ood_tpr": fpr_at_95_ood_tpr(known, unknown),
        "detection_error": detection_error(known, unknown),
        "oscr": oscr(known, right, unknown),
        "ccr_at_fpr_10": ccr_at_fpr(known, right, unknown, 0.1),
    }


def _accepted(known: np.ndarray, right: np.ndarray, unknown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the shares of `unknown` and of `known` that is right accepted at every threshold, from none to all."""
    known, unknown = _scores(known, "known"), _scores(unknown, "unknown")
    _check_shape(right, known, "right")
    threshold = np.unique(np.concatenate([known, unknown]))

    def counts(score: np.ndarray) -> np.ndarray:
        return np.append(0, np.searchsorted(np.sort(score), threshold, side="right"))

    return counts(unknown) / len(unknown), counts(known[np.asarray(right, bool)]) / len(known)


def _ranked(known: np.ndarray, unknown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which of the joined scores are unknown, bool [n + m], and their ranks: finite, equal where scores are."""
    known, unknown = _scores(known, "known"), _scores(unknown, "unknown")
    is_unknown = np.repeat([False, True], [len(known), len(unknown)])
    return is_unknown, np.unique(np.concatenate([known, unknown]), return_inverse=True)[1]


def _scores(score: np.ndarray, name: str) -> np.ndarray:
    score = np.asarray(score, np.float64)
    if score.ndim != 1:
        raise UsageError(f"{name} scores must be one number per image, not an array of shape {score.shape}")
    if not score.size:
        raise InputError(f"there are no {name} scores; at least one image is needed")
    missing = np.isnan(score).sum()
    if missing:
        raise InputError(f"{missing} of {score.size} {name} scores are NaN; every image needs a number")
    return score


def _check_shape(values: np.ndarray, score: np.ndarray, name: str) -> None:
    if np.shape(values) != score.shape:
        raise UsageError(f"{name} must have one value for each of {len(score)} scores, not shape {np.shape(values)}")
