"""The thin base of all defenses: a Keras model that is the whole defended path, and the verbs its training is told in.

You can do without it: attacks and evaluation take functions, not defenses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Optional

import keras
import tensorflow as tf

from kerasdefense import config
from kerasdefense.attacks import FEATURE_DISTANCE, OBJECTIVES, PGD, seeds
from kerasdefense.defenses import batch as batches
from kerasdefense.defenses import crafting, descent, forgetting, inside
from kerasdefense.defenses.averages import averages_in_place
from kerasdefense.defenses.axes import axis_paths
from kerasdefense.defenses.batch import Batch
from kerasdefense.defenses.preset import Preset
from kerasdefense.defenses.stage import Stage
from kerasdefense.types import Activations, Context, LossFn, PathFn, UsageError

CLEAN_ACCURACY = "clean_accuracy"
ADVERSARIAL_ACCURACY = "adversarial_accuracy"


class Defense(keras.Model):
    """Base class: `call` is the full defended path, `train_step` is the method's algorithm.

    A subclass names its loss terms in `terms` and writes `train_step` out of the verbs below: `unpack` the batch,
    `craft` adversarial images, `descend` on named loss terms and `report` them with the accuracies.

    Args:
        backbone: functional Keras model from image to `feature_map`, `embedding` and `logits`.
        attack: threat model, and the attack that training crafts with.
        objective: what `attack` maximises, a key of OBJECTIVES, one of TO_CLASS if `is_targeted`, else one that needs
            no target; None = the method's own.
        validation_attack: attack of `test_step` on `call`; None = PGD-10 of the same threat model.
        label_smoothing: label mass spread evenly over all classes, in [0, 1).
        awp_gamma: length of the adversarial weight perturbation relative to each kernel's norm; 0 = none.
        warmup_steps: steps on clean images before the attack starts.
        ramp_steps: steps over which the attack's radius then rises linearly to its own.
        seed: seed of the attacks' random starts.
    """

    terms: tuple[str, ...] = ("cross_entropy_loss",)
    monitor: ClassVar[str] = ADVERSARIAL_ACCURACY
    """The validation metric by which the best epoch is selected."""
    own_objective: ClassVar[str] = "cross_entropy"
    """What the method's attack maximises unless told otherwise."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Fields of `config.Defense` that are this method's own constructor arguments."""
    run_settings: ClassVar[tuple[str, ...]] = ()
    """Fields of `config.Defense` that are this method's own and no constructor arguments, such as those of stages."""
    presets: ClassVar[Mapping[str, Preset]] = {}
    """Named settings besides the recommended ones; `released` is what the authors' release sets otherwise."""
    own_attack: ClassVar[str] = "pgd"
    """The training attack that --attack_name=pgd stands for, a key of ATTACKS."""
    is_targeted: ClassVar[bool] = False
    """Whether its attack goes to a class that the method chooses, which its objective then needs."""
    needs_bank: ClassVar[bool] = False
    """Whether training draws images by class from an ExampleBank, its attribute `bank`."""
    caveat: ClassVar[str] = ""
    """What the card of a model says besides, unless enough stands under attacks that adapt to the model."""
    parts: ClassVar[tuple[str, ...]] = ("backbone",)
    """Constructor arguments that are models, or None."""
    deployed: ClassVar[tuple[str, ...]] = ("backbone",)
    """Those of them that the defended path passes."""
    trained: ClassVar[str] = ""
    """That of them which the first optimizer updates, where others stay as they are; "" = all that is trainable."""
    answers_by: ClassVar[tuple[str, ...]] = ()
    """Settings of the defended path that no weight depends on, so that a saved model may have others than flags say."""

    def __init__(
        self,
        backbone: keras.Model,
        *,
        attack: PGD,
        objective: Optional[str] = None,
        validation_attack: Optional[PGD] = None,
        label_smoothing: float = 0.0,
        awp_gamma: float = 0.0,
        warmup_steps: int = 0,
        ramp_steps: int = 0,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= label_smoothing < 1:
            raise UsageError(f"label_smoothing must be in [0, 1), not {label_smoothing}")
        if min(awp_gamma, warmup_steps, ramp_steps) < 0:
            raise UsageError("awp_gamma, warmup_steps and ramp_steps must be at least 0")
        self.backbone = backbone
        self.attack = attack
        self.objective = objective or self.own_objective
        takes_features = self.own_objective == FEATURE_DISTANCE
        crafting.check_objective(self.objective, attack, is_targeted=self.is_targeted, takes_features=takes_features)
        self.validation_attack = validation_attack or PGD(norm=attack.norm, epsilon=attack.epsilon, keep="last")
        self.label_smoothing = label_smoothing
        self.awp_gamma = awp_gamma
        self.warmup_steps = warmup_steps
        self.ramp_steps = ramp_steps
        self.seed = seed
        aggregation = tf.VariableAggregation.ONLY_FIRST_REPLICA
        self.step = tf.Variable(0, dtype=tf.int64, trainable=False, name="step", aggregation=aggregation)
        self.built = True

    @classmethod
    def stages(cls, run: config.Run) -> tuple[Stage, ...]:
        """Return what must be trained before the defense itself, in order; it is handed to the constructor by name.

        The constructor must do without it too, so that settings can be checked before anything is trained.
        """
        del run
        return ()

    @classmethod
    def draws_at_random(cls, own: config.Defense) -> bool:
        """Return whether what is trained by these settings draws at random when it is asked."""
        del own
        return False

    @classmethod
    def crafts_before(cls, own: config.Defense) -> bool:
        """Return whether every training image is attacked once, before training, by `craft_before(batch)`.

        Batches then hold images as they are, without augmentation, and `image_adv`, what that made of them.
        """
        del own
        return False

    def craft_before(self, batch: Batch) -> tf.Tensor:
        """Return what images [batch, h, w, c] are attacked to before training, the same whenever it is asked for."""
        raise NotImplementedError(f"{type(self).__name__} attacks no images before training")

    def craft_settings(self) -> dict[str, Any]:
        """Return by name what `craft_before` depends on besides the backbone, the attack and the batch."""
        return {"objective": self.objective, "seed": self.seed}

    def begin_epoch(self) -> None:
        """Do what is to be done once before each epoch of a run."""

    # What attacks, evaluation and export see.

    def call(self, image: tf.Tensor, training: bool = False, seed: Optional[tf.Tensor] = None) -> tf.Tensor:
        """Return logits [batch, classes] of `image` [batch, h, w, c]; a deterministic defense ignores `seed`."""
        del seed
        return self.backbone(image, training=training)["logits"]

    def activations(self, image: tf.Tensor) -> Activations:
        """Return the named outputs of the defended path."""
        return self.backbone(image, training=False)

    def attack_paths(self) -> dict[str, PathFn]:
        """Return the functions `(image, seed) -> logits` an evaluation must attack; `exact` is the defended path.

        Where classes are frozen axes, `axes.axis_paths` are among them.
        """

        def exact(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
            return self(image, training=False, seed=seed)

        return {"exact": exact, **axis_paths(self.backbone)}

    def purification(self) -> Optional[keras.Model]:
        """Return what images in [0, 1] pass before the classifier, as a model of its own; None if nothing."""
        return None

    def pictured(self, batch: Batch) -> tf.Tensor:
        """Return the attacked images [batch, h, w, c] that pictures of training show."""
        return self.attacked(batch)

    def drawn(self, image: tf.Tensor) -> dict[str, tf.Tensor]:
        """Return the images [batch, h, w, c] in [0, 1] that the method draws of `image`, by their names."""
        del image
        return {}

    def attention(self, image: tf.Tensor, image_adv: tf.Tensor) -> Optional[dict[str, tf.Tensor]]:
        """Return maps [batch, h, w] in [0, 1] of where a method's networks look, by their names; None if it has none.

        Args:
            image: clean images [batch, h, w, c].
            image_adv: the same, attacked.
        """
        del image, image_adv
        return None

    def internals(self, batch: Batch, image_adv: tf.Tensor, attack: PGD, seed: int) -> dict[str, tf.Tensor]:
        """Return what the method's claims of its inside are measured by: figures per image [batch], by name.

        `noise_before_block_<place>`, `noise_after_block_<place>` in ResNets: the distance of attacked from clean
        features over the length of the clean ones, around the places of denoising blocks; the same where there is none.
        `cosine_to_own_axis`, `cosine_to_other_axes`, `adversarial_cosine_to_own_axis`,
        `adversarial_cosine_to_other_axes` where the classes are frozen axes: the absolute cosine of the embedding with
        the axis of the label, and the mean of those with the others, clean and attacked.

        Args:
            batch: the images.
            image_adv: what `attack` made of them on the defended path.
            attack: for attacks on other parts.
            seed: seed of these, and of whatever else is drawn.
        """
        del attack, seed
        return {
            **inside.block_noise(self.backbone, batch.image, image_adv),
            **inside.axis_cosines(self.backbone, batch.image, image_adv, batch.label),
        }

    # The verbs of training.

    def unpack(self, data: Any) -> Batch:
        """Return the checked batch in `data`, as `batch.unpack` describes."""
        return batches.unpack(data, self.backbone.output_shape["logits"][-1])

    def craft(
        self, batch: Batch, attack: PGD, *, loss_fn: Optional[LossFn] = None, context: Context = None
    ) -> tf.Tensor:
        """Return adversarial images [batch, h, w, c] by `attack` on `loss_fn`, by default the objective on `call`.

        Their random starts are keyed by the run's seed, the step and each example's index. During the warm-up they are
        the clean images; while the radius rises, radius and step of the attack are that share of its own.
        """
        seed = seeds.per_example(self.seed, self.step, batch.index)

        def find(attack: PGD) -> tf.Tensor:
            if loss_fn is not None:
                return self._search(attack, loss_fn, batch.image, context, seed)
            own = {"label": batch.label}
            if self.objective == "kl_divergence":
                own["logits"] = tf.stop_gradient(self._logits(batch.image))
            return self._search(attack, OBJECTIVES[self.objective](self._logits), batch.image, own, seed)

        schedule = {"warmup": self.warmup_steps, "ramp": self.ramp_steps}
        return crafting.with_rising_radius(find, attack, batch.image, self.step, **schedule)

    def descend(self, forward: descent.Forward, *, optimizer: int = 0, tape: Optional[tf.GradientTape] = None) -> Any:
        """Take one optimizer step on the sum of the loss terms and return what else `forward` returns.

        With `awp_gamma` the gradient is that at perturbed weights, at the cost of one more gradient of them. Weights
        that other optimizers than the first update are not perturbed, nor are their steps counted.

        Args:
            forward: returns `(terms, outputs)`; `terms` maps names in `self.terms` to losses per example [batch],
                weights included. Terms are averaged over the global batch, regularisation losses added.
            optimizer: which of `self.optimizers()`.
            tape: has recorded what of the passes was made before; None = nothing. Not with weight perturbation.
        """
        chosen, variables = self.optimizers()[optimizer]
        awp_gamma = 0.0 if optimizer else self.awp_gamma
        terms, outputs = descent.descend(forward, self, chosen, variables, awp_gamma=awp_gamma, tape=tape)
        if not optimizer:
            self.step.assign_add(1)
        for name, term in terms.items():
            self.means[name].update_state(term)
        return outputs

    def report(
        self, label: tf.Tensor, *, clean: Optional[tf.Tensor] = None, adversarial: Optional[tf.Tensor] = None
    ) -> dict[str, tf.Tensor]:
        """Add the share of right predictions to the running means and return these, with those of the loss terms.

        Args:
            label: int32 [batch].
            clean: logits [batch, classes] of the clean images, if the step has them.
            adversarial: logits of the adversarial images, if the step has them.
        """
        names = list(self.terms)
        for name, logits in ((CLEAN_ACCURACY, clean), (ADVERSARIAL_ACCURACY, adversarial)):
            if logits is not None:
                self._record_accuracy(name, logits, label)
                names.append(name)
        return {name: self.means[name].result() for name in names}

    @property
    def attack_budget(self) -> int:
        """Input gradients that training spends on an image."""
        return self.attack.steps * self.attack.restarts

    # What every optimizer is for, and the averages that some of them keep.

    def optimizers(self) -> list[tuple[keras.optimizers.Optimizer, Sequence[Any]]]:
        """Return each optimizer with the variables that it updates, the critic's last."""
        own: list[tuple[Any, Sequence[Any]]] = [(self.optimizer, self.trainable_variables)]
        critic = self._critic()
        return own if critic is None else [*own, (self.critic_optimizer, critic.trainable_variables)]

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the averages of every optimizer that keeps some stand in for the weights."""
        return averages_in_place(self.optimizers())

    # Keras.

    @property
    def trainable_variables(self) -> list[Any]:
        """The variables of the trained part, all that Keras may hand to the first optimizer when `fit` ends."""
        return getattr(self, self.trained).trainable_variables if self.trained else super().trainable_variables

    def compile(self, optimizer: Any = "sgd", **kwargs: Any) -> None:
        """Set the optimizer, and one of the same settings for a critic; losses and metrics are the method's own.

        Scales, offsets and biases are not decayed.
        """
        optimizer = self.prepare(optimizer)
        if self._critic() is not None:
            self.critic_optimizer = self.prepare(type(optimizer).from_config(optimizer.get_config()))
        super().compile(optimizer=optimizer, **kwargs)
        for each, variables in self.optimizers():  # now, so that their slots can be restored
            each.build(variables)
        names = (*self.terms, CLEAN_ACCURACY, ADVERSARIAL_ACCURACY)
        self.means = {name: keras.metrics.Mean(name=name) for name in names}

    def prepare(self, optimizer: Any) -> keras.optimizers.Optimizer:
        """Return an optimizer that decays kernels only, and scales the loss where layers compute in float16."""
        optimizer = keras.optimizers.get(optimizer)
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        if inner.weight_decay:
            inner.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
        if inner is optimizer and crafting.computes_in_float16(self):
            return keras.mixed_precision.LossScaleOptimizer(optimizer)
        return optimizer

    def get_compile_config(self) -> Optional[dict[str, Any]]:
        """Return what `compile_from_config` needs, None if it was never compiled."""
        if self.optimizer is None:
            return None
        return {"optimizer": forgetting.serialised(self.optimizer)}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as before saving."""
        self.compile(optimizer=keras.saving.deserialize_keras_object(config["optimizer"]))

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """The running means, which `fit` resets at each epoch."""
        return list(getattr(self, "means", {}).values())

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Measure accuracy, clean and under the validation attack on `call`; never by a method's own objective."""
        batch = self.unpack(data)
        self._record_accuracy(CLEAN_ACCURACY, self._logits(batch.image), batch.label)
        self._record_accuracy(ADVERSARIAL_ACCURACY, self._logits(self.attacked(batch)), batch.label)
        return {name: self.means[name].result() for name in (CLEAN_ACCURACY, ADVERSARIAL_ACCURACY)}

    def attacked(self, batch: Batch) -> tf.Tensor:
        """Return images [batch, h, w, c] that the validation attack finds on `call`, the same at every call."""
        seed, context = seeds.per_example(self.seed, -1, batch.index), {"label": batch.label}
        cross_entropy = OBJECTIVES["cross_entropy"](self._logits)
        return self._search(self.validation_attack, cross_entropy, batch.image, context, seed)

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        plain = ("objective", "label_smoothing", "awp_gamma", "warmup_steps", "ramp_steps", "seed", "name")
        objects = (*self.parts, "attack", "validation_attack")
        return {
            **{name: keras.saving.serialize_keras_object(getattr(self, name)) for name in objects},
            **{name: getattr(self, name) for name in plain},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Optional[dict[str, Any]] = None) -> Defense:
        """Build the defense, with fresh weights, from `get_config()`."""
        config = dict(config)
        for key in (*cls.parts, "attack", "validation_attack"):
            config[key] = keras.saving.deserialize_keras_object(config[key], custom_objects=custom_objects)
        return cls(**config)

    # What the verbs are made of.

    def _critic(self) -> Optional[keras.Model]:
        """Return the attribute `critic`, a network that judges what the trained part makes, of methods that have one.

        No attribute of the class has its name, or Keras would not track the network.
        """
        return getattr(self, "critic", None)

    def _logits(self, image: tf.Tensor) -> tf.Tensor:
        return self(image, training=False)

    def _search(self, attack: PGD, loss_fn: LossFn, image: tf.Tensor, context: Context, seed: tf.Tensor) -> tf.Tensor:
        return crafting.search(attack, loss_fn, image, context, seed, float16=crafting.computes_in_float16(self))

    def _record_accuracy(self, name: str, logits: tf.Tensor, label: tf.Tensor) -> None:
        self.means[name].update_state(tf.argmax(logits, axis=-1, output_type=tf.int32) == label)
