"""Training on clean images: the undefended control."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from kerasdefense import losses
from kerasdefense.defenses.base import CLEAN_ACCURACY, Defense


@keras.saving.register_keras_serializable(package="kerasdefense")
class Standard(Defense):
    """Empirical risk minimisation on clean images; no defense.

    1. Descend on the cross-entropy of clean images.

    `attack` says only under which threat model it is validated. Source: none needed. Deviations: none.
    """

    monitor = CLEAN_ACCURACY

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Take one step of the algorithm in the class docstring."""
        batch = self.unpack(data)

        def forward() -> tuple[dict[str, tf.Tensor], tf.Tensor]:  # 1
            logits = self(batch.image, training=True)
            loss = losses.cross_entropy(logits, batch.label, smoothing=self.label_smoothing)
            return {"cross_entropy_loss": loss}, logits

        logits = self.descend(forward)
        return self.report(batch.label, clean=logits)

    @property
    def attack_budget(self) -> int:
        """Input gradients that training spends on an image: none."""
        return 0
