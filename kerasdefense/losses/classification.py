"""Losses on logits, shared by training and by the attacks' objectives."""

from __future__ import annotations

import tensorflow as tf

from kerasdefense.types import UsageError

_TINY = 1e-12


def cross_entropy(logits: tf.Tensor, label: tf.Tensor, *, smoothing: float = 0.0) -> tf.Tensor:
    """Return the cross-entropy of the label, `-sum_c q_c log softmax(logits)_c`.

    `q` puts `1 - smoothing` on the label and spreads `smoothing` evenly over all classes, the label included.

    Args:
        logits: float [batch, classes].
        label: int [batch], in [0, classes).
        smoothing: in [0, 1).

    Returns:
        float [batch].

    Source: smoothing as in Szegedy et al. 2016, section 7. Deviations: none.
    """
    loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=label, logits=logits)
    if not smoothing:
        return loss
    uniform = -tf.reduce_mean(tf.nn.log_softmax(logits), axis=-1)
    return (1 - smoothing) * loss + smoothing * uniform


def smoothing_over_others(mass: float, classes: int) -> float:
    """Return the label smoothing over all classes that leaves `mass` to those that are not the label.

    It is `mass * classes / (classes - 1)`, since the label gets its part of what is spread.

    Raises:
        UsageError: the label would have no more than each of the others.
    """
    most = (classes - 1) / classes
    if not 0 <= mass < most:
        raise UsageError(
            f"a label mass of {mass:g} over the other {classes - 1} of {classes} classes leaves nothing to learn: "
            f"--defense_label_smoothing must be at least 0 and below {most:.3g}"
        )
    return mass * classes / (classes - 1)


def margin(logits: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
    """Return how far the best other class is above the label, `max_{c != label} logits_c - logits_label`.

    Args:
        logits: float [batch, classes], at least two classes.
        label: int [batch].

    Returns:
        float [batch]; positive where misclassified.

    Source: Carlini & Wagner 2017, section V (f6 without its floor). Deviations: none.
    """
    is_label = tf.one_hot(label, tf.shape(logits)[-1], on_value=True, off_value=False, dtype=tf.bool)
    lowest = tf.fill(tf.shape(logits), logits.dtype.min)
    other = tf.reduce_max(tf.where(is_label, lowest, logits), axis=-1)
    return other - tf.reduce_max(tf.where(is_label, logits, lowest), axis=-1)


def dlr(logits: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
    """Return the difference of logits ratio, `-(z_label - max_{c != label} z_c) / (z_pi1 - z_pi3 + 1e-12)`.

    `z_pi1 >= z_pi2 >= ...` are the sorted logits. It does not change when logits are shifted or scaled, so that a
    classifier cannot hide its gradient by confidence.

    Args:
        logits: float [batch, classes], at least three classes.
        label: int [batch].

    Returns:
        float [batch]; in [-1, 0] where classified rightly, at least 0 elsewhere.

    Raises:
        UsageError: fewer than three classes.

    Source: Croce & Hein 2020 (AutoAttack), section 4.2. Deviations: none.
    """
    _check_classes(logits, 3, "dlr")
    top = tf.math.top_k(logits, 3).values
    return margin(logits, label) / (top[:, 0] - top[:, 2] + _TINY)


def targeted_dlr(logits: tf.Tensor, label: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
    """Return `-(z_label - z_target) / (z_pi1 - (z_pi3 + z_pi4) / 2 + 1e-12)`, which pulls from label to target.

    Args:
        logits: float [batch, classes], at least four classes.
        label: int [batch].
        target: int [batch], classes other than the label.

    Returns:
        float [batch]; at least 0 where the target's logit is at least the label's.

    Raises:
        UsageError: fewer than four classes.

    Source: Croce & Hein 2020 (AutoAttack), section 4.2. Deviations: none.
    """
    _check_classes(logits, 4, "targeted_dlr")
    top = tf.math.top_k(logits, 4).values
    lead = tf.gather(logits, target, batch_dims=1) - tf.gather(logits, label, batch_dims=1)
    return lead / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + _TINY)


def _check_classes(logits: tf.Tensor, least: int, name: str) -> None:
    if logits.shape[-1] is not None and logits.shape[-1] < least:
        raise UsageError(f"{name} needs at least {least} classes, not {logits.shape[-1]}; use margin or cross_entropy")


def kl_divergence(reference_logits: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Return `KL(softmax(reference_logits) || softmax(logits))` in nats.

    Args:
        reference_logits: float [batch, classes].
        logits: float [batch, classes].

    Returns:
        float [batch], at least 0 up to rounding.

    Source: the inner objective of TRADES, Zhang et al. 2019. Deviations: none.
    """
    log_reference = tf.nn.log_softmax(reference_logits)
    return tf.reduce_sum(tf.exp(log_reference) * (log_reference - tf.nn.log_softmax(logits)), axis=-1)


def doubted_divergence(logits: tf.Tensor, logits_adv: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
    """Return `(1 - p_label) KL(p || p_adv)`, the more the less the clean image is known; gradients flow everywhere.

    Args:
        logits: float [batch, classes], of clean images, whose probabilities are p.
        logits_adv: float [batch, classes], of adversarial images.
        label: int [batch], in [0, classes).

    Returns:
        float [batch], at least 0 up to rounding.

    Source: MART, Wang et al. 2020, equation 10. Deviations: log-probabilities are exact, where the authors' code adds
    1e-12 to probabilities, and 1e-7 to the weight.
    """
    doubt = 1 - tf.gather(tf.nn.softmax(logits), label, batch_dims=1)
    return doubt * kl_divergence(logits, logits_adv)


def boosted_cross_entropy(logits: tf.Tensor, label: tf.Tensor, *, smoothing: float = 0.0) -> tf.Tensor:
    """Return the cross-entropy plus a margin term, `-log p_label - log(1.0001 - max_{c != label} p_c)`.

    Args:
        logits: float [batch, classes], at least two classes.
        label: int [batch], in [0, classes).
        smoothing: label smoothing of the cross-entropy, in [0, 1).

    Returns:
        float [batch].

    Source: MART, Wang et al. 2020, equation 7; 1.0001 bounds the margin term by log 10,000, as in the authors' code.
    Deviations: none.
    """
    return cross_entropy(logits, label, smoothing=smoothing) + runner_up_penalty(logits, label)


def runner_up_penalty(logits: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
    """Return `-log(1.0001 - max_{c != label} p_c)`, the margin term of `boosted_cross_entropy`.

    Args:
        logits: float [batch, classes], at least two classes.
        label: int [batch], in [0, classes).

    Returns:
        float [batch], at least -0.0001.

    Source: MART, Wang et al. 2020, equation 7; 1.0001 as in the authors' code. Deviations: none.
    """
    is_label = tf.one_hot(label, tf.shape(logits)[-1], on_value=True, off_value=False, dtype=tf.bool)
    probability = tf.nn.softmax(logits)
    runner_up = tf.reduce_max(tf.where(is_label, tf.zeros_like(probability), probability), axis=-1)
    return -tf.math.log(1.0001 - runner_up)
