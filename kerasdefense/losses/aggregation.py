"""What training on mixed images descends on: one value per example."""

from __future__ import annotations

import tensorflow as tf

from kerasdefense.losses.classification import cross_entropy
from kerasdefense.types import UsageError

DISTANCES, REDUCTIONS, STOPS = ("mse", "cosine"), ("mean", "sum"), ("target", "mixed", "none")
_TINY = 1e-12


def mixed_cross_entropy(
    logits: tf.Tensor, label: tf.Tensor, partner: tf.Tensor, share: tf.Tensor, *, smoothing: float = 0.0
) -> tf.Tensor:
    """Return `share CE(logits, label) + (1 - share) CE(logits, partner)`.

    Args:
        logits: float [batch, classes], of images of which a share is of class `label` and the rest of class `partner`.
        label: int [batch].
        partner: int [batch].
        share: float [batch] in [0, 1].
        smoothing: label smoothing, in [0, 1).

    Returns:
        float [batch].

    Source: Zhang et al. 2018, "mixup: Beyond empirical risk minimization", section 2; by the linearity of the
    cross-entropy in the label it is that of mixed labels. Deviations: none.
    """
    losses = [cross_entropy(logits, each, smoothing=smoothing) for each in (label, partner)]
    return share * losses[0] + (1 - share) * losses[1]


def aggregation(
    mixed: tf.Tensor, target: tf.Tensor, *, distance: str = "mse", reduction: str = "mean", stop: str = "target"
) -> tf.Tensor:
    """Return how far the embedding of a mixed image is from the mixture of the embeddings of its two images.

    Args:
        mixed: float [batch, d], embeddings of the mixed images.
        target: float [batch, d], mixtures of embeddings, with whatever noise is on them.
        distance: "mse", the squared distance, or "cosine", one minus the cosine.
        reduction: of the squared distance, "mean" over the d dimensions, or "sum".
        stop: through which side no gradient flows: "target", "mixed" or "none" of them.

    Returns:
        float [batch], at least 0.

    Raises:
        UsageError: an unknown distance, reduction or stop.

    Source: the code released with DFA (Liu et al. 2022): mse, mean, target; cosine: that of its successor AdaptiveMix
    (2023), which leaves out the one. Deviations: none.
    """
    check_aggregation(distance, reduction, stop)
    if stop == "target":
        target = tf.stop_gradient(target)
    elif stop == "mixed":
        mixed = tf.stop_gradient(mixed)
    if distance == "cosine":
        directions = [tf.math.l2_normalize(each, axis=-1, epsilon=_TINY) for each in (mixed, target)]
        return 1.0 - tf.reduce_sum(directions[0] * directions[1], axis=-1)
    reduce = tf.reduce_mean if reduction == "mean" else tf.reduce_sum
    return reduce(tf.math.squared_difference(mixed, target), axis=-1)


def check_aggregation(distance: str, reduction: str, stop: str) -> None:
    """Raise a UsageError for a word that `aggregation` does not know."""
    given = {"distance": (distance, DISTANCES), "reduction": (reduction, REDUCTIONS), "stop": (stop, STOPS)}
    for name, (value, known) in given.items():
        if value not in known:
            raise UsageError(f"agg_{name} must be one of {', '.join(known)}, not {value!r}")
