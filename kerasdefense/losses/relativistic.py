"""Relativistic average adversarial losses: whether clean images look cleaner than denoised ones do on average."""

from __future__ import annotations

import tensorflow as tf


def critic_loss(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """Return what the critic descends on, `(BCE(r, 1) + BCE(f, 0)) / 2`, float32 [batch].

    `r = clean - mean(denoised)` and `f = denoised - mean(clean)` are logits, the means over the global batch.

    Args:
        clean: the critic's logits of clean images, float [batch].
        denoised: of denoised images, float [batch].

    Source: Jolicoeur-Martineau 2019, "The relativistic discriminator", section 4.3, as in the code released with CAFD
    (Zhou et al. 2021). Deviations: none.
    """
    real, fake = _relative(clean, denoised)
    return (tf.nn.softplus(-real) + tf.nn.softplus(fake)) / 2


def adversarial_loss(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """Return what the denoiser descends on, `(BCE(r, 0) + BCE(f, 1)) / 2`, float32 [batch]; as `critic_loss`."""
    real, fake = _relative(clean, denoised)
    return (tf.nn.softplus(real) + tf.nn.softplus(-fake)) / 2


def _relative(clean: tf.Tensor, denoised: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    clean, denoised = tf.cast(clean, tf.float32), tf.cast(denoised, tf.float32)
    return clean - _global_mean(denoised), denoised - _global_mean(clean)


def _global_mean(values: tf.Tensor) -> tf.Tensor:
    """Return the mean of `values` [batch] over the batches of all replicas; gradients flow back to all of them."""
    replica = tf.distribute.get_replica_context()
    total, count = tf.reduce_sum(values), tf.cast(tf.shape(values)[0], values.dtype)
    if replica is not None and replica.num_replicas_in_sync > 1:
        total, count = replica.all_reduce(tf.distribute.ReduceOp.SUM, [total, count])
    return total / count
