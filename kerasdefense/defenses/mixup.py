"""Training on mixtures of two images: an undefended control that regularises between them."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from kerasdefense import losses
from kerasdefense.attacks import PGD
from kerasdefense.defenses import mixing
from kerasdefense.defenses.base import CLEAN_ACCURACY, Defense


@keras.saving.register_keras_serializable(package="kerasdefense")
class Mixup(Defense):
    """Mixup: mixtures of two images, with the same mixture of their labels.

    1. Draw a permutation of the batch and a weight from Beta(mix_alpha, mix_alpha).
    2. Mix every image with its partner by that weight.
    3. Descend on the cross-entropy of the mixed images, that of both labels mixed by it.

    `attack` says only under which threat model it is validated.

    Args:
        backbone: functional Keras model from image to `feature_map`, `embedding` and `logits`.
        attack: the threat model.
        mix_alpha: of the Beta distribution, above 0; 1 = every weight is as likely.
        mix_per: "batch", one weight for all, or "sample", one for each.

    Source: Zhang et al. 2018, "mixup: Beyond empirical risk minimization", and its authors' code. Deviations: none.
    """

    monitor = CLEAN_ACCURACY
    settings = ("mix_alpha", "mix_per")

    def __init__(
        self, backbone: keras.Model, *, attack: PGD, mix_alpha: float = 1.0, mix_per: str = "batch", **kwargs: Any
    ) -> None:
        mixing.check_mixing(mix_alpha, mix_per)
        super().__init__(backbone, attack=attack, **kwargs)
        self.mix_alpha, self.mix_per = mix_alpha, mix_per

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Take one step of the algorithm in the class docstring."""
        batch = self.unpack(data)
        mixture = mixing.draw(batch.index, self.seed, self.step, alpha=self.mix_alpha, per=self.mix_per)  # 1
        image, label = mixture.mixed(batch.image, mixture.of_partners(batch.image)), batch.label  # 2
        partner = mixture.of_partners(label)

        def forward() -> tuple[dict[str, tf.Tensor], None]:  # 3
            logits = self(image, training=True)
            loss = losses.mixed_cross_entropy(logits, label, partner, mixture.share, smoothing=self.label_smoothing)
            return {"cross_entropy_loss": loss}, None

        self.descend(forward)
        return self.report(label)

    @property
    def attack_budget(self) -> int:
        """Input gradients that training spends on an image: none."""
        return 0

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {**super().get_config(), "mix_alpha": self.mix_alpha, "mix_per": self.mix_per}
