"""What an open-set defense network and its peer descend on: named terms, weights included, one value per example."""

from __future__ import annotations

from typing import Optional

import tensorflow as tf

from kerasdefense.losses.classification import cross_entropy, kl_divergence
from kerasdefense.losses.reconstruction import reconstruction_error


def open_set_defense_terms(
    logits: tf.Tensor,
    label: tf.Tensor,
    rotation_logits: Optional[tf.Tensor],
    rotation: Optional[tf.Tensor],
    reconstruction: tf.Tensor,
    image: tf.Tensor,
    peer_logits: Optional[tf.Tensor] = None,
    *,
    w_cls: float = 1.0,
    w_rot: float = 1.0,
    w_rec: float = 1.0,
    w_kl: float = 2.0,
    label_smoothing: float = 0.0,
) -> dict[str, tf.Tensor]:
    """Return the terms of `w_cls L_cls + w_rot L_rot + w_rec L_rec + w_kl KL(peer || defense)`.

    Args:
        logits: [batch, classes], of adversarial images.
        label: int32 [batch].
        rotation_logits: [batch, 4], of adversarial turned images; None = none were turned, and there is no such term.
        rotation: int32 [batch], the quarter turns.
        reconstruction: [batch, h, w, c] in [-1, 1], decoded from the adversarial images.
        image: [batch, h, w, c] in [0, 1], the clean images.
        peer_logits: [batch, classes], of the clean images by the peer, to which no gradient flows; None = no peer.
        w_cls: weight of the cross-entropy of the classes.
        w_rot: weight of the cross-entropy of the turns.
        w_rec: weight of the reconstruction error.
        w_kl: weight of the divergence from the peer.
        label_smoothing: label mass spread evenly over all classes, in [0, 1).

    Source: the code released with OSDN-CAML (Shao, Perera, Yuen & Patel 2022), and without a peer with OSDN (2020).
        Deviations: see `reconstruction_error`.
    """
    terms = {"cross_entropy_loss": w_cls * cross_entropy(logits, label, smoothing=label_smoothing)}
    if rotation_logits is not None:
        terms["rotation_loss"] = w_rot * cross_entropy(rotation_logits, rotation)
    terms["reconstruction_loss"] = w_rec * reconstruction_error(reconstruction, image)
    if peer_logits is not None:
        terms["kl_divergence_loss"] = w_kl * kl_divergence(tf.stop_gradient(peer_logits), logits)
    return terms


def peer_terms(
    peer_logits: tf.Tensor,
    label: tf.Tensor,
    logits: tf.Tensor,
    *,
    w_cls: float = 1.0,
    w_kl: float = 2.0,
    label_smoothing: float = 0.0,
) -> dict[str, tf.Tensor]:
    """Return the terms of `w_cls CE(peer) + w_kl KL(defense || peer)`.

    Args:
        peer_logits: [batch, classes], of clean images by the peer.
        label: int32 [batch].
        logits: [batch, classes], of the adversarial images by the defense, to which no gradient flows.
        w_cls: weight of the cross-entropy.
        w_kl: weight of the divergence from the defense.
        label_smoothing: label mass spread evenly over all classes, in [0, 1).

    Source: the code released with OSDN-CAML (Shao, Perera, Yuen & Patel 2022). Deviations: none.
    """
    return {
        "peer_cross_entropy_loss": w_cls * cross_entropy(peer_logits, label, smoothing=label_smoothing),
        "peer_kl_divergence_loss": w_kl * kl_divergence(tf.stop_gradient(logits), peer_logits),
    }
