"""The work that a training step of CAFD cannot do without, as `floor` has it for the other methods."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from benchmarks.case import Case
from benchmarks.timing import Step
from kerasdefense import defenses, losses


def cafd_floor(case: Case) -> Step:
    """Return the passes and gradients of a step, each one compiled function, on the models of a fresh defense.

    1. `steps` times the gradient by the image of the distance of class activation features, through denoiser and
       classifier, in inference mode; none where images were attacked before training.
    2. One pass of the clean images through the classifier.
    3. One pass of the attacked images through the denoiser, and the gradient of the critic's loss by its parameters: a
       pass of the clean images and one of the denoised, both in training mode.
    4. The gradient of the denoiser's loss by its parameters, through classifier and critic. The denoiser's pass is that
       of 3, and the critic's pass of the clean images is made again, at its new weights.
    """
    defense = defenses.build(case.run, case.make_backbone())
    classifier, denoiser, critic = defense.backbone, defense.denoiser, defense.critic
    kernel = classifier.get_layer("logits").kernel
    image = tf.constant(case.batch()["image"])
    image_adv = 1 - image

    def features_of(image: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        outputs = classifier(image, training=False)
        return outputs["feature_map"], outputs["logits"]

    clean_features = tf.function(features_of)

    @tf.function
    def input_gradient(image: tf.Tensor, reference: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(image)
            denoised = tf.clip_by_value(image + denoiser(image, training=False), 0.0, 1.0)
            found = losses.class_activation_features(*features_of(denoised), kernel)
            value = losses.squared_distance(found, reference)
        return tape.gradient(value, image)

    @tf.function
    def parameter_gradients(
        image: tf.Tensor, image_adv: tf.Tensor, clean: tuple[tf.Tensor, tf.Tensor]
    ) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            denoised = image_adv + denoiser(image_adv, training=True)
        with tf.GradientTape() as tape_of_critic:
            judged = [critic(each, training=True)[:, 0] for each in (image, tf.stop_gradient(denoised))]
            of_critic = tf.reduce_mean(losses.critic_loss(*judged))
        gradients = tape_of_critic.gradient(of_critic, critic.trainable_variables)
        with tape:
            terms = losses.class_activation_terms(features_of(denoised), clean, kernel)
            judged = [critic(each, training=True)[:, 0] for each in (image, denoised)]
            value = tf.add_n(list(terms.values())) + defense.lam_a * losses.adversarial_loss(*judged)
            value = tf.reduce_mean(value)
        return gradients + tape.gradient(value, denoiser.trainable_variables)

    reference = losses.class_activation_features(*features_of(image), kernel)

    def step() -> list[np.ndarray]:
        for _ in range(case.steps if case.dynamic else 0):
            input_gradient(image_adv, reference)
        gradients = parameter_gradients(image, image_adv, clean_features(image))
        return [gradient.numpy() for gradient in gradients]

    return step
