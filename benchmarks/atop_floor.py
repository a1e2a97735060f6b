"""The work that a training step of AToP cannot do without, as `floor` has it for the other methods."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from benchmarks.case import Case
from benchmarks.timing import Step
from kerasdefense import defenses, losses


def atop_floor(case: Case) -> Step:
    """Return the passes and gradients of a step, each one compiled function, on the models of a fresh defense.

    1. `steps` times the gradient by the image of the cross-entropy through transform, purifier and classifier.
    2. One pass of the attacked images, transformed, through the purifier, and the gradient of the critic's loss by its
       parameters: a pass of the clean images and one of the restored.
    3. The gradient of the purifier's loss by its parameters, through classifier and critic. The purifier's pass is that
       of 2.

    Noise is drawn once, before 1.
    """
    defense = defenses.build(case.run, case.make_backbone())
    classifier, purifier, critic = defense.backbone, defense.purifier, defense.critic
    batch = {name: tf.constant(each) for name, each in case.batch().items()}
    image, label = batch["image"], batch["label"]
    ones = tf.ones([len(label), 2], tf.int32)

    @tf.function
    def draw(seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        mask = defense.training_transform.drawn_masks(seed, *case.image_shape[:2])
        return defense.sigma * defense.training_transform.noise(seed, case.image_shape), mask

    def transformed(image: tf.Tensor, noise: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
        return tf.clip_by_value(image + noise, 0.0, 1.0) * (1 - mask) + 0.5 * mask

    def cross_entropy_of(restored: tf.Tensor) -> tf.Tensor:
        return losses.cross_entropy(classifier(restored, training=False)["logits"], label)

    @tf.function
    def input_gradient(image: tf.Tensor, noise: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(image)
            restored = purifier([transformed(image, noise, mask), mask], training=False)["refined"]
            value = cross_entropy_of(restored)
        return tape.gradient(value, image)

    @tf.function
    def parameter_gradients(image_adv: tf.Tensor, noise: tf.Tensor, mask: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            restored = purifier([transformed(image_adv, noise, mask), mask], training=True)
        with tf.GradientTape() as tape_of_critic:
            fake = tf.stop_gradient(restored["refined"])
            judged = [critic([each, mask], training=True) for each in (image, fake)]
            of_critic = tf.reduce_mean(losses.hinge_critic_loss(*judged))
        gradients = tape_of_critic.gradient(of_critic, critic.trainable_variables)
        with tape:
            distances = [tf.reduce_mean(tf.abs(restored[name] - image)) for name in ("coarse", "refined")]
            judged = critic([restored["refined"], mask], training=False)
            value = defense.lam_l1 * tf.add_n(distances)
            value += tf.reduce_mean(defense.lam_gan * losses.hinge_adversarial_loss(judged))
            value += defense.lam_ce * tf.reduce_mean(cross_entropy_of(restored["refined"]))
        return gradients + tape.gradient(value, purifier.trainable_variables)

    def step() -> list[np.ndarray]:
        noise, mask = draw(ones)
        for _ in range(case.steps):
            input_gradient(1 - image, noise, mask)
        return [gradient.numpy() for gradient in parameter_gradients(1 - image, noise, mask)]

    return step
