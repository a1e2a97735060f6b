"""Attention maps of feature maps, and how far a student's are from its teacher's: one value per example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import tensorflow as tf

from kerasdefense.types import UsageError

NORMS = ("minmax", "l2")
"""Ways to make maps of any magnitude alike."""


def attention_map(
    feature_map: tf.Tensor, *, power: float = 1.0, norm: str = "minmax", size: Optional[Sequence[Optional[int]]] = None
) -> tf.Tensor:
    """Return where a network looks, whatever class it sees there: `a = sum_c |feature_map_c|^power`, normalised.

    Args:
        feature_map: float [batch, h, w, c].
        power: at least 1; below it the gradient of a feature that is 0 is infinite.
        norm: "minmax", `(a - min a) / (max a - min a)` of each image, 0 everywhere where `a` is constant; or "l2", `a`
            over its length.
        size: (h, w) to which `a` is resized, bilinearly, before it is normalised; None = its own.

    Returns:
        float32 [batch, h, w], in [0, 1].

    Raises:
        UsageError: a power below 1, or an unknown norm.

    Source: the code released with AGKD-BML (Wang et al. 2021); powers and l2 as in Zagoruyko and Komodakis 2017,
    section 3.1. Deviations: the code of AGKD-BML sums the features as they are, which is the same after a ReLU; where
    `a` is constant it divides by 0, and so gives NaN.
    """
    check_attention(power, norm, 1.0)
    energy = tf.abs(tf.cast(feature_map, tf.float32))
    maps = tf.reduce_sum(energy if power == 1 else energy**power, axis=-1)
    if size is not None and list(maps.shape[1:]) != list(size):
        maps = tf.image.resize(maps[..., None], size)[..., 0]
    if norm == "l2":
        return tf.math.l2_normalize(maps, axis=(1, 2))
    lowest = tf.reduce_min(maps, axis=(1, 2), keepdims=True)
    range_ = tf.reduce_max(maps, axis=(1, 2), keepdims=True) - lowest
    return tf.math.divide_no_nan(maps - lowest, range_)


def attention_distance(student: tf.Tensor, teacher: tf.Tensor, *, p: float = 1.0) -> tf.Tensor:
    """Return the mean over pixels of `|student - teacher|^p`; no gradient flows into the teacher's.

    Args:
        student: maps float [batch, h, w].
        teacher: maps of the same shape.
        p: at least 1.

    Returns:
        float32 [batch], at most 1 for maps in [0, 1].

    Source: the code released with AGKD-BML, which has p = 1. Deviations: none.
    """
    difference = tf.abs(student - tf.stop_gradient(teacher))
    return tf.reduce_mean(difference if p == 1 else difference**p, axis=(1, 2))


def check_attention(power: float, norm: str, p: float) -> None:
    """Raise a UsageError for what `attention_map` and `attention_distance` do not know."""
    if not 1 <= power < float("inf"):
        raise UsageError(f"attn_power must be at least 1, not {power:g}")
    if norm not in NORMS:
        raise UsageError(f"attn_norm must be one of {', '.join(NORMS)}, not {norm!r}")
    if not 1 <= p < float("inf"):
        raise UsageError(f"attn_p must be at least 1, not {p:g}")
