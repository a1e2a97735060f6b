"""The work that a training step cannot do without: compiled gradients, no optimizer, no metrics, no checks."""

from __future__ import annotations

from typing import Callable

import numpy as np
import tensorflow as tf

from benchmarks.case import Case
from benchmarks.timing import Step
from kerasdefense import losses
from kerasdefense.types import LogitsFn

Loss = Callable[[LogitsFn, tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]
"""`loss(logits_fn, image, image_adv, label) -> [batch]`, one pass per batch of images that the method descends on."""


def standard_loss(logits_fn: LogitsFn, image: tf.Tensor, image_adv: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
    """Return the cross-entropy of the clean images."""
    del image_adv
    return losses.cross_entropy(logits_fn(image), label)


def adversarial_loss(logits_fn: LogitsFn, image: tf.Tensor, image_adv: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
    """Return the cross-entropy of the adversarial images."""
    del image
    return losses.cross_entropy(logits_fn(image_adv), label)


def trades_loss(logits_fn: LogitsFn, image: tf.Tensor, image_adv: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
    """Return equation 5 of Zhang et al. 2019 with 1 / lambda = 6."""
    logits, logits_adv = logits_fn(image), logits_fn(image_adv)
    return losses.cross_entropy(logits, label) + 6.0 * losses.kl_divergence(logits, logits_adv)


def mart_loss(logits_fn: LogitsFn, image: tf.Tensor, image_adv: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
    """Return equation 11 of Wang et al. 2020 with lambda = 5."""
    logits, logits_adv = logits_fn(image), logits_fn(image_adv)
    doubt = 1 - tf.gather(tf.nn.softmax(logits), label, batch_dims=1)
    boosted = losses.boosted_cross_entropy(logits_adv, label)
    return boosted + 5.0 * doubt * losses.kl_divergence(logits, logits_adv)


LOSSES: dict[str, Loss] = {
    "fgsm_rs": adversarial_loss,
    "mart": mart_loss,
    "pgd_at": adversarial_loss,
    "standard": standard_loss,
    "trades": trades_loss,
}


def floor(case: Case) -> Step:
    """Return the passes and gradients of a step, each one compiled function.

    1. trades: one pass of the clean images, BatchNormalization in inference mode, for the attack to start from.
    2. `steps` times the gradient of the attack's objective by the image, in inference mode.
    3. The gradient of the method's loss by the parameters, in training mode; twice with AWP.
    """
    model = case.make_classifier()
    image, label = map(tf.constant, (case.batch()["image"], case.batch()["label"]))
    image_adv = 1 - image
    diverging, loss = case.defense == "trades", LOSSES[case.defense]

    @tf.function
    def reference_logits(image: tf.Tensor) -> tf.Tensor:
        return model(image, training=False)

    @tf.function
    def input_gradient(image: tf.Tensor, reference: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(image)
            logits = model(image, training=False)
            values = (losses.kl_divergence if diverging else _cross_entropy)(reference, logits)
        return tape.gradient(values, image)

    @tf.function
    def parameter_gradient(image: tf.Tensor, image_adv: tf.Tensor, label: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            value = tf.reduce_mean(loss(lambda image: model(image, training=True), image, image_adv, label))
        return tape.gradient(value, model.trainable_variables)

    def step() -> list[np.ndarray]:
        reference = reference_logits(image) if diverging else label
        for _ in range(case.steps):
            input_gradient(image_adv, reference)
        for _ in range(2 if case.awp_gamma else 1):
            gradients = parameter_gradient(image, image_adv, label)
        return [gradient.numpy() for gradient in gradients]

    return step


def input_gradient_of(logits_fn: LogitsFn) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """Return the gradient by the image of the cross-entropy of a class, of `(image, label)`, as a compiled function."""

    @tf.function
    def input_gradient(image: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(image)
            values = losses.cross_entropy(logits_fn(image), label)
        return tape.gradient(values, image)

    return input_gradient


def _cross_entropy(label: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    return losses.cross_entropy(logits, label)
