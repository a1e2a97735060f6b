"""The Weibull distribution of a class's largest distances, fitted and evaluated."""

from __future__ import annotations

import math

import numpy as np
import scipy.optimize
import tensorflow as tf

from kerasdefense.types import InputError

_ROUNDING = 1e-9
_CERTAIN = 20.0


def fit_weibull(tail_distances: np.ndarray) -> tuple[float, float]:
    """Return shape and scale of the likeliest Weibull distribution of `t = tail_distances - min(tail_distances) + 1`.

    The shape k solves `1/k = sum(t^k log t) / sum(t^k) - mean(log t)`; the scale is `mean(t^k)^(1/k)`.

    Args:
        tail_distances: float [n], finite, at least one.

    Returns:
        (shape, scale); (inf, 1), a step at the smallest distance, where fewer than three of the distances differ.

    Raises:
        InputError: no distance, or one that is not finite.

    Source: the two-parameter fit of libMR behind Bendale & Boult 2016, algorithm 1. Deviations: the step, where libMR
    returns no distribution.
    """
    distances = np.sort(np.asarray(tail_distances, np.float64))
    if not distances.size or not np.isfinite(distances).all():
        raise InputError("a Weibull distribution is fitted to one or more finite distances")
    differ = np.diff(distances) > _ROUNDING * max(1.0, distances[-1])
    if np.count_nonzero(differ) < 2:
        return math.inf, 1.0
    logs = np.log1p(distances - distances[0])
    largest, mean = logs[-1], logs.mean()

    def slope(shape: float) -> float:
        powers = np.exp(shape * (logs - largest))
        return float(np.sum(powers * logs) / np.sum(powers) - mean - 1 / shape)

    # The first term of the slope is at most `largest`, and nears it.
    low = 1 / (largest - mean)
    high = 2 * low
    while slope(high) < 0:
        high *= 2
    shape = scipy.optimize.brentq(slope, low, high, xtol=1e-12 * low)
    return shape, math.exp(largest + math.log(np.mean(np.exp(shape * (logs - largest)))) / shape)


def cumulative(distance: tf.Tensor, least: tf.Tensor, shape: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """Return the share of the distribution below a distance, `1 - exp(-((distance - least + 1) / scale)^shape)`.

    It is 0 up to `least - 1`; where the shape is infinite, it is 1 above `least` and 0 elsewhere. Gradients are finite.

    Args:
        distance: float32 [batch, classes].
        least: float32 [classes], the smallest distance of the fit.
        shape: float32 [classes], above 0.
        scale: float32 [classes], above 0.

    Returns:
        float32 [batch, classes], in [0, 1].
    """
    excess = distance - least
    is_step, is_inside = tf.math.is_inf(shape), excess > -1.0
    log_ratio = tf.math.log1p(tf.where(is_inside, excess, 0.0)) - tf.math.log(scale)
    # Far beyond where the share is 1 in float32, exp would overflow.
    exponent = tf.exp(tf.minimum(tf.where(is_step, 1.0, shape) * log_ratio, _CERTAIN))
    share = tf.where(is_inside, -tf.math.expm1(-exponent), 0.0)
    return tf.where(is_step, tf.cast(excess > 0.0, tf.float32), share)
