"""Wrappers around what is attacked: gradients for parts that have none (BPDA), averages over random draws (EOT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable, Optional

import tensorflow as tf

from kerasdefense.attacks import seeds
from kerasdefense.types import PathFn

ImageFn = Callable[[tf.Tensor], tf.Tensor]
"""A function from a batch of images, or of anything else, to another."""
FIXED_NOISE = "fixed_noise"
"""The path that `fixed_noise` makes of a model's exact one, where a model lists it."""


def bpda(forward: ImageFn, backward: ImageFn = tf.identity) -> ImageFn:
    """Return a function with the values of `forward` and the gradient of `backward`.

    For a part of a defense whose own gradient is zero, undefined or random: quantisation, a JPEG codec, a long
    purifier. `backward` must come close to `forward`; the identity does only where the part hardly changes its input.
    Where exact gradients exist, attack with them as well: these here can be far weaker. Variables get no gradient.

    Args:
        forward: what is computed.
        backward: differentiable stand-in with the same shapes.

    Source: Athalye et al. 2018, "Obfuscated gradients give a false sense of security", section 4.1. Deviations: none.
    """

    @tf.custom_gradient
    def wrapped(image: tf.Tensor) -> tuple[tf.Tensor, Callable[..., Any]]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(image)
            stand_in = backward(image)

        def gradient(upstream: tf.Tensor, variables: Optional[Sequence[tf.Variable]] = None) -> Any:
            found = tape.gradient(stand_in, image, upstream, unconnected_gradients=tf.UnconnectedGradients.ZERO)
            return found if variables is None else (found, [None] * len(variables))

        return tf.stop_gradient(forward(image)), gradient

    return wrapped


def smooth_abs(length: float) -> ImageFn:
    """Return the absolute value with the gradient of `sqrt(x^2 + length^2)`, which does not jump at 0.

    Where a classifier's logits are absolute scores, the gradient of each flips as its score passes 0, and an attack
    that has to bring it across goes to and fro.

    Args:
        length: above 0, about how far from 0 the gradient is rounded off.

    Source: none; a use of BPDA (Athalye et al. 2018). Deviations: does not apply.
    """
    return bpda(tf.abs, lambda scores: tf.sqrt(tf.square(scores) + length**2))


def draws_of(path: PathFn, image: tf.Tensor, seed: tf.Tensor, draws: int) -> tf.Tensor:
    """Return what `path` says of each image in so many random draws, [batch * draws, classes], an image's together.

    Draw number d of an example goes by `seeds.advance(seed, d)`, draw 0 of a single one by the seed itself.
    """
    if draws == 1:
        return path(image, seed)
    number = tf.tile(tf.range(draws), [tf.shape(image)[0]])
    repeated = tf.repeat(image, draws, axis=0)
    return path(repeated, seeds.advance(tf.repeat(seed, draws, axis=0), number))


def eot(path: PathFn, draws: int) -> PathFn:
    """Return `path` with its logits averaged over random draws: expectation over transformation.

    Args:
        path: `(image, seed) -> logits`, whose randomness comes from the seed or from a generator of its own.
        draws: passes per image, at least 1.

    Source: Athalye et al. 2018, "Synthesizing robust adversarial examples". Deviations: none.
    """

    def averaged(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        logits = draws_of(path, image, seed, draws)
        return tf.reduce_mean(tf.reshape(logits, [-1, draws, logits.shape[-1]]), axis=1)

    return averaged


def fixed_noise(path: PathFn) -> PathFn:
    """Return `path` with the same draw for every image and every pass: a deterministic classifier."""

    def fixed(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return path(image, tf.ones_like(seed))

    return fixed
