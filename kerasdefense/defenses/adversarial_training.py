"""Adversarial training: the control by which every defense is judged."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from kerasdefense import losses
from kerasdefense.attacks import FGSMRS
from kerasdefense.defenses.base import Defense
from kerasdefense.types import UsageError


@keras.saving.register_keras_serializable(package="kerasdefense")
class PGDAT(Defense):
    """Adversarial training with PGD of any number of steps.

    1. Craft adversarial images by `attack` on the current model, BatchNormalization in inference mode.
    2. Descend on their cross-entropy, BatchNormalization in training mode.

    Source: Madry et al. 2018, equation 2.1 and section 5. Deviations: BatchNormalization is in inference mode while
    crafting (the authors' code leaves it in training mode), so that no example's attack depends on the others.
    """

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Take one step of the algorithm in the class docstring."""
        batch = self.unpack(data)
        image_adv = self.craft(batch, self.attack)  # 1

        def forward() -> tuple[dict[str, tf.Tensor], tf.Tensor]:  # 2
            logits = self(image_adv, training=True)
            loss = losses.cross_entropy(logits, batch.label, smoothing=self.label_smoothing)
            return {"cross_entropy_loss": loss}, logits

        logits = self.descend(forward)
        return self.report(batch.label, adversarial=logits)


@keras.saving.register_keras_serializable(package="kerasdefense")
class FGSMRSAT(PGDAT):
    """Adversarial training with one gradient per image: FGSM from a random start.

    The steps are those of PGDAT with the attack FGSMRS. Single-step training can overfit to its own attack
    ("catastrophic overfitting": accuracy under PGD falls to 0 within an epoch); train it with the overfitting guard.

    Source: Wong et al. 2020, "Fast is better than free". Deviations: as FGSMRS; the guard selects by PGD accuracy on
    validation images, where the authors stop when it drops on a training batch.
    """

    def __init__(self, backbone: keras.Model, *, attack: FGSMRS, **kwargs: Any) -> None:
        if not isinstance(attack, FGSMRS):
            raise UsageError(
                f"fgsm_rs trains with the attack fgsm_rs, not {type(attack).__name__}; use pgd_at for others"
            )
        super().__init__(backbone, attack=attack, **kwargs)
