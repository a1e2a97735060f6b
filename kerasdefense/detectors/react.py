"""ReAct: the energy of logits from a clipped embedding."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from kerasdefense.detectors.base import Detector, ScoreFn
from kerasdefense.detectors.training import Training
from kerasdefense.types import Activations, UsageError


class ReAct(Detector):
    """The energy behind the clipped embedding, `-log sum_c exp((min(embedding, threshold) @ kernel + bias)_c)`.

    Args:
        percentile: the threshold is this percentile of all entries of all training embeddings, in (0, 100].

    Source: Sun et al. 2021, section 3. Deviations: the threshold is of training images, OpenOOD's of validation images.
    """

    needs = ("embedding",)
    needs_head = True
    fitted = ("threshold", "kernel", "bias")

    threshold: tf.Variable
    kernel: tf.Variable
    bias: tf.Variable

    def __init__(self, percentile: float = 90.0) -> None:
        super().__init__()
        if not 0 < percentile <= 100:
            raise UsageError(f"percentile of react must be above 0 and at most 100, not {percentile}")
        self.percentile = percentile

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {"percentile": self.percentile}

    def recorded(self) -> dict[str, Any]:
        """Return the settings and the threshold."""
        fit = {"threshold": float(self.threshold.numpy())} if self.is_fitted else {}
        return {**self.get_config(), **fit}

    def _fit(self, training: Training, notes: list[str]) -> dict[str, np.ndarray]:
        threshold = np.percentile(training.embedding, self.percentile)
        return {"threshold": np.asarray(threshold), "kernel": training.kernel, "bias": training.bias}

    def _score(self, activations: Activations) -> tf.Tensor:
        return self._energy(tf.minimum(activations["embedding"], self.threshold))

    def _stand_ins(self) -> dict[str, ScoreFn]:
        return {"unclipped": lambda activations: self._energy(activations["embedding"])}

    def _energy(self, embedding: tf.Tensor) -> tf.Tensor:
        return -tf.reduce_logsumexp(tf.matmul(embedding, self.kernel) + self.bias, axis=-1)
