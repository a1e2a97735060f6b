"""OpenMax: logits recalibrated by how far they lie from what the classifier gives its own classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from kerasdefense.detectors.base import Detector, ScoreFn
from kerasdefense.detectors.directions import root
from kerasdefense.detectors.training import Training
from kerasdefense.detectors.weibull import cumulative, fit_weibull
from kerasdefense.types import Activations, InputError, UsageError

VARIANTS = ("openmax", "paper", "shifted")


class OpenMax(Detector):
    """Recalibrate logits by a Weibull distribution of each class's largest distances.

    Fit, for each class c over its training images that are classified correctly: the mean of their logits, the
    euclidean distances to it, and a Weibull distribution of the `tail` largest. `w_c` is its share below the distance
    of an image's logits to the mean. The score is one of:

    - "openmax": with `z = logits - min(logits)` and `omega_c = (alpha + 1 - i) / alpha` for the class of rank i up to
      `alpha`, 0 for others: `z'_c = z_c (1 - omega_c w_c)`, `z_0 = sum_c (z_c - z'_c)`, and the score is
      `z_0 - log sum_c exp(z'_c)`, the log odds of P_0, the probability of z_0 in the softmax over z_0 and z'.
    - "paper": `-log sum_c exp(logits_c (1 - w_c))`. A negative logit is raised by it, so that the score need not rise
      with the distance.
    - "shifted": as "paper", of `logits - min(logits)`; it never falls as a w_c rises.

    A class without a correctly classified image keeps w_c = 0; one with fewer than three different distances has a step
    in place of the distribution. Both are in the notes.

    Args:
        variant: one of VARIANTS.
        tail: how many of the largest distances are fitted to, at least 1.
        alpha: how many of the largest logits "openmax" recalibrates, at least 1; all where there are fewer classes.

    Source: "openmax" Bendale & Boult 2016, algorithms 1 and 2; "paper" the released code of OSDN-CAML (Shao et al.
    2022); "shifted" a line commented out in the code it builds on. Deviations: "openmax" subtracts the smallest logit
    first, as the rule raises negative ones; log odds, which rank as P_0 does, since P_0 itself is 1 in float32 for much
    of what is unknown; the paper's threshold on the largest probability is left out.
    """

    fitted = ("means", "least", "shape", "scale", "tail_size")

    means: tf.Variable
    least: tf.Variable
    shape: tf.Variable
    scale: tf.Variable
    tail_size: tf.Variable

    def __init__(self, variant: str = "openmax", tail: int = 20, alpha: int = 3) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise UsageError(f"unknown variant {variant!r} of openmax; valid: {', '.join(VARIANTS)}")
        if tail < 1 or alpha < 1:
            raise UsageError(f"tail and alpha of openmax must be at least 1, not {tail} and {alpha}")
        self.variant, self.tail, self.alpha = variant, tail, alpha

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {"variant": self.variant, "tail": self.tail, "alpha": self.alpha}

    def recorded(self) -> dict[str, Any]:
        """Return the settings, the distances fitted to per class, and the classes with a step or without samples."""
        if not self.is_fitted:
            return self.get_config()
        sizes, shape = self.tail_size.numpy(), self.shape.numpy()
        return {
            **self.get_config(),
            "tail_sizes": sizes.tolist(),
            "degenerate_classes": np.flatnonzero(np.isinf(shape)).tolist(),
            "classes_without_samples": np.flatnonzero(sizes == 0).tolist(),
        }

    def recalibrated(self, activations: Activations) -> tf.Tensor:
        """Return the logits of "openmax": z_0 of the unknown, then z' of the classes.

        Args:
            activations: `logits` float [batch, classes].

        Returns:
            float32 [batch, 1 + classes].
        """
        logits = self._read(activations)["logits"]
        positive = _shifted(logits)
        count = min(self.alpha, int(self.means.shape[0]))
        ranked = tf.one_hot(tf.math.top_k(logits, count).indices, int(self.means.shape[0]))
        of_rank = tf.range(count, 0, -1, dtype=tf.float32)[:, tf.newaxis] / count
        taken = positive * tf.reduce_sum(of_rank * ranked, axis=1) * self._share(logits)
        return tf.concat([tf.reduce_sum(taken, axis=-1, keepdims=True), positive - taken], axis=-1)

    def _fit(self, training: Training, notes: list[str]) -> dict[str, np.ndarray]:
        is_correct = np.argmax(training.logits, axis=1) == training.label
        if not is_correct.any():
            raise InputError(
                "no training image is classified correctly, which leaves OpenMax nothing to fit to; check labels"
            )
        classes = training.classes
        means, least, scale = np.zeros([classes, classes]), np.zeros(classes), np.ones(classes)
        shape, tail_size = np.ones(classes), np.zeros(classes, np.int32)
        for each in range(classes):
            logits = training.logits[is_correct & (training.label == each)]
            if not len(logits):
                notes.append(f"class {each}: no correctly classified sample, so its logit is never recalibrated")
                continue
            means[each] = logits.mean(axis=0)
            largest = np.sort(np.linalg.norm(logits - means[each], axis=1))[-self.tail :]
            least[each], tail_size[each] = largest[0], len(largest)
            shape[each], scale[each] = fit_weibull(largest)
            if np.isinf(shape[each]):
                notes.append(f"class {each}: fewer than 3 different distances, so a step replaces the distribution")
        return {"means": means, "least": least, "shape": shape, "scale": scale, "tail_size": tail_size}

    def _score(self, activations: Activations) -> tf.Tensor:
        if self.variant == "openmax":
            recalibrated = self.recalibrated(activations)
            return recalibrated[:, 0] - tf.reduce_logsumexp(recalibrated[:, 1:], axis=-1)
        logits = activations["logits"]
        kept = _shifted(logits) if self.variant == "shifted" else logits
        return -tf.reduce_logsumexp(kept * (1.0 - self._share(logits)), axis=-1)

    def _share(self, logits: tf.Tensor) -> tf.Tensor:
        """Return w, [batch, classes]."""
        share = cumulative(self._distance(logits), self.least, self.shape, self.scale)
        return tf.where(self.tail_size > 0, share, 0.0)

    def _distance(self, logits: tf.Tensor) -> tf.Tensor:
        """Return the distances to the means [batch, classes]: in float64, as the short form loses digits."""
        logits, means = tf.cast(logits, tf.float64), tf.cast(self.means, tf.float64)
        squared = tf.reduce_sum(tf.square(logits), axis=-1)[:, tf.newaxis] + tf.reduce_sum(tf.square(means), axis=-1)
        squared -= 2 * tf.matmul(logits, means, transpose_b=True)
        return tf.cast(root(squared), tf.float32)

    def _stand_ins(self) -> dict[str, ScoreFn]:
        return {"distance": self._distance_less_logit}

    def _distance_less_logit(self, activations: Activations) -> tf.Tensor:
        logits = activations["logits"]
        distance = tf.where(self.tail_size > 0, self._distance(logits), tf.float32.max)
        return tf.reduce_min(distance, axis=-1) - tf.reduce_max(logits, axis=-1)


def _shifted(logits: tf.Tensor) -> tf.Tensor:
    return logits - tf.reduce_min(logits, axis=-1, keepdims=True)
