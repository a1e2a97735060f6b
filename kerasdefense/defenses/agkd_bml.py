"""AGKD-BML: a student that keeps its clean teacher's attention and learns from attacks in both directions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Optional

import keras
import tensorflow as tf

from kerasdefense import backbones, config, losses
from kerasdefense.attacks import OBJECTIVES, PGD, ranked_targets, seeds
from kerasdefense.defenses import teaching
from kerasdefense.defenses.bank import ExampleBank
from kerasdefense.defenses.base import Defense
from kerasdefense.defenses.batch import Batch
from kerasdefense.defenses.preset import Preset
from kerasdefense.defenses.stage import Stage
from kerasdefense.types import Context, LossFn, UsageError

OTHERS_MASS = 0.5
"""Label mass on the classes that an image is not of, in the authors' training of teacher and student."""
_DRAWN = -2
"""Streams of seeds from here down, one per step, draw from the bank; those of attacks are 0 and above, or -1."""


@keras.saving.register_keras_serializable(package="kerasdefense")
class AGKDBML(Defense):
    """Attention-guided knowledge distillation and bi-directional metric learning.

    T, the teacher, is a classifier trained on clean images, frozen; S, the student, is `backbone` and starts from T's
    weights. `A(x)` is a network's attention map, h(x) its embedding, D the angular distance.

    1. c, the most confusing class of each image x1: of the classes that it is not of, the one of S's highest logit.
    2. Draw x2 from all training images of class c, augmented as all are.
    3. Attack x1 towards c, which gives x1', and x2 towards the class y of x1, which gives x2': `attack` on the
       cross-entropy of the target, BatchNormalization in inference mode.
    4. Pass x1', x1 and x2' through S as one batch, BatchNormalization in training mode; x1 and x2 through T.
    5. Descend on `CE(x1')`, labels smoothed
       `+ w_kd * (mean |A_S(x1') - A_T(x1)| + mean |A_S(x2') - A_T(x2)|)`
       `+ w_bml * max(0, triplet_margin + D(h(x1'), h(x1)) - D(h(x1'), h(x2')))`
       `+ w_bml * w_norm * (mean h(x1')^2 + mean h(x1)^2 + mean h(x2')^2)`, means over pixels and dimensions;
       with `mart_beta` also `-log(1.0001 - max_{k != y} p_k(x1')) + mart_beta * (1 - p_y(x1)) * KL(p(x1) || p(x1'))`.

    `backbone` alone is evaluated and exported. Training needs `bank`, the training images by class.

    Args:
        backbone: functional Keras model from image to `feature_map`, `embedding` and `logits`.
        attack: that of step 3.
        teacher: T, with the outputs of a backbone, for the same images and classes, of which a copy is kept; None = the
            backbone as it is given. Its feature maps may have other channels and, where maps are resized, another size.
        init_from_teacher: whether S starts from T's weights, for which it must be built alike.
        w_kd: weight of the attention terms, at least 0, as the others.
        w_bml: weight of the triplets.
        w_norm: weight of the squared embeddings beside the triplets.
        triplet_margin: by how much x2' should be farther from x1' than x1 is.
        absolute_angle: whether embeddings that are opposite count as equal, of which there are none after a ReLU.
        bidirectional: whether x2 is attacked; else x2' is x2.
        ce_clean: weight of the cross-entropy of x1; 0 = none.
        ce_backward: weight of the cross-entropy of x2'; 0 = none.
        mart_beta: weight of the divergence of the MART term; 0 = no such term.
        attn_power: power of the features that an attention map sums, at least 1.
        attn_norm: "minmax" or "l2", see `losses.attention_map`.
        attn_p: power of the distance of maps.
        attn_layers: names of the layers whose maps are compared, in both networks, comma-separated, their mean counting
            once; "" = the feature map.
        label_smoothing: label mass spread evenly over all classes; None = a half over the others, `0.5 K / (K - 1)`
            of K classes.

    Source: the code released with AGKD-BML (Wang, Deng, Yoo, Ling & Lin 2021, ICCV; arXiv 2108.06017); the paper's text
    was not at hand, so that how many steps its best figures were trained with is not known, and results are those of a
    re-implementation. That the teacher's labels are smoothed as the student's is what the name of a folder in that code
    implies. Deviations: no MART term unless `mart_beta` is given, which the released script always has
    (`--defense_preset=released`); random starts are clipped to [0, 1]; constant maps give 0, theirs NaN; the decay of
    weights is decoupled, and of kernels alone; the best epoch is chosen on held-out images by accuracy under PGD, where
    theirs is the best on clean test images. A smoothing of 0.5 is what published attacks on methods of this kind
    exploit: `--defense_label_smoothing=0.1` is safer.
    """

    caveat = (
        "AGKD-BML smooths labels, by a half unless told otherwise, which flattens the cross-entropy that PGD follows: "
        "its accuracy under PGD is no measure of its robustness."
    )
    presets: ClassVar[Mapping[str, Preset]] = {
        "agkd_bml": Preset(),
        "agkd_bml_few": Preset(steps=2),
        "agkd_bml_7": Preset(steps=7, step_share=1 / 4),
        "released": Preset({"mart_beta": 6.0}),
    }
    own_objective = "targeted_cross_entropy"
    is_targeted = True
    needs_bank = True
    parts = ("backbone", "teacher")
    settings = (
        "init_from_teacher",
        "w_kd",
        "w_bml",
        "w_norm",
        "triplet_margin",
        "absolute_angle",
        "bidirectional",
        "ce_clean",
        "ce_backward",
        "mart_beta",
        "attn_power",
        "attn_norm",
        "attn_p",
        "attn_layers",
    )
    run_settings = ("teacher", "teacher_epochs", "bank_limit_mb", "bank_per_class")

    def __init__(
        self,
        backbone: keras.Model,
        *,
        attack: PGD,
        teacher: Optional[keras.Model] = None,
        init_from_teacher: bool = True,
        w_kd: float = 1.0,
        w_bml: float = 2.0,
        w_norm: float = 0.001,
        triplet_margin: float = 0.03,
        absolute_angle: bool = True,
        bidirectional: bool = True,
        ce_clean: float = 0.0,
        ce_backward: float = 0.0,
        mart_beta: float = 0.0,
        attn_power: float = 1.0,
        attn_norm: str = "minmax",
        attn_p: float = 1.0,
        attn_layers: str = "",
        label_smoothing: Optional[float] = None,
        **kwargs: Any,
    ) -> None:
        _check_weights(
            {"w_kd": w_kd, "w_bml": w_bml, "w_norm": w_norm, "triplet_margin": triplet_margin}
            | {"ce_clean": ce_clean, "ce_backward": ce_backward, "mart_beta": mart_beta}
        )
        losses.check_attention(attn_power, attn_norm, attn_p)
        if label_smoothing is None:
            label_smoothing = losses.smoothing_over_others(OTHERS_MASS, backbone.output_shape["logits"][-1])
        super().__init__(backbone, attack=attack, label_smoothing=label_smoothing, **kwargs)
        self.init_from_teacher = init_from_teacher
        self.w_kd, self.w_bml, self.w_norm, self.triplet_margin = w_kd, w_bml, w_norm, triplet_margin
        self.absolute_angle, self.bidirectional = absolute_angle, bidirectional
        self.ce_clean, self.ce_backward, self.mart_beta = ce_clean, ce_backward, mart_beta
        self.attn_power, self.attn_norm, self.attn_p, self.attn_layers = attn_power, attn_norm, attn_p, attn_layers
        self.terms += ("attention_loss",) if w_kd else ()
        self.terms += ("triplet_loss", "norm_loss") if w_bml else ()
        self.terms += ("clean_cross_entropy_loss",) if ce_clean else ()
        self.terms += ("backward_cross_entropy_loss",) if ce_backward else ()
        self.terms += ("runner_up_loss", "weighted_kl_divergence_loss") if mart_beta else ()
        self.teacher = teaching.teacher_for(backbone, teacher or backbone)
        if init_from_teacher:
            teaching.start_from(backbone, self.teacher)
        for network in (backbone, self.teacher):
            teaching.watched(network, attn_layers)
        self.bank: Optional[ExampleBank] = None

    @classmethod
    def stages(cls, run: config.Run) -> tuple[Stage, ...]:
        """Return the training of the teacher: on clean images, with labels smoothed as the student's are."""
        own = run.defense
        if own.teacher and own.teacher_epochs:
            raise UsageError(
                "--defense_teacher_epochs is for a teacher that is trained; leave it or --defense_teacher out"
            )
        smoothing = (own.label_smoothing, own.smoothing_over) if own.label_smoothing else (OTHERS_MASS, "others")
        epochs = own.teacher_epochs or run.train.epochs
        of_teacher = dataclasses.replace(
            run,
            defense=config.Defense(label_smoothing=smoothing[0], smoothing_over=smoothing[1]),
            attack=config.Attack(norm=run.attack.norm, epsilon=run.attack.epsilon),
            train=dataclasses.replace(run.train, epochs=epochs, validate_every=min(run.train.validate_every, epochs)),
        )
        return (Stage("teacher", of_teacher, take=backbones.as_backbone, saved=own.teacher),)

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Take one step of the algorithm in the class docstring."""
        batch = self.unpack(data)
        drawn = self.draw(batch)  # 1, 2
        image_adv, drawn_adv = self.craft_pair(batch, drawn)  # 3
        maps = self._watched(self.teacher, [batch.image, drawn.image])["watched"] if self.w_kd else []  # 4

        def forward() -> tuple[dict[str, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
            outputs = self._watched(self.backbone, [image_adv, drawn_adv, batch.image], training=True)  # 4
            logits = tf.split(outputs["logits"], 3)
            terms = self._classification_terms(logits, batch.label, drawn.label)
            if self.w_kd:
                attacked = [each[: -tf.shape(batch.label)[0]] for each in outputs["watched"]]
                terms["attention_loss"] = self.w_kd * tf.add_n(tf.split(self._attention_distance(attacked, maps), 2))
            if self.w_bml:
                terms |= self._metric_terms(*tf.split(outputs["embedding"], 3))
            return terms, (logits[0], logits[2])

        logits_adv, logits = self.descend(forward)  # 5
        return self.report(batch.label, clean=logits, adversarial=logits_adv)

    def _watched(self, network: keras.Model, images: Sequence[tf.Tensor], *, training: bool = False) -> Any:
        """Return the outputs of student or teacher for several batches at once, with `watched` among them."""
        return teaching.watched(network, self.attn_layers)(tf.concat(images, axis=0), training=training)

    def _classification_terms(
        self, logits: Sequence[tf.Tensor], label: tf.Tensor, target: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Return the terms on the logits of x1', x2' and x1."""
        adversarial, backward, clean = logits

        def cross_entropy(logits: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
            return losses.cross_entropy(logits, label, smoothing=self.label_smoothing)

        terms = {"cross_entropy_loss": cross_entropy(adversarial, label)}
        if self.ce_clean:
            terms["clean_cross_entropy_loss"] = self.ce_clean * cross_entropy(clean, label)
        if self.ce_backward:
            terms["backward_cross_entropy_loss"] = self.ce_backward * cross_entropy(backward, target)
        if self.mart_beta:
            terms["runner_up_loss"] = losses.runner_up_penalty(adversarial, label)
            divergence = losses.doubted_divergence(clean, adversarial, label)
            terms["weighted_kl_divergence_loss"] = self.mart_beta * divergence
        return terms

    def _attention_distance(self, student: Sequence[tf.Tensor], teacher: Sequence[tf.Tensor]) -> tf.Tensor:
        """Return the mean over layers of the distance of attention maps, from the feature maps of these layers."""
        distances = []
        for own, others in zip(student, teacher):
            maps = losses.attention_map(own, power=self.attn_power, norm=self.attn_norm)
            aim = losses.attention_map(others, power=self.attn_power, norm=self.attn_norm, size=maps.shape[1:])
            distances.append(losses.attention_distance(maps, aim, p=self.attn_p))
        return tf.add_n(distances) / len(distances)

    def _metric_terms(self, adversarial: tf.Tensor, backward: tf.Tensor, clean: tf.Tensor) -> dict[str, tf.Tensor]:
        """Return the terms on the embeddings of x1', x2' and x1."""
        triplet = losses.angular_triplet(
            adversarial, clean, backward, margin=self.triplet_margin, absolute=self.absolute_angle
        )
        squares = tf.add_n([losses.mean_square(each) for each in (adversarial, backward, clean)])
        return {"triplet_loss": self.w_bml * triplet, "norm_loss": self.w_bml * self.w_norm * squares}

    def most_confusing(self, batch: Batch) -> tf.Tensor:
        """Return for each image the class of the highest logit other than its own, int32 [batch]."""
        return ranked_targets(self._logits(batch.image), batch.label, 1)[:, 0]

    def draw(self, batch: Batch) -> Batch:
        """Return for each image one of the bank, of its most confusing class, keyed by seed, step and example.

        Its index is the complement of the image's, so that its attack starts elsewhere.

        Raises:
            UsageError: there is no bank.
        """
        if self.bank is None:
            need = "set `bank` to an ExampleBank of the training images before it trains"
            raise UsageError(f"agkd_bml draws images of other classes: {need}")
        target, index = self.most_confusing(batch), tf.bitwise.invert(batch.index)
        return Batch(self.bank.draw(target, seeds.per_example(self.seed, _DRAWN - self.step, index)), target, index)

    def craft_pair(self, batch: Batch, drawn: Batch) -> list[tf.Tensor]:
        """Return the images of a batch attacked towards the labels of those drawn, and these the other way round.

        Without `bidirectional` those drawn come back as they are.
        """
        if not self.bidirectional:
            return [self.craft(batch, self.attack, context=_towards(batch, drawn.label)), drawn.image]
        both, context = _both(batch, drawn)
        return tf.split(self.craft(both, self.attack, context=context), 2)

    def craft(
        self, batch: Batch, attack: PGD, *, loss_fn: Optional[LossFn] = None, context: Context = None
    ) -> tf.Tensor:
        """Return adversarial images as `Defense.craft` does, by default towards the most confusing class."""
        context = _towards(batch, self.most_confusing(batch)) if context is None else context
        loss_fn = loss_fn or OBJECTIVES[self.objective](self._logits)
        return super().craft(batch, attack, loss_fn=loss_fn, context=context)

    def attention(self, image: tf.Tensor, image_adv: tf.Tensor) -> dict[str, tf.Tensor]:
        """Return where the teacher looks in `image` and the student in `image_adv`, maps [batch, h, w] from 0 to 1.

        By the layers that are compared, whatever their maps are divided by in training.
        """
        layers, maps = teaching.layer_names(self.attn_layers) or ["feature_map"], {}
        networks = {"teacher": (self.teacher, image), "student": (self.backbone, image_adv)}
        for name, (network, images) in networks.items():
            for layer, each in zip(layers, self._watched(network, [images])["watched"]):
                maps[f"{name}_{layer}"] = losses.attention_map(each, power=self.attn_power)
        return maps

    def internals(self, batch: Batch, image_adv: tf.Tensor, attack: PGD, seed: int) -> dict[str, tf.Tensor]:
        """Return, besides what every backbone tells, how attention and embedding stand after attacks.

        `attention_distance`, `adversarial_attention_distance`: of the student's maps of the clean and of the attacked
        image from the teacher's of the clean one. `embedding_length`: of the clean one. `forward_angle`: the angular
        distance of x1' from x1, `backward_angle` that of x1' from x2', both attacked by `attack` as in training, x2 an
        image of the batch; NaN where the batch has none of the most confusing class.
        """
        figures = super().internals(batch, image_adv, attack, seed)
        aim = self._watched(self.teacher, [batch.image])["watched"]
        for prefix, each in (("", batch.image), ("adversarial_", image_adv)):
            student = self._watched(self.backbone, [each])["watched"]
            figures[f"{prefix}attention_distance"] = self._attention_distance(student, aim)
        drawn, there = _others_of(batch, self.most_confusing(batch), seed)
        both, context = _both(batch, drawn)
        loss_fn = OBJECTIVES["targeted_cross_entropy"](self._logits)
        attacked = self._search(attack, loss_fn, both.image, context, seeds.per_example(seed, -1, both.index))
        clean, adversarial, backward = (
            self.activations(each)["embedding"] for each in (batch.image, *tf.split(attacked, 2))
        )
        figures["embedding_length"] = tf.norm(clean, axis=-1)
        figures["forward_angle"] = losses.angular_distance(adversarial, clean, absolute=self.absolute_angle)
        angle = losses.angular_distance(adversarial, backward, absolute=self.absolute_angle)
        figures["backward_angle"] = tf.where(there, angle, float("nan"))
        return figures

    @property
    def attack_budget(self) -> int:
        """Input gradients that training spends on an image: those of two attacks, of one where x2 is not attacked."""
        return (2 if self.bidirectional else 1) * super().attack_budget

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {**super().get_config(), **{name: getattr(self, name) for name in self.settings}}


def _towards(batch: Batch, target: tf.Tensor) -> dict[str, tf.Tensor]:
    return {"label": batch.label, "target": target}


def _both(batch: Batch, drawn: Batch) -> tuple[Batch, dict[str, tf.Tensor]]:
    """Return a batch and the images drawn for it as one, and the context of attacks from each towards the other."""
    both = Batch(*(tf.concat(each, axis=0) for each in zip(batch, drawn)))
    return both, _towards(both, tf.concat([drawn.label, batch.label], axis=0))


def _others_of(batch: Batch, target: tf.Tensor, seed: int) -> tuple[Batch, tf.Tensor]:
    """Return for each image one of the same batch that is of the class `target`, and whether there is one."""
    index = tf.bitwise.invert(batch.index)
    is_target = batch.label[None, :] == target[:, None]
    draws = seeds.uniform(seeds.per_example(seed, _DRAWN, index), tf.zeros_like(index), 1)
    count = tf.reduce_sum(tf.cast(is_target, tf.int32), axis=1)
    wanted = tf.cast(draws[:, 0] * tf.cast(count, tf.float32), tf.int32)
    place = tf.argmax(is_target & (tf.cumsum(tf.cast(is_target, tf.int32), axis=1) == wanted[:, None] + 1), axis=1)
    return Batch(tf.gather(batch.image, place), target, index), count > 0


def _check_weights(weights: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        if not weight >= 0:
            raise UsageError(f"{name} must be at least 0, not {weight}")
