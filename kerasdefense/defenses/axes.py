"""What an attacker sees of a classifier whose logits are absolute cosines with frozen axes, besides the logits."""

from __future__ import annotations

import keras
import tensorflow as tf

from kerasdefense import backbones
from kerasdefense.attacks.wrappers import smooth_abs
from kerasdefense.types import PathFn

LENGTHS = (0.1, 0.01, 0.001)
"""How far from 0 the gradient of the absolute value is rounded off."""


def axis_paths(backbone: keras.Model) -> dict[str, PathFn]:
    """Return the paths `signed` and `smoothed:<length>`; none of a backbone with another head.

    `signed` gives the cosines with their signs, whose absolute values are the logits; `smoothed:<length>` the logits,
    with a gradient that is rounded off where a cosine passes 0.
    """
    head = backbones.orthogonal_head(backbone)
    if head is None or not head.use_abs:
        return {}

    def signed(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        del seed
        return head.signed_scores(head.direction(backbone(image, training=False)["embedding"]))

    def smoothed(length: float) -> PathFn:
        rounded = smooth_abs(length)
        return lambda image, seed: rounded(signed(image, seed))

    return {"signed": signed, **{f"smoothed:{length:g}": smoothed(length) for length in LENGTHS}}
