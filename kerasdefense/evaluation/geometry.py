"""How compact an embedding is: how near images lie to others of their class and of others, in how many directions.

Every embedding is divided by its length first; one of zero stays. Cosines are absolute, as where a class is a line
through the origin, whose two ends are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from sklearn.preprocessing import normalize

RESAMPLES = 200
"""Resamples from which the standard error of a participation ratio is taken."""
_ROWS = 256
_TINY = 1e-12


class Embeddings(NamedTuple):
    """Embeddings of the same images [n, d], clean and attacked, and the labels int [n]."""

    clean: np.ndarray
    adversarial: np.ndarray
    label: np.ndarray


def directions(embedding: np.ndarray) -> np.ndarray:
    """Return embeddings [n, d] divided by their length, in float64; zeros stay."""
    found: np.ndarray = normalize(np.asarray(embedding, np.float64))
    return found


def closeness(embedding: np.ndarray, label: np.ndarray) -> dict[str, np.ndarray]:
    """Return how near each image lies to the others, figures per image [n] by name.

    Args:
        embedding: [n, d].
        label: int [n].

    Returns:
        `intra_class_cosine`: mean absolute cosine with the other images of its class, in [0, 1]; NaN where it is the
        only one. `inter_class_cosine`: the same with the images of other classes; `nearest_other_class`: one minus the
        largest of these; both NaN where there are none. A figure that no image has is left out. An interval of their
        means takes as given which other images there are.
    """
    direction = directions(embedding)
    firsts = range(0, len(label), _ROWS)  # by blocks, as all cosines at once may not fit into memory
    parts = [_closeness(direction, label, np.arange(first, min(first + _ROWS, len(label)))) for first in firsts]
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {name: values for name, values in found.items() if not np.isnan(values).all()}


def _closeness(direction: np.ndarray, label: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
    cosine = np.minimum(np.abs(direction[rows] @ direction.T), 1.0)
    is_other = label[rows, None] != label
    is_same = ~is_other
    is_same[np.arange(len(rows)), rows] = False
    nearest = 1 - cosine.max(axis=1, where=is_other, initial=0.0)
    return {
        "intra_class_cosine": _mean(cosine, is_same),
        "inter_class_cosine": _mean(cosine, is_other),
        "nearest_other_class": np.where(is_other.any(axis=1), nearest, np.nan),
    }


def _mean(cosine: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return the mean of the chosen elements of each row, NaN where there are none."""
    count = chosen.sum(axis=1)
    found: np.ndarray = np.divide(
        np.sum(cosine, axis=1, where=chosen), count, out=np.full(len(cosine), np.nan), where=count > 0
    )
    return found


def participation(embedding: np.ndarray, label: np.ndarray, *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Return in how many directions the embeddings spread, of all images and within classes, with 95 % intervals.

    Args:
        embedding: [n, d].
        label: int [n].
        seed: of the resamples.

    Returns:
        `participation_ratio` of all images, and `class_participation_ratio`, the mean over the classes of at least two,
        as `{value, n, ci95, resamples}`; one for which there are too few images is left out. The interval is the value
        and 1.96 standard errors on either side, by the bootstrap over images (in the second within each class).

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 6 and 12. Deviations: none. Their
    percentiles are not taken, since resamples hold images twice, and so have lower ratios than the images.
    """
    direction = directions(embedding)
    groups = {
        "participation_ratio": [direction],
        "class_participation_ratio": [direction[label == each] for each in np.unique(label)],
    }
    several = {name: [each for each in of if len(each) > 1] for name, of in groups.items()}
    return {name: _mean_ratio(of, seed) for name, of in several.items() if of}


def _mean_ratio(groups: Sequence[np.ndarray], seed: int) -> dict[str, Any]:
    """Return the mean of the participation ratios of groups of directions [n, d], with its interval."""

    def mean(*rows: np.ndarray) -> float:
        return float(np.mean([participation_ratio(group[each]) for group, each in zip(groups, rows)]))

    every = [np.arange(len(group)) for group in groups]
    error = stats.bootstrap(
        every,
        mean,
        n_resamples=RESAMPLES,
        vectorized=False,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).standard_error
    value, reach = mean(*every), float(stats.norm.ppf(0.975) * error)
    ci95 = [value - reach, value + reach]
    return {"value": value, "n": sum(map(len, groups)), "ci95": ci95, "resamples": RESAMPLES}


def participation_ratio(direction: np.ndarray) -> float:
    """Return the participation ratio of vectors of length 1, [n, d]: in how many directions they spread alike.

    `(sum l)^2 / sum l^2` over the eigenvalues l of their centred covariance: k where they spread alike in k orthogonal
    directions and in no other, 0 where they do not spread. It is below n, and lower the fewer vectors there are, so
    that only ratios of as many images compare. The mean being taken off, it tells a vector from its opposite, as
    cosines here do not.

    Source: Gao et al. 2017, A theory of multineuronal dimensionality, dynamics and measurement. Deviations: none.
    """
    spread = direction - direction.mean(axis=0)
    variance = np.sum(np.square(spread))
    if variance <= _TINY * len(spread):  # what rounding in float32 leaves
        return 0.0
    products = spread @ spread.T if len(spread) < spread.shape[1] else spread.T @ spread
    return float(variance**2 / np.sum(np.square(products)))
