"""OSDN-CAML: an open-set classifier that denoises its features, redraws the image and learns with a peer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Optional, Union

import keras
import tensorflow as tf

from kerasdefense import backbones, losses
from kerasdefense.attacks import OBJECTIVES, PGD, seeds
from kerasdefense.defenses.base import Defense
from kerasdefense.defenses.batch import Batch
from kerasdefense.defenses.preset import Preset
from kerasdefense.layers import rotate
from kerasdefense.types import UsageError

ROTATIONS = 4
"""Quarter turns that the rotation head tells apart."""


@keras.saving.register_keras_serializable(package="kerasdefense")
class OSDNCAML(Defense):
    """Open-set defense network, with clean-adversarial mutual learning unless `w_kl` is 0.

    F and H, the encoder and its classifier, are `backbone`; T the rotation head and G the decoder, both on the
    embedding; P the peer, which sees clean images only. `backbone` alone is evaluated and exported.

    1. Turn every image by a random number of quarter turns.
    2. Craft adversarial images that maximise the cross-entropy of H(F), and adversarial turned images that maximise
       that of T(F), BatchNormalization in inference mode.
    3. Pass the clean images through P, both adversarial ones through F, BatchNormalization in training mode.
    4. Descend with F, H, T and G on
       `w_cls * CE(adversarial) + w_rot * CE(turns) + w_rec * |G - (2 image - 1)|^2 + w_kl * KL(P || H)`;
       no gradient flows into P.
    5. Pass the same adversarial images through the updated H(F), and descend with P, by an optimizer of its own, on
       `w_cls * CE(clean) + w_kl * KL(H || P)`; no gradient flows into H(F). P's pass is that of step 3.

    With `w_kl=0` there is no P and no step 5: this is the training of 2020, and with non-local denoising blocks in the
    backbone its network.

    Args:
        backbone: functional Keras model from image to `feature_map`, `embedding` and `logits`; square images, of a size
            that the decoder draws, and at least three classes. Those named osdn_* have denoising blocks.
        attack: the attack of step 2, on images and on turned ones; `objective` is of the first alone.
        w_cls: weight of the cross-entropies of the classes, at least 0, as the others.
        w_rot: weight of the cross-entropy of the turns; 0 = no image is turned.
        w_rec: weight of the reconstruction error.
        w_kl: weight of both divergences; 0 = no peer.
        clean_weight: weight of the cross-entropy of H(F) on clean images, which it sees at no other time; 0 = none.
        bn_update_on_recompute: whether F passes step 5 in training mode, as the authors' does.
        rotation_head: model from the embedding to the logits of the turns; None = a dense layer.
        decoder: model from the embedding to an image in [-1, 1]; None = `backbones.decoder`, as wide as the embedding.
        peer: classifier of clean images with the backbone's outputs; None = `backbones.plain_copy` of the backbone.

    Source: the code released with OSDN-CAML (Shao, Perera, Yuen & Patel 2022), for w_kl = 0 with OSDN (2020).
    Deviations: the ball is one of images in [0, 1], where the authors attack normalised images and clip these to
    [0, 1], which destroys most of them; the pass of step 5 is in inference mode, by the moving statistics, unless
    `bn_update_on_recompute`; the decoder's target is the image mapped to the range of its tanh, theirs the normalised
    image; convolutions start he_normal; `awp_gamma` perturbs F, H, T and G only. `--defense_preset=released` sets
    `bn_update_on_recompute`, not that attack.
    """

    terms: tuple[str, ...] = ("cross_entropy_loss", "rotation_loss", "reconstruction_loss")
    parts = ("backbone", "rotation_head", "decoder", "peer")
    presets: ClassVar[Mapping[str, Preset]] = {"released": Preset({"bn_update_on_recompute": True})}
    settings = ("w_cls", "w_rot", "w_rec", "w_kl", "clean_weight", "bn_update_on_recompute")

    def __init__(
        self,
        backbone: keras.Model,
        *,
        attack: PGD,
        w_cls: float = 1.0,
        w_rot: float = 1.0,
        w_rec: float = 1.0,
        w_kl: float = 2.0,
        clean_weight: float = 0.0,
        bn_update_on_recompute: bool = False,
        rotation_head: Optional[keras.Model] = None,
        decoder: Optional[keras.Model] = None,
        peer: Optional[keras.Model] = None,
        **kwargs: Any,
    ) -> None:
        weights = {"w_cls": w_cls, "w_rot": w_rot, "w_rec": w_rec, "w_kl": w_kl, "clean_weight": clean_weight}
        _check(backbone, weights, rotation_head=rotation_head, decoder=decoder, peer=peer)
        super().__init__(backbone, attack=attack, **kwargs)
        self.terms = tuple(term for term in self.terms if w_rot or term != "rotation_loss")
        self.terms += ("clean_cross_entropy_loss",) if clean_weight else ()
        self.terms += ("kl_divergence_loss", "peer_cross_entropy_loss", "peer_kl_divergence_loss") if w_kl else ()
        self.w_cls, self.w_rot, self.w_rec, self.w_kl = w_cls, w_rot, w_rec, w_kl
        self.clean_weight = clean_weight
        self.bn_update_on_recompute = bn_update_on_recompute
        self.rotation_head = rotation_head or _rotation_head(backbone)
        self.decoder = decoder or _decoder(backbone)
        self.peer = (peer or backbones.plain_copy(backbone, name="peer")) if w_kl else None

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Take one step of the algorithm in the class docstring."""
        batch = self.unpack(data)
        image_adv, turned_adv = self.craft(batch, self.attack), None  # 2
        if self.w_rot:
            turned = self.turned(batch, self.seed, self.step)  # 1
            turned_adv = turned._replace(image=self.craft(turned, self.attack, **self._of_rotation(turned)))  # 2
        if self.peer is None:
            logits_adv = self._descend_defense(batch, image_adv, turned_adv, None)  # 3, 4
            return self.report(batch.label, adversarial=logits_adv)
        with tf.GradientTape() as tape:
            logits_peer = self.peer(batch.image, training=True)["logits"]  # 3
        logits_adv = self._descend_defense(batch, image_adv, turned_adv, logits_peer)  # 3, 4
        self._descend_peer(batch, image_adv, logits_peer, tape)  # 5
        return self.report(batch.label, adversarial=logits_adv)

    def _of_rotation(self, turned: Batch) -> dict[str, Any]:
        """Return what an attack on the rotation head maximises."""
        return {"loss_fn": OBJECTIVES["cross_entropy"](self.rotation_logits), "context": {"label": turned.label}}

    def _descend_defense(
        self,
        batch: Batch,
        image_adv: tf.Tensor,
        turned_adv: Optional[Batch],
        logits_peer: Optional[tf.Tensor],
    ) -> tf.Tensor:
        """Take step 4 with the passes of F in step 3, and return the logits of the adversarial images."""

        def forward() -> tuple[dict[str, tf.Tensor], tf.Tensor]:
            outputs = self.backbone(image_adv, training=True)
            logits, embedding = outputs["logits"], outputs["embedding"]
            logits_turns, turns = None, None
            if turned_adv is not None:
                logits_turns = self.rotation_head(self.backbone(turned_adv.image, training=True)["embedding"])
                turns = turned_adv.label
            terms = losses.open_set_defense_terms(
                logits,
                batch.label,
                logits_turns,
                turns,
                self.decoder(embedding, training=True),
                batch.image,
                logits_peer,
                **{name: getattr(self, name) for name in ("w_cls", "w_rot", "w_rec", "w_kl", "label_smoothing")},
            )
            if self.clean_weight:
                logits_clean = self(batch.image, training=True)
                clean = losses.cross_entropy(logits_clean, batch.label, smoothing=self.label_smoothing)
                terms["clean_cross_entropy_loss"] = self.clean_weight * clean
            return terms, logits

        return self.descend(forward)

    def _descend_peer(self, batch: Batch, image_adv: tf.Tensor, logits_peer: tf.Tensor, tape: tf.GradientTape) -> None:
        """Take step 5; `tape` holds the pass that gave `logits_peer`."""
        logits_adv = self(image_adv, training=self.bn_update_on_recompute)

        def forward() -> tuple[dict[str, tf.Tensor], None]:
            weights = {name: getattr(self, name) for name in ("w_cls", "w_kl", "label_smoothing")}
            return losses.peer_terms(logits_peer, batch.label, logits_adv, **weights), None

        self.descend(forward, optimizer=1, tape=tape)

    def internals(self, batch: Batch, image_adv: tf.Tensor, attack: PGD, seed: int) -> dict[str, tf.Tensor]:
        """Return, besides the noise in features, what rotation head, decoder and peer can do.

        `decoded_psnr`, `adversarial_decoded_psnr`: in dB, at most 100, of what the decoder draws of the clean and the
        attacked image, against the clean one; `adversarial_psnr` of the attacked image itself, and `mean_colour_psnr`
        of one even colour, to compare with. `rotation_accuracy`, `adversarial_rotation_accuracy`: on turned images,
        clean and after `attack` on the rotation head. `peer_accuracy`: on clean images.
        """
        image, figures = batch.image, super().internals(batch, image_adv, attack, seed)
        mean_colour = tf.reduce_mean(image, axis=(1, 2), keepdims=True) + tf.zeros_like(image)
        figures["mean_colour_psnr"] = _psnr(mean_colour, image)
        figures["adversarial_psnr"] = _psnr(image_adv, image)
        figures["decoded_psnr"] = _psnr(self.reconstructed(image), image)
        figures["adversarial_decoded_psnr"] = _psnr(self.reconstructed(image_adv), image)
        if self.w_rot:
            turned = self.turned(batch, seed, -1)
            start = seeds.per_example(seed, -1, turned.index)
            turned_adv = self._search(attack, image=turned.image, seed=start, **self._of_rotation(turned))
            figures["rotation_accuracy"] = _right(self.rotation_logits(turned.image), turned.label)
            figures["adversarial_rotation_accuracy"] = _right(self.rotation_logits(turned_adv), turned.label)
        if self.peer is not None:
            figures["peer_accuracy"] = _right(self.peer(image, training=False)["logits"], batch.label)
        return figures

    def turned(self, batch: Batch, seed: int, step: Union[int, tf.Tensor]) -> Batch:
        """Return the batch with each image turned by a random number of quarter turns, which is its label there.

        The turns are keyed by seed, step and example; its index is the complement, which no image has that is not
        turned, so that its attack starts elsewhere than that of the image itself.
        """
        index = tf.bitwise.invert(batch.index)
        draws = seeds.uniform(seeds.per_example(seed, step, index), tf.zeros_like(index), 1)[:, 0]
        turns = tf.cast(ROTATIONS * draws, tf.int32)
        return Batch(rotate(batch.image, turns), turns, index)

    def rotation_logits(self, image: tf.Tensor) -> tf.Tensor:
        """Return the rotation head's logits [batch, 4] of images [batch, side, side, c]."""
        return self.rotation_head(self.backbone(image, training=False)["embedding"])

    def reconstructed(self, image: tf.Tensor) -> tf.Tensor:
        """Return what the decoder draws, [batch, side, side, c] in [0, 1], for images of that shape."""
        return (self.decoder(self.backbone(image, training=False)["embedding"], training=False) + 1) / 2

    def drawn(self, image: tf.Tensor) -> dict[str, tf.Tensor]:
        """Return what the decoder draws."""
        return {"decoded": self.reconstructed(image)}

    @property
    def attack_budget(self) -> int:
        """Input gradients that training spends on an image: those of two attacks, of one where nothing is turned."""
        return (2 if self.w_rot else 1) * super().attack_budget

    @property
    def trainable_variables(self) -> list[Any]:
        """The variables of F, H, T and G, all that Keras may hand to the first optimizer when `fit` ends."""
        models = (self.backbone, self.rotation_head, self.decoder)
        return [variable for each in models for variable in each.trainable_variables]

    def optimizers(self) -> list[tuple[keras.optimizers.Optimizer, Sequence[Any]]]:
        """Return the optimizer of F, H, T and G, and that of P, with their variables."""
        own = super().optimizers()
        return own if self.peer is None else [*own, (self.peer_optimizer, self.peer.trainable_variables)]

    def compile(self, optimizer: Any = "sgd", **kwargs: Any) -> None:
        """Set the optimizer, and one of the same settings for the peer."""
        optimizer = self.prepare(optimizer)
        if self.peer is not None:
            self.peer_optimizer = self.prepare(type(optimizer).from_config(optimizer.get_config()))
        super().compile(optimizer=optimizer, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {**super().get_config(), **{name: getattr(self, name) for name in self.settings}}


def _psnr(image: tf.Tensor, reference: tf.Tensor) -> tf.Tensor:
    """Return the peak signal-to-noise ratio [batch] in dB of images in [0, 1]; at most 100, which says equal."""
    return tf.minimum(tf.image.psnr(image, reference, max_val=1.0), 100.0)


def _right(logits: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
    return tf.argmax(logits, axis=-1, output_type=tf.int32) == label


def _check(
    backbone: keras.Model,
    weights: Mapping[str, float],
    *,
    rotation_head: Optional[keras.Model],
    decoder: Optional[keras.Model],
    peer: Optional[keras.Model],
) -> None:
    for name, weight in weights.items():
        if not weight >= 0:
            raise UsageError(f"{name} must be at least 0, not {weight}")
    if peer is not None and not weights["w_kl"]:
        raise UsageError("with w_kl=0 nothing is learnt from a peer; leave peer out")
    shape, classes = backbone.input_shape[1:], backbone.output_shape["logits"][-1]
    if None in shape or shape[0] != shape[1]:
        raise UsageError(f"osdn_caml turns images by quarters, and so takes square ones of a fixed size, not {shape}")
    if classes < 3:
        raise UsageError(f"osdn_caml needs at least 3 known classes, not {classes}")
    if rotation_head is not None and rotation_head.output_shape[-1] != ROTATIONS:
        raise UsageError(f"rotation_head must have {ROTATIONS} outputs, not {rotation_head.output_shape[-1]}")
    if decoder is not None and decoder.output_shape[1:] != shape:
        raise UsageError(f"decoder must draw images {shape}, not {decoder.output_shape[1:]}")
    if peer is not None and peer.output_shape["logits"][-1] != classes:
        raise UsageError(f"peer must have {classes} classes, not {peer.output_shape['logits'][-1]}")


def _rotation_head(backbone: keras.Model) -> keras.Model:
    embedding = keras.Input(backbone.output_shape["embedding"][1:], dtype="float32", name="embedding")
    dense = keras.layers.Dense(ROTATIONS, kernel_initializer="he_normal", dtype="float32", name="turns")
    return keras.Model(embedding, dense(embedding), name="rotation_head")


def _decoder(backbone: keras.Model) -> keras.Model:
    latent = backbone.output_shape["embedding"][-1]
    model = backbones.decoder(latent, backbone.input_shape[1:], width=latent)
    return backbones.with_precision(model, backbones.precision_of(backbone), but="image")
