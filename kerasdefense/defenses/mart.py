"""MART: a control that weighs each example by how far the model is from knowing it."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from kerasdefense import losses
from kerasdefense.attacks import PGD
from kerasdefense.defenses.base import Defense
from kerasdefense.types import UsageError


@keras.saving.register_keras_serializable(package="kerasdefense")
class MART(Defense):
    """Misclassification-aware adversarial training.

    1. Craft adversarial images by `attack` on their cross-entropy, BatchNormalization in inference mode.
    2. Pass clean and adversarial images separately, BatchNormalization in training mode.
    3. Descend on `BCE(adversarial) + beta * (1 - p_label(clean)) * KL(softmax(clean) || softmax(adversarial))`, BCE
       being the cross-entropy with a margin term; the gradient flows through the weight and both arguments.

    Args:
        backbone: functional Keras model from image to `feature_map`, `embedding` and `logits`.
        attack: the attack of step 1.
        beta: weight of the divergence, the paper's lambda, at least 0.

    Source: Wang et al. 2020, equation 11 and algorithm 1. Deviations: the search starts at a uniform random point of
    the ball, where the authors' code starts at Gaussian noise of standard deviation 0.001; log-probabilities are exact,
    where the code adds 1e-12 to probabilities, and 1e-7 to the weight.
    """

    terms = ("boosted_cross_entropy_loss", "weighted_kl_divergence_loss")
    settings = ("beta",)

    def __init__(self, backbone: keras.Model, *, attack: PGD, beta: float = 5.0, **kwargs: Any) -> None:
        if not beta >= 0:
            raise UsageError(f"beta must be at least 0, not {beta}")
        super().__init__(backbone, attack=attack, **kwargs)
        self.beta = beta

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Take one step of the algorithm in the class docstring."""
        batch = self.unpack(data)
        image_adv = self.craft(batch, self.attack)  # 1

        def forward() -> tuple[dict[str, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
            logits, logits_adv = self(batch.image, training=True), self(image_adv, training=True)  # 2
            boosted = losses.boosted_cross_entropy(logits_adv, batch.label, smoothing=self.label_smoothing)
            terms = {  # 3
                "boosted_cross_entropy_loss": boosted,
                "weighted_kl_divergence_loss": self.beta * losses.doubted_divergence(logits, logits_adv, batch.label),
            }
            return terms, (logits, logits_adv)

        logits, logits_adv = self.descend(forward)
        return self.report(batch.label, clean=logits, adversarial=logits_adv)

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {**super().get_config(), "beta": self.beta}
