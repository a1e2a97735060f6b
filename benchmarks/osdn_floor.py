"""The work that a step of OSDN-CAML cannot do without: compiled gradients, no optimizer, no metrics, no checks."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from benchmarks.case import Case
from benchmarks.timing import Step
from kerasdefense import defenses, losses
from kerasdefense.defenses import OSDNCAML
from kerasdefense.types import LogitsFn


def osdn_floor(case: Case) -> Step:
    """Return the passes and gradients of a step, each one compiled function.

    1. `steps` times the gradient of the class head's cross-entropy by the image, and as often that of the rotation
       head's by the turned image, in inference mode.
    2. The gradient of the defense's loss by encoder, heads and decoder, which pass the adversarial images and the
       turned ones in training mode.
    3. With a peer: one pass of the adversarial images, in inference mode, and the gradient of the peer's loss by its
       parameters, which passes the clean images in training mode.
    """
    return osdn_floor_of(case, defenses.build(case.run, case.make_backbone()))


def osdn_floor_of(case: Case, defense: OSDNCAML) -> Step:
    """Return the same with the models of a defense."""
    image, label = map(tf.constant, (case.batch()["image"], case.batch()["label"]))
    image_adv, rotation = 1 - image, label % 4

    def class_logits(image: tf.Tensor) -> tf.Tensor:
        return defense.backbone(image, training=False)["logits"]

    class_gradient, rotation_gradient = map(_input_gradient, (class_logits, defense.rotation_logits))
    peer_logits = None if defense.peer is None else tf.zeros_like(defense.peer(image, training=False)["logits"])

    @tf.function
    def defense_gradient(image: tf.Tensor, image_adv: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            outputs = defense.backbone(image_adv, training=True)
            terms = losses.open_set_defense_terms(
                outputs["logits"],
                label,
                defense.rotation_head(defense.backbone(image_adv, training=True)["embedding"]),
                rotation,
                defense.decoder(outputs["embedding"], training=True),
                image,
                peer_logits,
            )
            total = tf.add_n([tf.reduce_mean(term) for term in terms.values()])
        return tape.gradient(total, defense.trainable_variables)

    recomputed = tf.function(class_logits)

    @tf.function
    def peer_gradient(image: tf.Tensor, logits: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            terms = losses.peer_terms(defense.peer(image, training=True)["logits"], label, logits)
            total = tf.add_n([tf.reduce_mean(term) for term in terms.values()])
        return tape.gradient(total, defense.peer.trainable_variables)

    def step() -> list[np.ndarray]:
        for _ in range(case.steps):
            class_gradient(image_adv, label)
            rotation_gradient(image_adv, rotation)
        gradients = defense_gradient(image, image_adv)
        if defense.peer is not None:
            gradients = gradients + peer_gradient(image, recomputed(image_adv))
        return [gradient.numpy() for gradient in gradients]

    return step


def _input_gradient(logits_fn: LogitsFn) -> Step:
    """Return the compiled gradient of the cross-entropy by the image."""

    @tf.function
    def gradient(image: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(image)
            value = losses.cross_entropy(logits_fn(image), label)
        return tape.gradient(value, image)

    return gradient
