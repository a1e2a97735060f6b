"""Detectors that read the logits alone: how little the classifier commits itself."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from kerasdefense.detectors.base import Detector, ScoreFn
from kerasdefense.types import Activations, UsageError


class MSP(Detector):
    """Minus the largest probability, `-max_c softmax(logits)_c`, in [-1, -1/classes].

    Source: Hendrycks & Gimpel 2017, section 3. Deviations: none.
    """

    follows_own = False

    def _score(self, activations: Activations) -> tf.Tensor:
        return -tf.reduce_max(tf.nn.softmax(activations["logits"]), axis=-1)

    def _stand_ins(self) -> dict[str, ScoreFn]:
        return {"log_odds": lambda activations: log_odds_against(activations["logits"])}


class MaxLogit(Detector):
    """Minus the largest logit, `-max_c logits_c`.

    Source: Hendrycks et al. 2022, "Scaling out-of-distribution detection for real-world settings", section 3.
    Deviations: none.
    """

    def _score(self, activations: Activations) -> tf.Tensor:
        return -tf.reduce_max(activations["logits"], axis=-1)


class Energy(Detector):
    """The free energy of the logits, `-temperature * log sum_c exp(logits_c / temperature)`.

    Args:
        temperature: above 0.

    Source: Liu et al. 2020, "Energy-based out-of-distribution detection", equation 4. Deviations: none.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = check_temperature(temperature)

    def _score(self, activations: Activations) -> tf.Tensor:
        return -self.temperature * tf.reduce_logsumexp(activations["logits"] / self.temperature, axis=-1)

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {"temperature": self.temperature}


class GEN(Detector):
    """The generalised entropy of the largest probabilities, `sum p^gamma (1 - p)^gamma` over the `top` largest p.

    It is computed from log-probabilities, so that its gradient is finite at p = 0 and p = 1.

    Args:
        gamma: in (0, 1).
        top: how many classes count, at least 1; all where there are fewer.

    Source: Liu et al. 2023, "GEN: Pushing the limits of softmax-based out-of-distribution detection", equation 3.
    Deviations: none.
    """

    def __init__(self, gamma: float = 0.1, top: int = 100) -> None:
        super().__init__()
        if not 0 < gamma < 1:
            raise UsageError(f"gamma of gen must be between 0 and 1, not {gamma}")
        if top < 1:
            raise UsageError(f"top of gen must be at least 1, not {top}")
        self.gamma, self.top = gamma, top

    def _score(self, activations: Activations) -> tf.Tensor:
        log_softmax = tf.nn.log_softmax(activations["logits"])
        ranked = tf.math.top_k(log_softmax, tf.shape(log_softmax)[-1]).values
        # Only the largest p can be near 1, and 1 minus it is the sum of the others.
        of_first = tf.reduce_logsumexp(ranked[:, 1:], axis=-1, keepdims=True)
        log_complement = tf.concat([of_first, tf.math.log1p(-tf.exp(ranked[:, 1:]))], axis=-1)
        return tf.reduce_sum(tf.exp(self.gamma * (ranked + log_complement))[:, : self.top], axis=-1)

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {"gamma": self.gamma, "top": self.top}


def log_odds_against(logits: tf.Tensor) -> tf.Tensor:
    """Return `log (1 - p) / p` [batch], p the largest probability of logits [batch, classes]; it never saturates."""
    largest = tf.one_hot(tf.argmax(logits, axis=-1), logits.shape[-1], on_value=True, off_value=False, dtype=tf.bool)
    others = tf.where(largest, logits.dtype.min, logits)
    return tf.reduce_logsumexp(others, axis=-1) - tf.reduce_max(logits, axis=-1)


def check_temperature(temperature: float) -> float:
    """Return a temperature, or raise a UsageError unless it is a finite number above 0."""
    if not 0 < temperature < float("inf"):
        raise UsageError(f"temperature must be a finite number above 0, not {temperature}")
    return temperature
