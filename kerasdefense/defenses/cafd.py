"""CAFD: a denoiser in front of a frozen classifier, trained without labels in its class activation features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Optional

import keras
import tensorflow as tf

from kerasdefense import backbones, config, losses
from kerasdefense.attacks import FEATURE_DISTANCE, OBJECTIVES, PGD, seeds
from kerasdefense.defenses import forgetting, inside, teaching
from kerasdefense.defenses.activation import ActivationFeatures
from kerasdefense.defenses.base import Defense
from kerasdefense.defenses.batch import IMAGE_ADV, Batch, is_labelled, with_labels
from kerasdefense.defenses.descent import Terms
from kerasdefense.defenses.preset import Preset
from kerasdefense.defenses.purifying import purified_paths
from kerasdefense.defenses.stage import Stage
from kerasdefense.types import Activations, Context, LossFn, PathFn, UsageError

_BEFORE, _SPARED = -3, -4
"""Streams of seeds: of images attacked before training, and, from the second down, of those left clean at a step."""


@keras.saving.register_keras_serializable(package="kerasdefense")
class CAFD(Defense):
    """Class activation feature based denoiser: undo attacks on the features by which a frozen classifier decides.

    P, the classifier, is trained before and frozen, BatchNormalization in inference mode; C, the denoiser, gives what
    is to be added to an image; D, the critic, tells clean from denoised images. F(x) is the feature map of P that
    enters global pooling, W the kernel of its last layer, k(x) the class that P predicts. No label is used.

    1. Attack each image x by CAFA: away from its class activation features `F(x) * W[:, k(x)]`; on P alone, once for
       all epochs (with `dynamic` at each step, through the denoiser), which gives x'. That is what a run does; in plain
       `fit`, batches bring x' as `image_adv`, or it is crafted anew at each step.
    2. `x" = x' + C(x')`, not clipped, C and D in training mode.
    3. Descend with D on `(BCE(r, 1) + BCE(f, 0)) / 2`, where `r = D(x) - mean D(x")` and `f = D(x") - mean D(x)`.
    4. Descend with C on `lam_f mean (F(x") - F(x))^2 + lam_w mean (w(x") - w(x))^2 + lam_a (BCE(r, 0) + BCE(f, 1)) / 2
       + lam_p mean (x" - x)^2`; w is the mean of the columns of W under the softmax of P.

    The whole path `P(clip(x + C(x)))` is evaluated and exported.

    Args:
        backbone: functional Keras model from image to `feature_map`, `embedding` and `logits`.
        attack: that of step 1, on `objective`; other objectives than class_activation take labels.
        classifier: P, with the outputs of a backbone, of which a copy is kept; None = `backbone`.
        denoiser: C, from images to what is added to them; None = `backbones.residual_unet`.
        critic: D; None = `backbones.critic`. Without `lam_a` there is none.
        lam_f: weight of the features, at least 0, as the others.
        lam_w: weight of the weights of the predicted class.
        lam_a: weight of the critic's judgement; 0 = no critic.
        lam_p: weight of the pixels.
        weight_term: "soft", "hard" or "joint", see `losses.class_activation_terms`.
        temperature: of the softmax of "soft", above 0.
        feature_layer: layer of P whose output is F; "" = what enters global pooling, of which the class activation
            features are an exact decomposition of the winning logit; "last_conv" = the last convolution, as in the
            authors' code. Where P does not pool by the mean, F is its embedding, a map of one place.
        legacy_cam: whether CAFA compares features as in the authors' code, see `losses.released_maps`.
        dynamic: whether step 1 is taken at each step and on the whole path.
        clean_fraction: chance of an image to come as it is in place of x'.
        reset_each_epoch: whether the optimizers begin anew at each epoch, but for their learning rates (in a run).
        coupled_decay: factor of the kernels in their gradients, in C and D.
        denoiser_width: channels of the first stage of C, where it is made here.
        critic_width: the same of D.
        legacy_stride: whether C halves the side on its way up too, as in the authors' code.

    Source: the code released with CAFD (Zhou et al. 2021, ICCV; arXiv 2104.09197), and summaries of the paper,
    whose text was not at hand: results are those of a re-implementation. Deviations: CAFA compares features as they
    are, not rectified, scaled by the extremes of the batch and resized; the term of the weights has a gradient,
    theirs, of the predicted class's column, has none (`weight_term="hard"`), so that theirs matches features alone;
    features are compared at their own size; F enters global pooling, theirs is the last convolution; C halves no
    side on its way up and starts as the identity; each batch passes C once at a step, theirs twice; decay is of
    kernels alone; optimizers keep their moments; 40 steps of CAFA, theirs 100. `--defense_preset=released` sets
    theirs, but for the decay, the identity, the passes, the size of features, initial weights and the momentum of
    C's batch normalisation; and in a WideResNet its last convolution is that of the branch, theirs the sum behind
    it. Images are attacked, and C trained, as they are, without augmentation, unless `dynamic`. `lam_p` and
    `dynamic` are no part of the released method.
    """

    caveat = (
        "CAFD is a denoiser in front of a classifier, and adds no robustness against those who know of it: accuracy "
        "under attacks that do not is no measure of robustness."
    )
    terms: tuple[str, ...] = ()
    own_objective = FEATURE_DISTANCE
    own_attack = "cafa"
    monitor = "restoration"
    parts = ("backbone", "denoiser", "critic")
    deployed = ("backbone", "denoiser")
    trained = "denoiser"
    presets: ClassVar[Mapping[str, Preset]] = {
        "released": Preset(
            {
                "weight_term": "hard",
                "feature_layer": "last_conv",
                "legacy_cam": True,
                "legacy_stride": True,
                "reset_each_epoch": True,
            },
            steps=100,
        )
    }
    settings = (
        "lam_f",
        "lam_w",
        "lam_a",
        "lam_p",
        "weight_term",
        "temperature",
        "feature_layer",
        "legacy_cam",
        "dynamic",
        "clean_fraction",
        "reset_each_epoch",
        "coupled_decay",
        "denoiser_width",
        "critic_width",
        "legacy_stride",
    )
    run_settings = ("classifier", "classifier_epochs", "crafted", "crafted_examples")

    def __init__(
        self,
        backbone: keras.Model,
        *,
        attack: PGD,
        classifier: Optional[keras.Model] = None,
        denoiser: Optional[keras.Model] = None,
        critic: Optional[keras.Model] = None,
        lam_f: float = 1e3,
        lam_w: float = 1e-3,
        lam_a: float = 5e-3,
        lam_p: float = 0.0,
        weight_term: str = "soft",
        temperature: float = 1.0,
        feature_layer: str = "",
        legacy_cam: bool = False,
        dynamic: bool = False,
        clean_fraction: float = 0.0,
        reset_each_epoch: bool = False,
        coupled_decay: float = 2e-4,
        denoiser_width: int = 64,
        critic_width: int = 32,
        legacy_stride: bool = False,
        **kwargs: Any,
    ) -> None:
        weights = {"lam_f": lam_f, "lam_w": lam_w, "lam_a": lam_a, "lam_p": lam_p, "coupled_decay": coupled_decay}
        _check(weights, temperature=temperature, clean_fraction=clean_fraction)
        losses.check_weight_term(weight_term)
        image_shape, classes = tuple(backbone.input_shape[1:]), backbone.output_shape["logits"][-1]
        if classifier is not None:
            backbone = backbones.fitted(classifier, image_shape=image_shape, classes=classes)
        super().__init__(teaching.frozen_copy(backbone), attack=attack, **kwargs)
        if not dynamic and (self.warmup_steps or self.ramp_steps):
            raise UsageError("warm-up and a rising radius are for attacks while training: pass --defense_dynamic")
        self.lam_f, self.lam_w, self.lam_a, self.lam_p = lam_f, lam_w, lam_a, lam_p
        self.weight_term, self.temperature, self.feature_layer = weight_term, temperature, feature_layer
        self.legacy_cam, self.is_dynamic, self.clean_fraction = legacy_cam, dynamic, clean_fraction
        self.reset_each_epoch, self.coupled_decay = reset_each_epoch, coupled_decay
        self.denoiser_width, self.critic_width, self.legacy_stride = denoiser_width, critic_width, legacy_stride
        self.features = ActivationFeatures(self.backbone, feature_layer, released=legacy_cam)
        precision, l2 = backbones.precision_of(self.backbone), coupled_decay / 2
        self.denoiser = denoiser or backbones.with_precision(
            backbones.residual_unet(image_shape, width=denoiser_width, legacy_stride=legacy_stride, l2=l2),
            precision,
            but="residual",
        )
        if self.denoiser.output_shape[1:] != image_shape:
            raise UsageError(f"the denoiser must give {image_shape}, not {self.denoiser.output_shape[1:]}")
        if critic is not None and not lam_a:
            raise UsageError("with lam_a=0 nothing is learnt from a critic; leave critic out")
        self.critic = critic
        if lam_a and critic is None:
            made = backbones.critic(image_shape, width=critic_width, l2=l2)
            self.critic = backbones.with_precision(made, precision, but="critic_logit")
        self.terms += ("feature_loss",) if lam_f else ()
        self.terms += ("weight_loss",) if lam_w and weight_term != "joint" else ()
        self.terms += ("pixel_loss",) if lam_p else ()
        self.terms += ("adversarial_loss", "critic_loss") if lam_a else ()
        if not self.terms:
            raise UsageError("with lam_f, lam_w, lam_a and lam_p all 0 there is nothing to train a denoiser by")

    @classmethod
    def stages(cls, run: config.Run) -> tuple[Stage, ...]:
        """Return the training of the classifier, on clean images."""
        return (teaching.classifier_stage(run),)

    @classmethod
    def crafts_before(cls, own: config.Defense) -> bool:
        """Return whether images are attacked once before training, as they are without `dynamic`."""
        return not own.dynamic

    # The defended path.

    def call(self, image: tf.Tensor, training: bool = False, seed: Optional[tf.Tensor] = None) -> tf.Tensor:
        """Return logits [batch, classes] of `image` [batch, h, w, c], denoised."""
        del seed
        return self.backbone(self.denoised(image, training=training), training=False)["logits"]

    def denoised(self, image: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Return images [batch, h, w, c] in [0, 1] without what the denoiser takes for a perturbation."""
        return tf.clip_by_value(image + self.denoiser(image, training=training), 0.0, 1.0)

    def activations(self, image: tf.Tensor) -> Activations:
        """Return the named outputs of the classifier for denoised images."""
        return self.bare_activations(self.denoised(image))

    def bare_activations(self, image: tf.Tensor) -> Activations:
        """Return the named outputs of the classifier for images as they are."""
        return self.backbone(image, training=False)

    def attack_paths(self) -> dict[str, PathFn]:
        """Return `exact`, `bpda_identity` and `oblivious`, as `purifying.purified_paths` describes them."""
        return purified_paths(self._bare_logits, lambda image, seed: self.denoised(image))

    def purification(self) -> keras.Model:
        """Return the model from images to denoised images in [0, 1], for use in front of any classifier."""
        return backbones.purifier(self.denoiser)

    def _bare_logits(self, image: tf.Tensor) -> tf.Tensor:
        return self.backbone(image, training=False)["logits"]

    # Training.

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Take one step of the algorithm in the class docstring."""
        batch = self.unpack(data)
        image_adv = self._attacked_images(data, batch)  # 1
        clean = self.features(batch.image)
        tape = None if self.awp_gamma else tf.GradientTape()  # perturbed weights take a pass of their own

        def denoise() -> tf.Tensor:
            return image_adv + self.denoiser(image_adv, training=True)

        if tape is None:
            denoised = denoise()
        else:
            with tape:
                denoised = denoise()  # 2
        if self.critic is not None:
            self._descend_critic(batch.image, tf.stop_gradient(denoised))  # 3

        def forward() -> tuple[Terms, Any]:
            image = denoise() if tape is None else denoised
            features, logits = self.features(image)
            terms = self._terms((features, logits), clean, image, batch.image)
            if self.critic is not None:
                judged = [self._judged(each) for each in (batch.image, image)]
                terms["adversarial_loss"] = self.lam_a * losses.adversarial_loss(*judged)
            return terms, logits

        logits = self.descend(forward, tape=tape)  # 4
        return self.report(batch.label, adversarial=logits if is_labelled(data) else None)

    def _attacked_images(self, data: Any, batch: Batch) -> tf.Tensor:
        """Return the attacked images of a batch, that came with it or are crafted now; some of them left clean."""
        image_adv = data[IMAGE_ADV] if self._is_attacked(data) else self.craft(batch, self.attack)
        if not self.clean_fraction:
            return image_adv
        draws = seeds.uniform(
            seeds.per_example(self.seed, _SPARED - self.step, batch.index), tf.zeros_like(batch.index), 1
        )
        return tf.where(draws[:, :, None, None] < self.clean_fraction, batch.image, image_adv)

    def _is_attacked(self, data: Any) -> bool:
        """Return whether a batch brings its images as they were attacked before, and they are of use."""
        return not self.is_dynamic and isinstance(data, Mapping) and IMAGE_ADV in data

    def _descend_critic(self, image: tf.Tensor, denoised: tf.Tensor) -> None:
        """Take step 3."""

        def forward() -> tuple[Terms, None]:
            return {"critic_loss": losses.critic_loss(self._judged(image), self._judged(denoised))}, None

        self.descend(forward, optimizer=1)

    def _judged(self, image: tf.Tensor) -> tf.Tensor:
        """Return the critic's logits [batch], in training mode."""
        critic: Any = self.critic
        return critic(image, training=True)[:, 0]

    def _terms(self, denoised: Any, clean: Any, image: tf.Tensor, target: tf.Tensor) -> dict[str, tf.Tensor]:
        """Return the terms of step 4 but the critic's, those of weight 0 left out."""
        terms = losses.class_activation_terms(
            denoised,
            clean,
            self.features.kernel,
            lam_f=self.lam_f,
            lam_w=self.lam_w,
            weight_term=self.weight_term,
            temperature=self.temperature,
        )
        terms["pixel_loss"] = self.lam_p * _mean_square(image - target)
        return {name: each for name, each in terms.items() if name in self.terms}

    def craft(
        self, batch: Batch, attack: PGD, *, loss_fn: Optional[LossFn] = None, context: Context = None
    ) -> tf.Tensor:
        """Return adversarial images as `Defense.craft` does, by default by step 1 of the algorithm."""
        if loss_fn is None:
            loss_fn, context = self._goal(batch)
        return super().craft(batch, attack, loss_fn=loss_fn, context=context)

    def craft_before(self, batch: Batch) -> tf.Tensor:
        """Return what step 1 makes of images before training: the same of an image whenever it is asked for."""
        loss_fn, context = self._goal(batch)
        seed = seeds.per_example(self.seed, _BEFORE, batch.index)
        return self._search(self.attack, loss_fn, batch.image, context, seed)

    def craft_settings(self) -> dict[str, Any]:
        """Return by name what `craft_before` depends on besides the backbone, the attack and the batch."""
        own = ("legacy_cam", "feature_layer")
        return {**super().craft_settings(), **{name: getattr(self, name) for name in own}}

    def _goal(self, batch: Batch) -> tuple[LossFn, Context]:
        """Return the objective of step 1 and what it needs of each image."""
        if self.objective == FEATURE_DISTANCE:
            reference = tf.stop_gradient(self.features.weighted(batch.image))
            context = {"reference": reference}
            feature_fn = self.features.weighted
            if self.is_dynamic:
                return OBJECTIVES[FEATURE_DISTANCE](lambda image: feature_fn(self.denoised(image))), context
            return OBJECTIVES[FEATURE_DISTANCE](feature_fn), context
        logits_fn, context = (self._logits if self.is_dynamic else self._bare_logits), {"label": batch.label}
        if self.objective == "kl_divergence":
            context["logits"] = tf.stop_gradient(logits_fn(batch.image))
        return OBJECTIVES[self.objective](logits_fn), context

    def unpack(self, data: Any) -> Batch:
        """Return the checked batch in `data`, which may lack labels: a dict without them, or images alone."""
        return super().unpack(data if is_labelled(data) else with_labels(data))

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Measure `restoration`, the terms of step 4 but the critic's on attacked images, negative, beside accuracy.

        With no such term it is minus the mean squared distance of pixels. Accuracy is measured where there are labels.
        """
        batch = self.unpack(data)
        image_adv = data[IMAGE_ADV] if self._is_attacked(data) else self.craft_before(batch)
        denoised = image_adv + self.denoiser(image_adv, training=False)
        terms = self._terms(self.features(denoised), self.features(batch.image), denoised, batch.image)
        self.means["restoration"].update_state(
            -tf.add_n(list(terms.values()) or [_mean_square(denoised - batch.image)])
        )
        accuracies = super().test_step(data) if is_labelled(data) else {}
        return {**accuracies, "restoration": self.means["restoration"].result()}

    def begin_epoch(self) -> None:
        """With `reset_each_epoch`, have the optimizers forget what they have gathered, their count of steps too."""
        for optimizer, _ in self.optimizers() if self.reset_each_epoch else ():
            forgetting.forget(optimizer)

    # What training shows and an evaluation asks.

    def pictured(self, batch: Batch) -> tf.Tensor:
        """Return what step 1 makes of images."""
        return self.craft_before(batch)

    def drawn(self, image: tf.Tensor) -> dict[str, tf.Tensor]:
        """Return images denoised, and by how much they were changed, grey where not, black and white by the radius."""
        denoised = self.denoised(image)
        residual = 0.5 + (denoised - image) / (2 * self.attack.epsilon + 1e-12)
        return {"denoised": denoised, "residual": tf.clip_by_value(residual, 0.0, 1.0)}

    def internals(self, batch: Batch, image_adv: tf.Tensor, attack: PGD, seed: int) -> dict[str, tf.Tensor]:
        """Return how far features are off, layer by layer of the classifier, after an attack that knows nothing of C.

        `error_<number>_<layer>`: the distance of the layer's output for attacked and denoised images from that for the
        clean ones, over the length of the latter; number 00 is the image. `undenoised_error_<number>_<layer>`: the same
        without the denoiser. The attack is `attack` on the cross-entropy of the classifier alone.
        """
        del image_adv
        start = seeds.per_example(seed, -1, batch.index)
        goal = OBJECTIVES["cross_entropy"](self._bare_logits)
        attacked = self._search(attack, goal, batch.image, {"label": batch.label}, start)
        figures = inside.layer_errors(self.backbone, batch.image, self.denoised(attacked))
        undenoised = inside.layer_errors(self.backbone, batch.image, attacked)
        return {**figures, **{f"undenoised_{name}": each for name, each in undenoised.items()}}

    # Keras.

    def compile(self, optimizer: Any = "adam", **kwargs: Any) -> None:
        """Set the optimizer, and one of the same settings for the critic."""
        super().compile(optimizer=optimizer, **kwargs)
        if self.reset_each_epoch:
            for each, _ in self.optimizers():
                forgetting.follow(each, self.step)
        self.means["restoration"] = keras.metrics.Mean(name="restoration")

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument; the classifier is the backbone."""
        own = {name: getattr(self, name) for name in self.settings if name != "dynamic"}  # which Keras has a use for
        return {**super().get_config(), **own, "dynamic": self.is_dynamic, "classifier": None}


def _mean_square(difference: tf.Tensor) -> tf.Tensor:
    return tf.reduce_mean(tf.square(difference), axis=(1, 2, 3))


def _check(weights: Mapping[str, float], *, temperature: float, clean_fraction: float) -> None:
    for name, weight in weights.items():
        if not weight >= 0:
            raise UsageError(f"{name} must be at least 0, not {weight}")
    if not temperature > 0:
        raise UsageError(f"temperature must be above 0, not {temperature}")
    if not 0 <= clean_fraction < 1:
        raise UsageError(f"clean_fraction must be in [0, 1), not {clean_fraction}")
