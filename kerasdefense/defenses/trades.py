"""TRADES: a control that trades accuracy on clean images for a smooth output around them."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from kerasdefense import losses
from kerasdefense.attacks import PGD
from kerasdefense.defenses.base import Defense
from kerasdefense.types import UsageError


@keras.saving.register_keras_serializable(package="kerasdefense")
class TRADES(Defense):
    """Clean cross-entropy plus the divergence of the output on adversarial images from that on clean ones.

    1. Craft adversarial images that maximise that divergence, BatchNormalization in inference mode.
    2. Pass clean and adversarial images separately, BatchNormalization in training mode.
    3. Descend on `cross_entropy(clean) + beta * KL(softmax(clean) || softmax(adversarial))`; the gradient flows
       through both arguments of the divergence.

    Args:
        backbone: functional Keras model from image to `feature_map`, `embedding` and `logits`.
        attack: the attack of step 1; it needs a random start, since the divergence has no gradient at the image itself.
        beta: weight of the divergence, the paper's 1 / lambda, at least 0.

    Source: Zhang et al. 2019, equation 5 and algorithm 1. Deviations: the search starts at a uniform random point of
    the ball, where the authors start at Gaussian noise of standard deviation 0.001; clean images pass once in training
    mode, where the authors' code passes them twice (the same loss; the moving statistics count them once).
    """

    terms = ("cross_entropy_loss", "kl_divergence_loss")
    own_objective = "kl_divergence"
    settings = ("beta",)

    def __init__(self, backbone: keras.Model, *, attack: PGD, beta: float = 6.0, **kwargs: Any) -> None:
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
            terms = {  # 3
                "cross_entropy_loss": losses.cross_entropy(logits, batch.label, smoothing=self.label_smoothing),
                "kl_divergence_loss": self.beta * losses.kl_divergence(logits, logits_adv),
            }
            return terms, (logits, logits_adv)

        logits, logits_adv = self.descend(forward)
        return self.report(batch.label, clean=logits, adversarial=logits_adv)

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {**super().get_config(), "beta": self.beta}
