"""Crafting while training: in any precision, and with a radius that may rise as training goes on."""

from __future__ import annotations

import itertools
from typing import Callable

import keras
import tensorflow as tf

from kerasdefense.attacks import FEATURE_DISTANCE, OBJECTIVES, PGD, TARGETED, TO_CLASS, seeds
from kerasdefense.types import Context, LossFn, PathFn, UsageError, look_up

FLOAT16_SCALE = 1024.0
"""What an objective is multiplied by in float16, where gradients of images would else round to zero."""


def check_objective(objective: str, attack: PGD, *, is_targeted: bool, takes_features: bool = False) -> None:
    """Raise a UsageError unless training can craft with `attack` on this key of OBJECTIVES."""
    look_up(OBJECTIVES, objective, "objective")
    if is_targeted:
        if objective not in TO_CLASS:
            raise UsageError(f"objective {objective} goes to no class; the method's attack takes {', '.join(TO_CLASS)}")
        return
    if objective in TARGETED:
        raise UsageError(f"objective {objective} needs targets; training attacks take an untargeted one")
    if objective == FEATURE_DISTANCE and not takes_features:
        raise UsageError(f"objective {objective} needs a frozen classifier to tell features apart by; use another")
    if objective in ("kl_divergence", FEATURE_DISTANCE) and not attack.random_start:
        raise UsageError(f"objective {objective} needs an attack with a random start: its gradient is zero without")


def computes_in_float16(model: keras.Model) -> bool:
    """Return whether any layer of a model does."""
    layers = (each for each in model.submodules if isinstance(each, keras.layers.Layer))
    return any(layer.compute_dtype == "float16" for layer in layers)


def search(
    attack: PGD, loss_fn: LossFn, image: tf.Tensor, context: Context, seed: tf.Tensor, *, float16: bool
) -> tf.Tensor:
    """Return what `attack` finds, [batch, h, w, c]; its steps do not depend on the scale of the objective."""
    scale = FLOAT16_SCALE if float16 else 1.0
    return attack(lambda image, context: scale * loss_fn(image, context), image, context, seed).image


def with_rising_radius(
    find: Callable[[PGD], tf.Tensor], attack: PGD, image: tf.Tensor, step: tf.Tensor, *, warmup: int, ramp: int
) -> tf.Tensor:
    """Return the clean images during the warm-up, then what `find` finds with the share of the radius at this step.

    The share rises linearly over `ramp` steps to 1; with it the step size.
    """
    if not warmup and not ramp:
        return find(attack)
    share = tf.clip_by_value(tf.cast(step - warmup + 1, tf.float32) / max(1, ramp), 0.0, 1.0)
    return tf.cond(share > 0, lambda: find(attack.scaled(share)), lambda: image)


def mean_loss(objective: str, path: PathFn, seed: tf.Tensor, draws: int, *, anew: bool = False) -> LossFn:
    """Return the mean of a key of OBJECTIVES over draws of a path: expectation over transformation.

    Args:
        objective: of the logits.
        path: `(image, seed) -> logits`.
        seed: int32 [batch, 2]; draw 0 is by the seed itself.
        draws: how many.
        anew: whether each call that is traced has draws of its own, as the steps of an attack that are not a loop do.
    """
    calls = itertools.count()

    def one_draw(number: int) -> LossFn:
        own = seeds.advance(seed, tf.fill(tf.shape(seed)[:1], number)) if number else seed
        return OBJECTIVES[objective](lambda image: path(image, own))

    def loss_fn(image: tf.Tensor, context: Context) -> tf.Tensor:
        first = draws * next(calls) if anew else 0
        return tf.add_n([one_draw(first + draw)(image, context) for draw in range(draws)]) / draws

    return loss_fn
