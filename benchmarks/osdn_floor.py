"""The work that a training step of OSDN-CAML cannot do without, as `floor` has it for the other methods."""

from __future__ import annotations

from typing import Callable, Optional

import keras
import numpy as np
import tensorflow as tf

from benchmarks.case import Case
from benchmarks.floor import input_gradient_of
from benchmarks.timing import Step
from kerasdefense import defenses, losses
from kerasdefense.defenses import OSDNCAML
from kerasdefense.defenses.osdn_caml import ROTATIONS
from kerasdefense.layers import rotate


def osdn_floor(case: Case) -> Step:
    """Return the passes and gradients of a step, each one compiled function, on the models of a fresh defense.

    1. `steps` times the gradient by the image of the cross-entropy of its class, and as often by the turned image that
       of its turn, in inference mode.
    2. The gradient of the loss by the parameters of encoder, rotation head and decoder, in training mode: one pass of
       the adversarial images and one of the adversarial turned images. The peer's logits, which 4 gives, are at hand.
    3. One pass of the adversarial images through the encoder, in inference mode.
    4. The gradient of the peer's loss by its parameters, in training mode: one pass of the clean images.

    With `w_kl=0` these are 1 and 2.
    """
    defense = defenses.build(case.run, case.make_backbone())
    encoder, rotation_head, peer = defense.backbone, defense.rotation_head, defense.peer
    batch = case.batch()
    image, label, turns = map(tf.constant, (batch["image"], batch["label"], batch["index"] % ROTATIONS))
    image_adv, turned_adv = 1 - image, rotate(1 - image, turns)
    logits_peer = None if peer is None else peer(image, training=True)["logits"]

    def class_logits(image: tf.Tensor) -> tf.Tensor:
        return encoder(image, training=False)["logits"]

    def turn_logits(image: tf.Tensor) -> tf.Tensor:
        return rotation_head(encoder(image, training=False)["embedding"])

    class_gradient, turn_gradient = input_gradient_of(class_logits), input_gradient_of(turn_logits)
    parameter_gradient, peer_gradient = _parameter_gradient(defense), _peer_gradient(peer, defense.w_kl)
    target_logits = tf.function(class_logits)

    def step() -> list[np.ndarray]:
        for _ in range(case.steps):
            class_gradient(image_adv, label)
            turn_gradient(turned_adv, turns)
        gradients = parameter_gradient(image, label, image_adv, turned_adv, turns, logits_peer)
        if peer is not None:
            gradients += peer_gradient(image, label, target_logits(image_adv))
        return [gradient.numpy() for gradient in gradients]

    return step


def _parameter_gradient(defense: OSDNCAML) -> Callable[..., list[tf.Tensor]]:
    """Return the gradient by the parameters of encoder, rotation head and decoder of their loss."""
    encoder, rotation_head, decoder = defense.backbone, defense.rotation_head, defense.decoder

    @tf.function
    def parameter_gradient(
        image: tf.Tensor,
        label: tf.Tensor,
        image_adv: tf.Tensor,
        turned_adv: tf.Tensor,
        turns: tf.Tensor,
        target: Optional[tf.Tensor],
    ) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            outputs = encoder(image_adv, training=True)
            logits_turns = rotation_head(encoder(turned_adv, training=True)["embedding"])
            reconstruction = decoder(outputs["embedding"], training=True)
            terms = losses.open_set_defense_terms(
                outputs["logits"], label, logits_turns, turns, reconstruction, image, target, w_kl=defense.w_kl
            )
            value = tf.reduce_mean(tf.add_n(list(terms.values())))
        models = (encoder, rotation_head, decoder)
        return tape.gradient(value, [variable for model in models for variable in model.trainable_variables])

    return parameter_gradient


def _peer_gradient(peer: keras.Model, w_kl: float) -> Callable[[tf.Tensor, tf.Tensor, tf.Tensor], list[tf.Tensor]]:
    """Return the gradient by the parameters of the peer of its loss."""

    @tf.function
    def peer_gradient(image: tf.Tensor, label: tf.Tensor, target: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            logits = peer(image, training=True)["logits"]
            value = tf.reduce_mean(tf.add_n(list(losses.peer_terms(logits, label, target, w_kl=w_kl).values())))
        return tape.gradient(value, peer.trainable_variables)

    return peer_gradient
