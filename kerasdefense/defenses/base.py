"""The thin base of all defenses: a Keras model that is the whole defended path, and the verbs its training is told in.

You can do without it: attacks and evaluation take functions, not defenses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Callable, ClassVar, NamedTuple, Optional

import keras
import tensorflow as tf

from kerasdefense.attacks import OBJECTIVES, PGD, misclassified, seeds
from kerasdefense.types import Activations, Context, LossFn, PathFn, UsageError, look_up

CLEAN_ACCURACY = "clean_accuracy"
ADVERSARIAL_ACCURACY = "adversarial_accuracy"


class Batch(NamedTuple):
    """A training batch: image float32 [batch, h, w, c] in [0, 1], label int32 [batch], index int32 [batch]."""

    image: tf.Tensor
    label: tf.Tensor
    index: tf.Tensor


class Defense(keras.Model):
    """Base class: `call` is the full defended path, `train_step` is the method's algorithm.

    A subclass names its loss terms in `terms` and writes `train_step` out of the verbs below: `unpack` the batch,
    `craft` adversarial images, `descend` on named loss terms, `record` accuracies and `report` them.

    Args:
        backbone: functional Keras model from image to `feature_map`, `embedding` and `logits`.
        attack: threat model, and the attack that training crafts with.
        objective: what `attack` maximises, a key of OBJECTIVES that needs no target.
        validation_attack: attack of `test_step` on `call`; None = PGD-10 of the same threat model.
        label_smoothing: label mass spread evenly over all classes, in [0, 1).
        seed: seed of the attacks' random starts.
    """

    terms: ClassVar[tuple[str, ...]] = ("cross_entropy_loss",)
    monitor: ClassVar[str] = ADVERSARIAL_ACCURACY
    """The validation metric by which the best epoch is selected."""

    def __init__(
        self,
        backbone: keras.Model,
        *,
        attack: PGD,
        objective: str = "cross_entropy",
        validation_attack: Optional[PGD] = None,
        label_smoothing: float = 0.0,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= label_smoothing < 1:
            raise UsageError(f"label_smoothing must be in [0, 1), not {label_smoothing}")
        look_up(OBJECTIVES, objective, "objective")
        if objective.startswith("targeted"):
            raise UsageError(f"objective {objective} needs targets; training attacks take an untargeted one")
        self.backbone = backbone
        self.attack = attack
        self.objective = objective
        self.validation_attack = validation_attack or PGD(norm=attack.norm, epsilon=attack.epsilon, keep="last")
        self.label_smoothing = label_smoothing
        self.seed = seed
        self.step = tf.Variable(
            0,
            dtype=tf.int64,
            trainable=False,
            name="step",
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )
        self.built = True

    # What attacks, evaluation and export see.

    def call(self, image: tf.Tensor, training: bool = False, seed: Optional[tf.Tensor] = None) -> tf.Tensor:
        """Return logits [batch, classes] of `image` [batch, h, w, c]; a deterministic defense ignores `seed`."""
        del seed
        return self.backbone(image, training=training)["logits"]

    def activations(self, image: tf.Tensor) -> Activations:
        """Return the named outputs of the defended path."""
        return self.backbone(image, training=False)

    def attack_paths(self) -> dict[str, PathFn]:
        """Return the functions `(image, seed) -> logits` an evaluation must attack; `exact` is the defended path."""

        def exact(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
            return self(image, training=False, seed=seed)

        return {"exact": exact}

    # The verbs of training.

    def unpack(self, data: Any) -> Batch:
        """Return the batch in `data`: a dict with image, label and index, or a plain `(image, label)`.

        Plain data carry no index; an example's place in the global batch stands in for it. Images outside [0, 1] or
        labels outside [0, classes) stop the step.
        """
        if isinstance(data, Mapping):
            image, label, index = data["image"], data["label"], data["index"]
        else:
            image, label, weight = keras.utils.unpack_x_y_sample_weight(data)
            if weight is not None:
                raise UsageError("sample and class weights are not used by any defense; pass plain (image, label)")
            size = tf.shape(image)[0]
            index = tf.range(size) + size * tf.cast(_replica().replica_id_in_sync_group, tf.int32)
        image, label = tf.cast(image, tf.float32), tf.cast(label, tf.int32)
        if label.shape.rank == 2 and label.shape[1] == 1:
            label = label[:, 0]
        if label.shape.rank != 1:
            raise UsageError(f"labels must be class numbers of shape [batch], not {label.shape}, not one-hot")
        classes = self.backbone.output_shape["logits"][-1]
        checks = [
            tf.debugging.Assert(
                tf.reduce_all((image >= 0) & (image <= 1)),
                ["images must be in [0, 1] and not NaN; scale them before training"],
            ),
            tf.debugging.Assert(
                tf.reduce_all((label >= 0) & (label < classes)),
                [f"labels must be in [0, {classes}), one class of the model each"],
            ),
        ]
        with tf.control_dependencies([check for check in checks if check is not None]):
            return Batch(tf.identity(image), tf.identity(label), tf.cast(index, tf.int32))

    def craft(
        self, batch: Batch, attack: PGD, *, loss_fn: Optional[LossFn] = None, context: Context = None
    ) -> tf.Tensor:
        """Return adversarial images [batch, h, w, c] by `attack` on `loss_fn`, by default the objective on `call`.

        Their random starts are keyed by the run's seed, the step and each example's index.
        """
        if loss_fn is None:
            loss_fn = OBJECTIVES[self.objective](self._logits)
            context = {"label": batch.label}
            if self.objective == "kl_divergence":
                context["logits"] = tf.stop_gradient(self._logits(batch.image))
        return attack(loss_fn, batch.image, context, seeds.per_example(self.seed, self.step, batch.index)).image

    def descend(self, forward: Callable[[], tuple[dict[str, tf.Tensor], tf.Tensor]]) -> tf.Tensor:
        """Take one optimizer step on the sum of the loss terms and return what else `forward` returns.

        Args:
            forward: returns `(terms, outputs)`; `terms` maps each name in `self.terms` to a loss per example [batch],
                weights included. Terms are averaged over the global batch, regularisation losses added.
        """
        with tf.GradientTape() as tape:
            terms, outputs = forward()
            size = _global_size(next(iter(terms.values())))
            regularisation = [loss / _replica().num_replicas_in_sync for loss in self.losses]
            total = tf.add_n([tf.reduce_sum(term) / size for term in terms.values()] + regularisation)
        variables = self.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(total, variables), variables))
        self.step.assign_add(1)
        for name, term in terms.items():
            self.record(name, term)
        return outputs

    def record(self, name: str, values: tf.Tensor) -> None:
        """Add values [batch] to the running mean `name`."""
        self.means[name].update_state(values)

    def record_accuracy(self, name: str, logits: tf.Tensor, label: tf.Tensor) -> None:
        """Add the share of right predictions to the running mean `name`."""
        self.record(name, tf.argmax(logits, axis=-1, output_type=tf.int32) == label)

    def report(self, *names: str) -> dict[str, tf.Tensor]:
        """Return the named running means."""
        return {name: self.means[name].result() for name in names}

    # Keras.

    def compile(self, optimizer: Any = "sgd", **kwargs: Any) -> None:
        """Set the optimizer; losses and metrics are the method's own. Scales, offsets and biases are not decayed."""
        super().compile(optimizer=optimizer, **kwargs)
        if getattr(self.optimizer, "weight_decay", None):
            self.optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
        names = (*self.terms, CLEAN_ACCURACY, ADVERSARIAL_ACCURACY)
        self.means = {name: keras.metrics.Mean(name=name) for name in names}

    def get_compile_config(self) -> Optional[dict[str, Any]]:
        """Return what `compile_from_config` needs, None if it was never compiled."""
        if self.optimizer is None:
            return None
        return {"optimizer": keras.saving.serialize_keras_object(self.optimizer)}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as before saving, and build the optimizer so that its slots can be restored."""
        self.compile(optimizer=keras.saving.deserialize_keras_object(config["optimizer"]))
        self.optimizer.build(self.trainable_variables)

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """The running means, which `fit` resets at each epoch."""
        return list(getattr(self, "means", {}).values())

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Measure accuracy, clean and under the validation attack on `call`; never by a method's own objective."""
        batch = self.unpack(data)
        self.record_accuracy(CLEAN_ACCURACY, self._logits(batch.image), batch.label)
        context = {"label": batch.label}
        seed = seeds.per_example(self.seed, -1, batch.index)
        image_adv = self.validation_attack(OBJECTIVES["cross_entropy"](self._logits), batch.image, context, seed).image
        self.record(ADVERSARIAL_ACCURACY, ~misclassified(self._logits)(image_adv, context))
        return self.report(CLEAN_ACCURACY, ADVERSARIAL_ACCURACY)

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {
            "backbone": keras.saving.serialize_keras_object(self.backbone),
            "attack": keras.saving.serialize_keras_object(self.attack),
            "objective": self.objective,
            "validation_attack": keras.saving.serialize_keras_object(self.validation_attack),
            "label_smoothing": self.label_smoothing,
            "seed": self.seed,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Optional[dict[str, Any]] = None) -> Defense:
        """Build the defense, with fresh weights, from `get_config()`."""
        config = dict(config)
        for key in ("backbone", "attack", "validation_attack"):
            config[key] = keras.saving.deserialize_keras_object(config[key], custom_objects=custom_objects)
        return cls(**config)

    def _logits(self, image: tf.Tensor) -> tf.Tensor:
        return self(image, training=False)


def _global_size(values: tf.Tensor) -> tf.Tensor:
    """Return the number of examples over all replicas, of which `values` [batch] are this replica's."""
    size = tf.cast(tf.shape(values)[0], values.dtype)
    if _replica().num_replicas_in_sync == 1:
        return size
    return _replica().all_reduce(tf.distribute.ReduceOp.SUM, size)


def _replica() -> tf.distribute.ReplicaContext:
    return tf.distribute.get_replica_context()
