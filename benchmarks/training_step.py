"""One step of adversarial training, as this package takes it, as others take it, and the work it cannot avoid."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import warnings
from typing import Any, Callable, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from cleverhans.tf2.attacks.projected_gradient_descent import projected_gradient_descent

from benchmarks.timing import Step, Timing, time_in_turns
from kerasdefense import backbones, config, defenses, training

CLASSES = 10
EPSILON = 8 / 255
ART_ATTACK_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained: PGD of so many steps in the L-inf ball, SGD with momentum, float32."""

    backbone: str
    width: int
    image_shape: tuple[int, int, int]
    batch_size: int
    steps: int = 10

    @property
    def run(self) -> config.Run:
        """The configuration of a run that takes these steps."""
        return config.Run(
            backbone=config.Backbone(name=self.backbone, width=self.width),
            attack=config.Attack(epsilon=EPSILON, steps=self.steps),
            defense=config.Defense(name="pgd_at"),
            train=config.Train(batch_size=self.batch_size, learning_rate=0.01, schedule="constant"),
        )

    def batch(self) -> dict[str, np.ndarray]:
        """Return a batch of noise with labels; what is in the images does not change the time."""
        generator = np.random.default_rng(0)
        return {
            "image": generator.random((self.batch_size, *self.image_shape), np.float32),
            "label": generator.integers(CLASSES, size=self.batch_size, dtype=np.int32),
            "index": np.arange(self.batch_size, dtype=np.int32),
        }

    def make_backbone(self) -> keras.Model:
        """Return the backbone with fresh weights."""
        return backbones.build(self.run.backbone, image_shape=self.image_shape, classes=CLASSES)

    def make_classifier(self) -> keras.Model:
        """Return the backbone as the model from images to logits that other libraries take."""
        backbone = self.make_backbone()
        return keras.Model(backbone.input, backbone.output["logits"])

    def make_optimizer(self) -> keras.optimizers.Optimizer:
        """Return the optimizer of the run."""
        return training.make_optimizer(self.run.train, steps=1)


class Measurement(NamedTuple):
    """Times of the floor, of ours per strategy and of the others; traces of ours after its first step."""

    timing: Timing
    retraces: dict[str, int]


def measure(case: Case, rounds: int) -> Measurement:
    """Time a step of all contenders in turns, after two to trace them and warm up."""
    ours = {name: Ours(case, strategy) for name, strategy in strategies().items()}
    steps: dict[str, Step] = {"floor": floor(case), **ours, "cleverhans": cleverhans(case)}
    if has_art():
        steps["ART"] = art(case, whole_batches=False)
        if case.batch_size > ART_ATTACK_BATCH:
            steps["ART, whole batches"] = art(case, whole_batches=True)
    time_in_turns(steps, rounds=1)
    traces = {name: one.traces() for name, one in ours.items()}
    time_in_turns(steps, rounds=1)
    timing = time_in_turns(steps, rounds)
    return Measurement(timing, {name: one.traces() - traces[name] for name, one in ours.items()})


def has_art() -> bool:
    """Return whether the Adversarial Robustness Toolbox is installed."""
    try:
        importlib.metadata.version("adversarial-robustness-toolbox")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def import_art() -> tuple[Any, Any]:
    """Return the trainer and the classifier of the Adversarial Robustness Toolbox."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that PyTorch is not installed
        from art.defences.trainer import AdversarialTrainerMadryPGD
        from art.estimators.classification import TensorFlowV2Classifier
    return AdversarialTrainerMadryPGD, TensorFlowV2Classifier


def strategies() -> dict[str, tf.distribute.Strategy]:
    """Return the strategies of `--train_strategy`, on one device."""
    device = "/device:GPU:0" if tf.config.list_logical_devices("GPU") else "/device:CPU:0"
    return {"mirrored": training.mirrored((device,)), "none": tf.distribute.get_strategy()}


class Ours:
    """The compiled train function that `fit` calls, on an iterator, metrics and checks of the data included."""

    def __init__(self, case: Case, strategy: tf.distribute.Strategy) -> None:
        self.strategy = strategy
        with strategy.scope():
            self.defense = defenses.build(case.run, case.make_backbone())
            self.defense.compile(optimizer=case.make_optimizer())
            self.train_function = self.defense.make_train_function()
        dataset = tf.data.Dataset.from_tensors(case.batch()).repeat()
        self.iterator = iter(strategy.experimental_distribute_dataset(dataset))

    def __call__(self) -> dict[str, np.ndarray]:
        """Take one step."""
        with self.strategy.scope():
            return {name: value.numpy() for name, value in self.train_function(self.iterator).items()}

    def traces(self) -> int:
        """Return how often the train function has been traced."""
        return self.train_function.experimental_get_tracing_count()


def floor(case: Case) -> Step:
    """Return the gradients that a step cannot do without: of the image `steps` times, of the parameters once."""
    model = case.make_classifier()
    image, label = map(tf.constant, (case.batch()["image"], case.batch()["label"]))

    def loss(image: tf.Tensor, label: tf.Tensor, training: bool) -> tf.Tensor:
        logits = model(image, training=training)
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(label, logits))

    @tf.function
    def input_gradient(image: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(image)
            value = loss(image, label, training=False)
        return tape.gradient(value, image)

    @tf.function
    def parameter_gradient(image: tf.Tensor, label: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            value = loss(image, label, training=True)
        return tape.gradient(value, model.trainable_variables)

    def step() -> list[np.ndarray]:
        for _ in range(case.steps):
            input_gradient(image, label)
        return [gradient.numpy() for gradient in parameter_gradient(image, label)]

    return step


def make_update(case: Case) -> Callable[..., tf.Tensor]:
    """Return the compiled step on the weights that the other libraries' attacks drive; no metrics."""
    optimizer = case.make_optimizer()

    @tf.function
    def update(model: keras.Model, image: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            logits = model(image, training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(label, logits))
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
        return loss

    return update


def cleverhans(case: Case) -> Step:
    """Return cleverhans' PGD, which compiles its gradient and loops in Python, driving the update."""
    model, update = case.make_classifier(), make_update(case)
    image, label = map(tf.constant, (case.batch()["image"], case.batch()["label"]))

    def logits(image: tf.Tensor) -> tf.Tensor:
        return model(image, training=False)

    def step() -> np.ndarray:
        step_size = 2.5 * EPSILON / case.steps
        limits = {"clip_min": 0.0, "clip_max": 1.0}
        image_adv = projected_gradient_descent(
            logits, image, EPSILON, step_size, case.steps, np.inf, y=label, rand_init=True, **limits
        )
        return update(model, image_adv, label).numpy()

    return step


def art(case: Case, *, whole_batches: bool) -> Step:
    """Return ART's adversarial trainer on one batch, its update compiled as its documentation advises.

    Args:
        case: what is trained.
        whole_batches: whether to put right that it crafts 32 images at a time, whatever its `batch_size`.
    """
    make_trainer, make_art_classifier = import_art()
    classifier = make_art_classifier(
        model=case.make_classifier(),
        nb_classes=CLASSES,
        input_shape=case.image_shape,
        loss_object=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        train_step=make_update(case),
        clip_values=(0.0, 1.0),
    )
    trainer = make_trainer(
        classifier,
        nb_epochs=1,
        batch_size=case.batch_size,
        eps=EPSILON,
        eps_step=2.5 * EPSILON / case.steps,
        max_iter=case.steps,
    )
    if whole_batches:
        trainer.attack.set_params(batch_size=case.batch_size)
    batch = case.batch()

    def step() -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            trainer.fit(batch["image"], batch["label"])

    return step
