"""DFA: dynamic feature aggregation, with classes on frozen orthonormal axes; and its adversarial variant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import keras
import tensorflow as tf

from kerasdefense import backbones, losses
from kerasdefense.attacks import PGD
from kerasdefense.defenses import mixing
from kerasdefense.defenses.base import ADVERSARIAL_ACCURACY, CLEAN_ACCURACY, Defense
from kerasdefense.defenses.batch import Batch
from kerasdefense.defenses.preset import Preset
from kerasdefense.types import UsageError


@keras.saving.register_keras_serializable(package="kerasdefense")
class DFA(Defense):
    """Dynamic feature aggregation: an embedding in which mixed images lie where their embeddings mix.

    E is the backbone up to its embedding, which is divided by its length; W its frozen orthonormal axes, see
    OrthogonalHead. There is no adversarial training: this is a regulariser.

    1. Draw a permutation of the batch and a weight from Beta(mix_alpha, mix_alpha).
    2. Mix every image with its partner by that weight. `z_mixed = E(mixed)`; `z_bar` is the same mixture of E(image)
       and E(partner), not divided by its length again. BatchNormalization in training mode, in a pass of the mixed
       images and one of the others.
    3. Descend on the cross-entropy of `|W z_bar| + |W z_mixed|`, that of both labels mixed by the weight, plus
       `agg_weight` times the squared distance of z_mixed from `z_bar + noise`, the mean over dimensions, where no
       gradient flows into the latter.

    `attack` says only under which threat model it is validated.

    Args:
        backbone: functional Keras model from image to `feature_map`, `embedding` and `logits`, which an OrthogonalHead
            with absolute logits gives: `backbones.with_orthogonal_head` makes one of any backbone.
        attack: the threat model.
        mix_alpha: of the Beta distribution, above 0; 1 = every weight is as likely.
        mix_per: "batch", one weight for all, or "sample", one for each.
        noise_std: standard deviation of the noise on z_bar, at least 0.
        agg_weight: weight of the aggregation term, at least 0; with 0 what is left is mixup in image and embedding.
        agg_reduction: "mean" of the squared distance over dimensions, or "sum", which is that many times as strong.
        agg_distance: "mse", or "cosine", one minus the cosine.
        agg_stop: where no gradient of the aggregation term flows: "target" (z_bar; so the mixed image's embedding
            moves), "mixed" (z_mixed; so the embeddings of the two images move, as the paper's abstract has it), "none".
        share_forward: pass every image once and look partners up. Otherwise partners are passed again, in a pass of
            their own: the same loss at half as much cost again, and moving statistics that count images twice.

    Source: the code released with DFA (Liu et al. 2022, arXiv 2205.07466), which its successor AdaptiveMix (2023)
    repeats. Deviations: `share_forward` (`--defense_preset=released` passes partners separately); images are normalised
    as in the other backbones; the decay of weights is decoupled, and of kernels alone, where theirs is in the gradient
    of every weight; moments of the optimizer are kept from epoch to epoch; the best epoch is chosen on held-out images,
    by clean accuracy: attacks on bounded logits are weak, and would choose by that; there is no scale of the logits for
    probabilities, which are nearly even.
    """

    caveat = (
        "DFA alone is not a defense: it regularises features, and what it was reported to withstand are attacks that "
        "do not adapt to it. What it is of use for is an embedding in which classes lie along nearly orthogonal lines. "
        "Where attacks are expected, train on attacked images, as pgd_at does."
    )
    presets: ClassVar[Mapping[str, Preset]] = {"released": Preset({"share_forward": False})}
    terms = ("cross_entropy_loss", "aggregation_loss")
    monitor = CLEAN_ACCURACY
    settings = (
        "mix_alpha",
        "mix_per",
        "noise_std",
        "agg_weight",
        "agg_reduction",
        "agg_distance",
        "agg_stop",
        "share_forward",
    )

    def __init__(
        self,
        backbone: keras.Model,
        *,
        attack: PGD,
        mix_alpha: float = 1.0,
        mix_per: str = "batch",
        noise_std: float = 0.05,
        agg_weight: float = 1.0,
        agg_reduction: str = "mean",
        agg_distance: str = "mse",
        agg_stop: str = "target",
        share_forward: bool = True,
        **kwargs: Any,
    ) -> None:
        mixing.check_mixing(mix_alpha, mix_per)
        losses.check_aggregation(agg_distance, agg_reduction, agg_stop)
        if not (noise_std >= 0 and agg_weight >= 0):
            raise UsageError(f"noise_std and agg_weight must be at least 0, not {noise_std:g} and {agg_weight:g}")
        super().__init__(backbone, attack=attack, **kwargs)
        self.mix_alpha, self.mix_per = mix_alpha, mix_per
        self.noise_std, self.agg_weight = noise_std, agg_weight
        self.agg_reduction, self.agg_distance, self.agg_stop = agg_reduction, agg_distance, agg_stop
        self.share_forward = share_forward
        self.head = _head(backbone)

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Take one step of the algorithm in the class docstring."""
        batch = self.unpack(data)
        return self.report(batch.label, clean=self._descend_mixed(batch))

    def _descend_mixed(self, batch: Batch) -> tf.Tensor:
        """Take the steps of the algorithm, and return the logits of the images as they are."""
        mixture = mixing.draw(batch.index, self.seed, self.step, alpha=self.mix_alpha, per=self.mix_per)  # 1
        image, label = batch.image, batch.label
        image_of_partner, partner = mixture.of_partners(image), mixture.of_partners(label)

        def forward() -> tuple[dict[str, tf.Tensor], tf.Tensor]:
            z_mixed = self.directions(mixture.mixed(image, image_of_partner), training=True)  # 2
            z = self.directions(image, training=True)
            z_of_partner = (
                mixture.of_partners(z) if self.share_forward else self.directions(image_of_partner, training=True)
            )
            z_bar = mixture.mixed(z, z_of_partner)
            logits = self.head.logits_of(z_bar) + self.head.logits_of(z_mixed)  # 3
            target = z_bar + mixture.noise(z_bar, self.noise_std) if self.noise_std else z_bar
            loss = losses.mixed_cross_entropy(logits, label, partner, mixture.share, smoothing=self.label_smoothing)
            distance = losses.aggregation(
                z_mixed, target, distance=self.agg_distance, reduction=self.agg_reduction, stop=self.agg_stop
            )
            terms = {"cross_entropy_loss": loss, "aggregation_loss": self.agg_weight * distance}
            return terms, self.head.logits_of(z)

        return self.descend(forward)

    def directions(self, image: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Return the embeddings [batch, d] of `image` [batch, h, w, c], each at length 1."""
        return self.head.direction(self.backbone(image, training=training)["embedding"])

    @property
    def attack_budget(self) -> int:
        """Input gradients that training spends on an image: none."""
        return 0

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {**super().get_config(), **{name: getattr(self, name) for name in self.settings}}


@keras.saving.register_keras_serializable(package="kerasdefense")
class DFAAT(DFA):
    """DFA on adversarial images: an extension of this package, not of the paper.

    1. Craft adversarial images that maximise the margin of another class, BatchNormalization in inference mode.
    2. Take the steps of DFA with these in place of the images.

    Cross-entropy of bounded logits pushes all other classes up nearly alike; with `objective="cross_entropy"` and one
    step, training collapsed where it was tried: right on its own adversarial images, on no others. The validation
    attack, by which the best epoch is chosen, keeps to cross-entropy.

    Args: as of DFA; `attack` is that of step 1.

    Source: none; the mixing of adversarial images is ours. Deviations: does not apply.
    """

    caveat = ""
    presets: ClassVar[Mapping[str, Preset]] = {}
    own_objective = "margin"
    monitor = ADVERSARIAL_ACCURACY

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Take one step of the algorithm in the class docstring."""
        batch = self.unpack(data)
        image_adv = self.craft(batch, self.attack)  # 1
        return self.report(batch.label, adversarial=self._descend_mixed(batch._replace(image=image_adv)))  # 2

    @property
    def attack_budget(self) -> int:
        """Input gradients that training spends on an image."""
        return self.attack.steps * self.attack.restarts


def _head(backbone: keras.Model) -> Any:
    head = backbones.orthogonal_head(backbone)
    if head is None or not head.use_abs:
        raise UsageError(
            "dfa needs frozen orthonormal axes whose absolute cosines are the logits; pass --backbone_head=orthogonal"
        )
    return head
