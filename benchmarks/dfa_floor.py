"""The work that a training step of DFA, or of its adversarial variant, cannot do without."""

from __future__ import annotations

from typing import Callable

import numpy as np
import tensorflow as tf

from benchmarks.case import Case
from benchmarks.floor import input_gradient_of
from benchmarks.timing import Step
from kerasdefense import defenses, losses
from kerasdefense.defenses import DFA, mixing
from kerasdefense.defenses.mixing import Mixture


def dfa_floor(case: Case) -> Step:
    """Return the passes and gradients of a step, each one compiled function, on the backbone of a fresh defense.

    1. dfa_at: `steps` times the gradient of the cross-entropy by the image, in inference mode.
    2. The gradient of the loss by the parameters, in training mode: one pass of the mixed images and one of the images
       as they are, with `share_forward=False` also one of their partners.

    Partners, weights and noise are at hand, as the method draws them in its first step.
    """
    defense = defenses.build(case.run, case.make_backbone())
    batch = case.batch()
    image, label, index = (tf.constant(batch[name]) for name in ("image", "label", "index"))
    if case.defense == "dfa_at":
        image = 1 - image
    mixture = mixing.draw(index, defense.seed, defense.step, alpha=defense.mix_alpha, per=defense.mix_per)
    size = defense.backbone.output_shape["embedding"][-1]
    noise = mixture.noise(tf.zeros([case.batch_size, size]), defense.noise_std)
    input_gradient = input_gradient_of(lambda image: defense.backbone(image, training=False)["logits"])
    parameter_gradient = _parameter_gradient(defense, mixture, noise)

    def step() -> list[np.ndarray]:
        for _ in range(case.steps):
            input_gradient(image, label)
        return [gradient.numpy() for gradient in parameter_gradient(image, label)]

    return step


def _parameter_gradient(
    defense: DFA, mixture: Mixture, noise: tf.Tensor
) -> Callable[[tf.Tensor, tf.Tensor], list[tf.Tensor]]:
    """Return the gradient of the method's loss by the parameters."""
    backbone, axes = defense.backbone, defense.head.kernel

    def embedded(image: tf.Tensor) -> tf.Tensor:
        return tf.math.l2_normalize(backbone(image, training=True)["embedding"], axis=-1)

    @tf.function
    def parameter_gradient(image: tf.Tensor, label: tf.Tensor) -> list[tf.Tensor]:
        image_of_partner, partner = tf.gather(image, mixture.partner), tf.gather(label, mixture.partner)
        with tf.GradientTape() as tape:
            z_mixed, z = embedded(mixture.mixed(image, image_of_partner)), embedded(image)
            shared = defense.share_forward
            z_bar = mixture.mixed(z, tf.gather(z, mixture.partner) if shared else embedded(image_of_partner))
            logits = tf.abs(z_bar @ axes) + tf.abs(z_mixed @ axes)
            of_own, of_partner = losses.cross_entropy(logits, label), losses.cross_entropy(logits, partner)
            distance = tf.reduce_mean(tf.math.squared_difference(z_mixed, tf.stop_gradient(z_bar) + noise), axis=-1)
            value = tf.reduce_mean(mixture.mixed(of_own, of_partner) + distance)
        return tape.gradient(value, backbone.trainable_variables)

    return parameter_gradient
