"""AToP: a random transform and a purifier before a frozen classifier, the purifier tuned through it under attack."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Optional

import keras
import tensorflow as tf

from kerasdefense import backbones, config, losses
from kerasdefense.attacks import PGD, seeds
from kerasdefense.attacks.wrappers import FIXED_NOISE, draws_of, fixed_noise
from kerasdefense.defenses import crafting, teaching
from kerasdefense.defenses.base import ADVERSARIAL_ACCURACY, CLEAN_ACCURACY, Defense
from kerasdefense.defenses.batch import Batch
from kerasdefense.defenses.descent import Terms
from kerasdefense.defenses.preset import Preset
from kerasdefense.defenses.purifying import purified_paths
from kerasdefense.defenses.stage import Stage
from kerasdefense.layers import RandomTransform, fresh_seeds
from kerasdefense.types import Activations, Context, LossFn, PathFn, UsageError

RESTORATION = "restoration"
_ATTACK, _UPDATE, _VALIDATION, _PICTURES, _VALIDATION_ATTACK = -1, -2, -3, -4, -5
"""Which of an example's draws: of the attack at a step, of the update where that has its own, and the others'."""


@keras.saving.register_keras_serializable(package="kerasdefense")
class AToP(Defense):
    """Adversarial training on purification: destroy perturbations at random, restore the image, classify.

    f, the classifier, is trained before and frozen, BatchNormalization in inference mode; t is a random transform, see
    `layers.RandomTransform`; g, the purifier, restores images from what t leaves of them; D, the critic, tells restored
    images from real ones. With `lam_ce=0` g is pre-trained: steps 1 and 5 fall away, and x' is the clean image.

    1. Draw the noise of t for each image x, and attack f(g(t(x))) under it (`attack_through`), which gives x'.
    2. `(y1, y2) = g(t(x'))`, under the same draw (`share_noise`) or another.
    3. Descend with D on the hinge loss `mean max(0, 1 - D(x, m)) / 2 + mean max(0, 1 + D(y2, m)) / 2`, m the mask.
    4. Descend with g on `lam_l1 (mean |x - y1| + mean |x - y2|) - lam_gan mean D(y2, m)`,
    5. plus `lam_ce CE(f(y2), label)` after the warm-up, in which x' is the clean image.

    The whole path `f(g(t(x)))` is evaluated and exported, with fresh noise at each call.

    Args:
        backbone: functional Keras model from image to `feature_map`, `embedding` and `logits`.
        attack: that of step 1.
        classifier: f, with the outputs of a backbone, of which a copy is kept; None = `backbone`.
        purifier: g, from `[image, mask]` to `coarse` and `refined`, y1 and y2; None = `backbones.build_purifier`.
        critic: D, from `[image, mask]` to judgements; None = `backbones.patch_critic`. Without `lam_gan` there is none.
        rt: the transform, 1, 2 or 3, or 0 for none; training takes RT2 for RT3, whose one purifier serves all passes.
        sigma: its noise, as `layers.RandomTransform` has it, as the next four.
        missing_rate: share of blocks left out.
        block_size: pixels along the side of a block; 0 = an eighth of the image's.
        masks: passes of RT3.
        mask_scope: "image" or "batch", in training; what is deployed draws for each image.
        attack_through: "classifier", f alone, which does not know of g; "pipeline", all of it under one draw; or
            "pipeline-eot", the mean over `eot_draws`.
        eot_draws: draws of "pipeline-eot", the first of which is that of step 2 where noise is shared.
        share_noise: whether step 2 has the draw of step 1.
        lam_ce: weight of the cross-entropy, at least 0, as the others.
        lam_l1: weight of the distance, in units of the [0, 1] range.
        lam_gan: weight of the critic's judgement; 0 = no critic.
        recon_input: what y1 and y2 of step 4 are restored from, "adv" (x') or "clean" (x).
        recon_target: what they should be, "clean" (x) or "adv" (x').
        votes: draws whose mean probabilities are the answer; `call` returns their logarithm where it is above 1.
        validation_draws: draws over which the validation attack follows the mean.
        purifier_name: key of PURIFIERS, where g is made here.
        purifier_width: its width; 0 = its own.
        critic_width: channels of the first layer of D.

    Source: Lin et al. 2024, "Adversarial training on purification (AToP): advancing both robustness and
    generalization", ICLR; its released code and public discussion, the text itself was not at hand: results are those
    of a re-implementation. Deviations: perturbations are made through the whole path, theirs on f alone; the critic
    moves g, theirs does not (y2 is detached); each image has a mask of its own, theirs each batch; images are purified
    at their own size, theirs at 256 pixels; in the warm-up images are not attacked; g starts from no other data's
    weights. `--defense_preset=released` with `--attack_name=fgsm` undoes the first three.
    """

    caveat = (
        "AToP draws at random: part of what stands under attack is chance, and falls where an attacker may try again "
        "or hold the noise fixed."
    )
    terms: tuple[str, ...] = ()
    parts = ("backbone", "purifier", "critic")
    deployed = ("backbone", "purifier")
    trained = "purifier"
    answers_by = ("rt", "sigma", "missing_rate", "block_size", "masks", "votes")
    presets: ClassVar[Mapping[str, Preset]] = {
        "released": Preset({"attack_through": "classifier", "lam_ce": 0.05, "lam_gan": 0.0, "mask_scope": "batch"})
    }
    settings = (
        "rt",
        "sigma",
        "missing_rate",
        "block_size",
        "masks",
        "mask_scope",
        "attack_through",
        "eot_draws",
        "share_noise",
        "lam_ce",
        "lam_l1",
        "lam_gan",
        "recon_input",
        "recon_target",
        "votes",
        "validation_draws",
        "purifier_name",
        "purifier_width",
        "critic_width",
    )
    run_settings = ("classifier", "classifier_epochs", "purifier", "pretrain_epochs")

    def __init__(
        self,
        backbone: keras.Model,
        *,
        attack: PGD,
        classifier: Optional[keras.Model] = None,
        purifier: Optional[keras.Model] = None,
        critic: Optional[keras.Model] = None,
        rt: int = 2,
        sigma: float = 0.25,
        missing_rate: float = 0.25,
        block_size: int = 0,
        masks: int = 4,
        mask_scope: str = "image",
        attack_through: str = "pipeline",
        eot_draws: int = 2,
        share_noise: bool = True,
        lam_ce: float = 0.1,
        lam_l1: float = 2.0,
        lam_gan: float = 0.01,
        recon_input: str = "adv",
        recon_target: str = "clean",
        votes: int = 1,
        validation_draws: int = 8,
        purifier_name: str = "gated_unet",
        purifier_width: int = 0,
        critic_width: int = 32,
        **kwargs: Any,
    ) -> None:
        _check_weights({"lam_ce": lam_ce, "lam_l1": lam_l1, "lam_gan": lam_gan})
        _check_counts({"eot_draws": eot_draws, "votes": votes, "validation_draws": validation_draws})
        _check_choices(attack_through, recon_input, recon_target)
        image_shape, classes = tuple(backbone.input_shape[1:]), backbone.output_shape["logits"][-1]
        if classifier is not None:
            backbone = backbones.fitted(classifier, image_shape=image_shape, classes=classes)
        super().__init__(teaching.frozen_copy(backbone), attack=attack, **kwargs)
        self.rt, self.sigma, self.missing_rate, self.block_size = rt, sigma, missing_rate, block_size
        self.masks, self.mask_scope = masks, mask_scope
        self.attack_through, self.eot_draws, self.share_noise = attack_through, eot_draws, share_noise
        self.lam_ce, self.lam_l1, self.lam_gan = lam_ce, lam_l1, lam_gan
        self.recon_input, self.recon_target = recon_input, recon_target
        self.votes, self.validation_draws = votes, validation_draws
        self.purifier_name, self.purifier_width, self.critic_width = purifier_name, purifier_width, critic_width
        blocks: dict[str, Any] = {
            "sigma": sigma,
            "missing_rate": missing_rate,
            "block_size": block_size,
            "masks": masks,
        }
        self.transform = RandomTransform(rt, **blocks)
        self.training_transform = RandomTransform(min(rt, 2), scope=mask_scope, **blocks)
        if rt:
            self.transform.grid(*image_shape[:2])
        precision = backbones.precision_of(self.backbone)
        self.purifier = purifier or backbones.with_precision(
            backbones.build_purifier(purifier_name, image_shape, width=purifier_width), precision
        )
        backbones.check_purifier(self.purifier, image_shape)
        if critic is not None and not lam_gan:
            raise UsageError("with lam_gan=0 nothing is learnt from a critic; leave critic out")
        self.critic = critic
        if lam_gan and critic is None:
            self.critic = backbones.with_precision(
                backbones.patch_critic(image_shape, width=critic_width), precision, but="judgements"
            )
        self.terms += ("cross_entropy_loss",) if lam_ce else ()
        self.terms += ("reconstruction_loss",) if lam_l1 else ()
        self.terms += ("adversarial_loss", "critic_loss") if lam_gan else ()
        if not self.terms:
            raise UsageError("with lam_ce, lam_l1 and lam_gan all 0 there is nothing to train a purifier by")

    @classmethod
    def stages(cls, run: config.Run) -> tuple[Stage, ...]:
        """Return the training of the classifier on clean images, and the pre-training of the purifier."""
        own = run.defense
        found = [teaching.classifier_stage(run)]
        unset = config.Defense()
        for name in ("pretrain_epochs", "purifier_name", "purifier_width") if own.purifier else ():
            if getattr(own, name) != getattr(unset, name):
                raise UsageError(
                    f"--defense_{name} is for a purifier that is made here; leave it or --defense_purifier out"
                )
        if not own.lam_ce and own.pretrain_epochs >= 0:
            raise UsageError("--defense_lam_ce=0 is pre-training itself: leave --defense_pretrain_epochs out")
        if own.purifier or (own.lam_ce and own.pretrain_epochs):
            found.append(_purifier_stage(run))
        return tuple(found)

    @classmethod
    def draws_at_random(cls, own: config.Defense) -> bool:
        """Return whether the transform of these settings draws anything."""
        settings: dict[str, Any] = {
            name: getattr(own, name) for name in ("sigma", "missing_rate", "block_size", "masks")
        }
        return RandomTransform(own.rt, **settings).is_random

    # The defended path.

    @property
    def is_randomized(self) -> bool:
        """Whether two calls differ."""
        return self.transform.is_random

    @property
    def monitor(self) -> str:  # type: ignore[override]
        """Accuracy under attack, or where nothing is learnt of labels, how well images are restored."""
        return ADVERSARIAL_ACCURACY if self.lam_ce else RESTORATION

    def call(self, image: tf.Tensor, training: bool = False, seed: Optional[tf.Tensor] = None) -> tf.Tensor:
        """Return logits [batch, classes] of `image` [batch, h, w, c], purified.

        Args:
            image: float32 in [0, 1].
            training: of no effect: all of it is in inference mode.
            seed: int32 [batch, 2], what each image is transformed by; None = fresh noise.
        """
        del training
        if self.votes == 1 or not self.is_randomized:
            return self._one_draw(image, seed)
        seed = fresh_seeds(image) if seed is None else seed
        logits = draws_of(self._one_draw, image, seed, self.votes)
        log_probability = tf.reshape(tf.nn.log_softmax(logits), [-1, self.votes, logits.shape[-1]])
        return tf.reduce_logsumexp(log_probability, axis=1) - math.log(self.votes)

    def purified(self, image: tf.Tensor, seed: Optional[tf.Tensor] = None) -> tf.Tensor:
        """Return images [batch, h, w, c] in [0, 1], transformed by `seed` or by fresh noise, and restored."""
        return backbones.purified(self.transform, self.purifier, image, seed)

    def activations(self, image: tf.Tensor) -> Activations:
        """Return the named outputs of the classifier for images purified by fresh noise."""
        return self.bare_activations(self.purified(image))

    def bare_activations(self, image: tf.Tensor) -> Activations:
        """Return the named outputs of the classifier for images as they are."""
        return self.backbone(image, training=False)

    def attack_paths(self) -> dict[str, PathFn]:
        """Return `exact`, `bpda_identity` and `oblivious`, and of a path that draws at random `fixed_noise` too."""
        paths = purified_paths(self._bare_logits, self.purified)
        if not self.is_randomized:
            return paths

        def exact(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
            return self(image, training=False, seed=seed)

        return {**paths, "exact": exact, FIXED_NOISE: fixed_noise(exact)}

    def purification(self) -> keras.Model:
        """Return the model from images to purified images in [0, 1], for use in front of any classifier."""
        return backbones.Purification(self.transform, self.purifier, name="purification")

    def _bare_logits(self, image: tf.Tensor) -> tf.Tensor:
        return self.backbone(image, training=False)["logits"]

    def _one_draw(self, image: tf.Tensor, seed: Optional[tf.Tensor]) -> tf.Tensor:
        return self._bare_logits(self.purified(image, seed))

    def _one_training_draw(self, image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return self._bare_logits(backbones.purified(self.training_transform, self.purifier, image, seed))

    # Training.

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Take one step of the algorithm in the class docstring."""
        batch = self.unpack(data)
        image_adv = self.craft(batch, self.attack) if self.lam_ce else batch.image  # 1
        seed = self._draw(batch, _ATTACK if self.share_noise else _UPDATE)
        target = batch.image if self.recon_target == "clean" else image_adv
        given, mask = self.training_transform(batch.image if self.recon_input == "clean" else image_adv, seed)
        tape = None if self.awp_gamma else tf.GradientTape()  # perturbed weights take a pass of their own

        def restore() -> Mapping[str, tf.Tensor]:
            return self.purifier([given, mask], training=True)

        if tape is None:
            restored = restore()
        else:
            with tape:
                restored = restore()  # 2
        if self.critic is not None:
            self._descend_critic(target, tf.stop_gradient(restored["refined"]), mask)  # 3

        def forward() -> tuple[Terms, Any]:
            found = restore() if tape is None else restored
            terms = self._restoring_terms(found, target, mask)  # 4
            if not self.lam_ce:
                return terms, None
            is_known = self.recon_input == "adv"
            logits = self._bare_logits(found["refined"]) if is_known else self._one_training_draw(image_adv, seed)
            cross_entropy = losses.cross_entropy(logits, batch.label, smoothing=self.label_smoothing)
            is_on = tf.cast(self.step >= self.warmup_steps, tf.float32)
            return {"cross_entropy_loss": self.lam_ce * is_on * cross_entropy, **terms}, logits  # 5

        logits = self.descend(forward, tape=tape)
        return self.report(batch.label, adversarial=logits)

    def craft(
        self, batch: Batch, attack: PGD, *, loss_fn: Optional[LossFn] = None, context: Context = None
    ) -> tf.Tensor:
        """Return adversarial images as `Defense.craft` does, by default by step 1 of the algorithm."""
        if loss_fn is None:
            loss_fn, context = self._goal(batch)
        return super().craft(batch, attack, loss_fn=loss_fn, context=context)

    def _goal(self, batch: Batch) -> tuple[LossFn, Context]:
        """Return the objective of step 1 and what it needs of each image."""
        seed, context = self._draw(batch, _ATTACK), {"label": batch.label}
        is_blind = self.attack_through == "classifier"
        draws = self.eot_draws if self.attack_through == "pipeline-eot" else 1

        def path(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
            return self._bare_logits(image) if is_blind else self._one_training_draw(image, seed)

        if self.objective == "kl_divergence":
            context["logits"] = tf.stop_gradient(path(batch.image, seed))
        return crafting.mean_loss(self.objective, path, seed, draws), context

    def _draw(self, batch: Batch, which: int) -> tf.Tensor:
        """Return seeds int32 [batch, 2] of this step for one of its uses."""
        seed = seeds.per_example(self.seed, self.step, batch.index)
        return seeds.advance(seed, tf.fill(tf.shape(batch.index), which))

    def _descend_critic(self, real: tf.Tensor, fake: tf.Tensor, mask: tf.Tensor) -> None:
        """Take step 3."""
        critic: Any = self.critic

        def forward() -> tuple[Terms, None]:
            judged = [critic([each, mask], training=True) for each in (real, fake)]
            return {"critic_loss": losses.hinge_critic_loss(*judged)}, None

        self.descend(forward, optimizer=1)

    def _restoring_terms(
        self, restored: Mapping[str, tf.Tensor], target: tf.Tensor, mask: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Return the terms of step 4, those of weight 0 left out."""
        terms = {}
        if self.lam_l1:
            terms["reconstruction_loss"] = self.lam_l1 * _distance(restored, target)
        if self.critic is not None:
            judged = self.critic([restored["refined"], mask], training=False)
            terms["adversarial_loss"] = self.lam_gan * losses.hinge_adversarial_loss(judged)
        return terms

    @property
    def attack_budget(self) -> int:
        """Input gradients that training spends on an image."""
        if not self.lam_ce:
            return 0
        return super().attack_budget * (self.eot_draws if self.attack_through == "pipeline-eot" else 1)

    # Validation.

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Measure accuracy, clean and under the validation attack with EOT, by one fresh draw; the same at every call.

        Where nothing is learnt of labels, measure `restoration`, the distance of step 4, negative, in its place.
        """
        batch = self.unpack(data)
        seed = seeds.per_example(self.seed, _VALIDATION, batch.index)
        if not self.lam_ce:
            given, mask = self.training_transform(batch.image, seed)
            distance = _distance(self.purifier([given, mask], training=False), batch.image)
            self.means[RESTORATION].update_state(-distance)
            return {RESTORATION: self.means[RESTORATION].result()}
        for name, image in ((CLEAN_ACCURACY, batch.image), (ADVERSARIAL_ACCURACY, self.attacked(batch))):
            self._record_accuracy(name, self(image, training=False, seed=seed), batch.label)
        return {name: self.means[name].result() for name in (CLEAN_ACCURACY, ADVERSARIAL_ACCURACY)}

    def attacked(self, batch: Batch) -> tf.Tensor:
        """Return images [batch, h, w, c] that the validation attack finds for the mean loss of `validation_draws`.

        Each of its steps has draws of its own, but where it takes more than ten.
        """
        draws = self.validation_draws if self.is_randomized else 1
        start = seeds.per_example(self.seed, _ATTACK, batch.index)
        noise = seeds.per_example(self.seed, _VALIDATION_ATTACK, batch.index)
        goal = crafting.mean_loss("cross_entropy", self._one_draw, noise, draws, anew=True)
        return self._search(self.validation_attack, goal, batch.image, {"label": batch.label}, start)

    def drawn(self, image: tf.Tensor) -> dict[str, tf.Tensor]:
        """Return images as the transform leaves them, in its first pass, and restored; the same at every call."""
        seed = seeds.per_example(self.seed, _PICTURES, tf.range(tf.shape(image)[0]))
        transformed, _ = self.transform(image, seed)
        return {"transformed": transformed[:: self.transform.passes], "purified": self.purified(image, seed)}

    # Keras.

    def compile(self, optimizer: Any = "adam", **kwargs: Any) -> None:
        """Set the optimizer, and one of the same settings for the critic."""
        super().compile(optimizer=optimizer, **kwargs)
        self.means[RESTORATION] = keras.metrics.Mean(name=RESTORATION)

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument; the classifier is the backbone."""
        return {**super().get_config(), **{name: getattr(self, name) for name in self.settings}, "classifier": None}


def _distance(restored: Mapping[str, tf.Tensor], target: tf.Tensor) -> tf.Tensor:
    """Return the mean absolute error of both stages of a purifier, float32 [batch]."""
    stages = [tf.cast(restored[name], tf.float32) for name in ("coarse", "refined")]
    return tf.add_n([tf.reduce_mean(tf.abs(each - target), axis=(1, 2, 3)) for each in stages])


def _purifier_stage(run: config.Run) -> Stage:
    """Return the pre-training of the purifier: the same defense, without labels and attacks."""
    epochs = run.train.epochs if run.defense.pretrain_epochs < 0 else run.defense.pretrain_epochs
    of_purifier = dataclasses.replace(
        run,
        defense=dataclasses.replace(
            run.defense, lam_ce=0.0, classifier="", classifier_epochs=0, purifier="", pretrain_epochs=-1
        ),
        attack=dataclasses.replace(run.attack, warmup_epochs=0.0, ramp_epochs=0.0),
        train=dataclasses.replace(run.train, epochs=epochs, validate_every=min(run.train.validate_every, epochs)),
    )
    return Stage("purifier", of_purifier, take=backbones.purifier_in, saved=run.defense.purifier)


def _check_weights(weights: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise UsageError(f"{name} must be a finite number of at least 0, not {weight}")


def _check_counts(counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"{name} must be at least 1, not {count}")


def _check_choices(attack_through: str, recon_input: str, recon_target: str) -> None:
    if attack_through not in ("classifier", "pipeline", "pipeline-eot"):
        raise UsageError(f"attack_through must be classifier, pipeline or pipeline-eot, not {attack_through!r}")
    for name, value in (("recon_input", recon_input), ("recon_target", recon_target)):
        if value not in ("adv", "clean"):
            raise UsageError(f"{name} must be adv or clean, not {value!r}")
