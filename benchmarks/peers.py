"""A step of adversarial training as other libraries take it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import warnings
from typing import Any, Callable

import keras
import numpy as np
import tensorflow as tf
from cleverhans.tf2.attacks.projected_gradient_descent import projected_gradient_descent

from benchmarks.case import CLASSES, EPSILON, Case
from benchmarks.timing import Step

ART_ATTACK_BATCH = 32


def peers(case: Case) -> dict[str, Step]:
    """Return the steps of the other libraries that are installed, by name."""
    steps = {"cleverhans": cleverhans(case)}
    if has_art():
        steps["ART"] = art(case, whole_batches=False)
        if case.batch_size > ART_ATTACK_BATCH:
            steps["ART, whole batches"] = art(case, whole_batches=True)
    return steps


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
