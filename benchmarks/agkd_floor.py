"""The work that a training step of AGKD-BML cannot do without, as `floor` has it for the other methods."""

from __future__ import annotations

from typing import Callable

import numpy as np
import tensorflow as tf

from benchmarks.case import Case
from benchmarks.floor import input_gradient_of
from benchmarks.timing import Step
from kerasdefense import defenses, losses
from kerasdefense.defenses import AGKDBML


def agkd_floor(case: Case) -> Step:
    """Return the passes and gradients of a step, each one compiled function, on the models of a fresh defense.

    1. `steps` times the gradient by the image of the cross-entropy, of the images and of as many that are drawn, in
       inference mode.
    2. One pass of both through the teacher, in inference mode.
    3. The gradient of the loss by the student's parameters, in training mode: one pass of the images, attacked and as
       they are, and of the attacked ones that are drawn.

    The classes that images are attacked towards are at hand, and so are the images that are drawn.
    """
    defense = defenses.build(case.run, case.make_backbone())
    batch = case.batch()
    image, label = tf.constant(batch["image"]), tf.constant(batch["label"])
    drawn, target = image[::-1], label[::-1]
    both, targets = tf.concat([image, drawn], axis=0), tf.concat([target, label], axis=0)
    both_adv = 1 - both
    input_gradient = input_gradient_of(lambda image: defense.backbone(image, training=False)["logits"])
    attention_of_teacher = tf.function(lambda image: defense.teacher(image, training=False)["feature_map"])
    parameter_gradient = _parameter_gradient(defense)

    def step() -> list[np.ndarray]:
        for _ in range(case.steps):
            input_gradient(both_adv, targets)
        gradients = parameter_gradient(image, both_adv, label, attention_of_teacher(both))
        return [gradient.numpy() for gradient in gradients]

    return step


def _parameter_gradient(defense: AGKDBML) -> Callable[..., list[tf.Tensor]]:
    """Return the gradient of the method's loss by the student's parameters."""
    student = defense.backbone

    @tf.function
    def parameter_gradient(
        image: tf.Tensor, both_adv: tf.Tensor, label: tf.Tensor, of_teacher: tf.Tensor
    ) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            outputs = student(tf.concat([both_adv, image], axis=0), training=True)
            adversarial, _, _ = tf.split(outputs["logits"], 3)
            maps = losses.attention_map(outputs["feature_map"][: 2 * tf.shape(label)[0]])
            distances = losses.attention_distance(maps, losses.attention_map(of_teacher))
            anchor, negative, positive = tf.split(outputs["embedding"], 3)
            triplet = losses.angular_triplet(anchor, positive, negative, margin=defense.triplet_margin)
            squares = tf.add_n([losses.mean_square(each) for each in (anchor, negative, positive)])
            value = tf.reduce_mean(
                losses.cross_entropy(adversarial, label, smoothing=defense.label_smoothing)
                + tf.add_n(tf.split(distances, 2))
                + defense.w_bml * (triplet + defense.w_norm * squares)
            )
        return tape.gradient(value, student.trainable_variables)

    return parameter_gradient
