"""Relatives of PGD in even steps to the edge of the ball: BIM, and two that add up gradients in order to transfer."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple, Optional

import keras
import numpy as np
import tensorflow as tf

from kerasdefense.attacks import norms, seeds
from kerasdefense.attacks.base import AttackResult
from kerasdefense.attacks.iterative import better, where
from kerasdefense.attacks.pgd import PGD
from kerasdefense.types import Context, LossFn, SuccessFn, UsageError


class MomentumState(NamedTuple):
    """Where a search stands.

    `image` is tried next, `best` is the best tried, `momentum` [batch, h, w, c] the gradient accumulated so far, `seed`
    int32 [batch, 2] that of each example's draws.
    """

    image: tf.Tensor
    best: AttackResult
    momentum: tf.Tensor
    seed: tf.Tensor


@keras.saving.register_keras_serializable(package="kerasdefense")
@dataclasses.dataclass(frozen=True)
class BIM(PGD):
    """Basic iterative method: PGD from the image itself, in steps that together just reach the edge of the ball.

    Source: Kurakin et al. 2017, "Adversarial examples in the physical world". Deviations: steps of epsilon / steps,
    where the paper takes steps of 1/255, and as many as the radius asks for; l2 as well; the best iterate is returned,
    unless `keep="last"`.
    """

    random_start: bool = False

    @property
    def length(self) -> float:
        """The length of a step, epsilon / steps unless given."""
        return self.step_size if self.step_size is not None else self.epsilon / self.steps


@keras.saving.register_keras_serializable(package="kerasdefense")
@dataclasses.dataclass(frozen=True)
class MIFGSM(BIM):
    """Momentum iterative FGSM: BIM along an accumulated gradient.

    Each step adds `gradient / ||gradient||_1` to `decay` times what was accumulated, and moves along the sign (linf) or
    the unit vector (l2) of the sum.

    Attributes:
        decay: share of the accumulated gradient that is kept at each step, mu in the paper.

    Source: Dong et al. 2018, "Boosting adversarial attacks with momentum", algorithm 1. Deviations: the best iterate is
    returned, unless `keep="last"`.
    """

    decay: float = 1.0

    def __post_init__(self) -> None:
        """Check the search."""
        super().__post_init__()
        if not 0 <= self.decay < math.inf:
            raise UsageError(f"decay must be a finite number of at least 0, not {self.decay}")

    def start(self, image: tf.Tensor, seed: tf.Tensor) -> MomentumState:
        """Return the state before the first step."""
        point, best = super().start(image, seed)
        return MomentumState(point, best, momentum=tf.zeros_like(image), seed=seed)

    def step(
        self,
        loss_fn: LossFn,
        state: MomentumState,
        image: tf.Tensor,
        context: Context,
        success_fn: Optional[SuccessFn] = None,
    ) -> MomentumState:
        """Try the state's point and move on along the accumulated gradient."""
        loss, gradient = self._loss_and_gradient(loss_fn, state, context)
        tried = self._tried(state.image, loss, context, success_fn)
        momentum = self.decay * state.momentum + _of_length_one(gradient)
        moved = tf.clip_by_value(state.image + self.length * norms.direction(momentum, self.norm), 0.0, 1.0)
        return MomentumState(
            image=norms.project(moved, image, epsilon=self.epsilon, norm=self.norm),
            best=better(state.best, tried),
            momentum=momentum,
            seed=state.seed,
        )

    def _loss_and_gradient(
        self, loss_fn: LossFn, state: MomentumState, context: Context
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the objective at the state's point [batch], and the gradient to add up."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(state.image)
            loss = loss_fn(state.image, context)
        return loss, tape.gradient(loss, state.image, unconnected_gradients=tf.UnconnectedGradients.ZERO)


@keras.saving.register_keras_serializable(package="kerasdefense")
@dataclasses.dataclass(frozen=True)
class TIDIM(MIFGSM):
    """MI-FGSM made to transfer: gradients at images shrunken at random, and smoothed.

    1. Diverse inputs: with `probability`, shrink the image to a random size of at least `smallest` of its own, pad it
       with zeros at random, and take the gradient there.
    2. Translation invariance: convolve the gradient with a Gaussian kernel of side `kernel`, as if it were averaged
       over shifted images.
    3. Step as MI-FGSM does.

    Each example draws for itself at each step. A step passes the model twice, once more at the image itself to judge
    it, and counts as one query; with `probability=0` one pass does both.

    Attributes:
        probability: chance of a shrunken image at each step.
        smallest: share of the sides that a shrunken image has at least.
        kernel: side of the smoothing kernel in pixels, odd; 1 = no smoothing. The paper's 15 are for sides of 299.

    Source: Dong et al. 2019, "Evading defenses by translation-invariant attacks"; Xie et al. 2019, "Improving
    transferability of adversarial examples with input diversity". Deviations: images shrink on a canvas of the size
    they had, where the authors enlarge both, which a classifier of one size cannot take; bilinear, where the authors'
    code takes the nearest pixel; the best iterate is returned, unless `keep="last"`.
    """

    probability: float = 0.7
    smallest: float = 0.9
    kernel: int = 5

    def __post_init__(self) -> None:
        """Check the search."""
        super().__post_init__()
        if not (0 <= self.probability <= 1 and 0 < self.smallest <= 1):
            given = f"{self.probability} and {self.smallest}"
            raise UsageError(f"probability must be in [0, 1] and smallest in (0, 1], not {given}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UsageError(f"kernel must be an odd number of at least 1, not {self.kernel}")

    def _loss_and_gradient(
        self, loss_fn: LossFn, state: MomentumState, context: Context
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the objective at the state's point [batch], and the smoothed gradient at its shrunken version."""
        if not self.probability:
            loss, gradient = super()._loss_and_gradient(loss_fn, state, context)
            return loss, smoothed(gradient, self.kernel)
        draws = seeds.uniform(state.seed, state.best.queries, 4)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(state.image)
            shrunken = shrink(state.image, draws[:, 1:], smallest=self.smallest)
            diverse = where(draws[:, 0] < self.probability, shrunken, state.image)
            loss = loss_fn(diverse, context)
        gradient = tape.gradient(loss, state.image, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return loss_fn(state.image, context), smoothed(gradient, self.kernel)


def _of_length_one(gradient: tf.Tensor) -> tf.Tensor:
    """Return the gradient over its l1 norm, zero where it is zero."""
    # Scaled first, so that the sum over a confident classifier's tiny gradient does not vanish.
    scaled = tf.math.divide_no_nan(gradient, norms.column(norms.length(gradient, "linf"), gradient))
    return tf.math.divide_no_nan(scaled, tf.reduce_sum(tf.abs(scaled), axis=(1, 2, 3), keepdims=True))


def gaussian_kernel(side: int) -> np.ndarray:
    """Return a Gaussian kernel, float32 [side, side], that sums to 1 and reaches 3 standard deviations to each edge."""
    line = np.exp(-(np.linspace(-3, 3, side) ** 2) / 2) if side > 1 else np.ones(1)
    kernel = np.outer(line, line)
    return (kernel / kernel.sum()).astype(np.float32)


def smoothed(gradient: tf.Tensor, side: int) -> tf.Tensor:
    """Return `gradient` [batch, h, w, c], each channel convolved with a Gaussian kernel; zeros lie around it."""
    if side == 1:
        return gradient
    kernel = tf.tile(gaussian_kernel(side)[:, :, None, None], [1, 1, gradient.shape[-1], 1])
    return tf.nn.depthwise_conv2d(gradient, kernel, strides=[1, 1, 1, 1], padding="SAME")


def shrink(image: tf.Tensor, draws: tf.Tensor, *, smallest: float) -> tf.Tensor:
    """Return images at a smaller size, somewhere on a black canvas of the size they had; bilinear, differentiable.

    Args:
        image: float32 [batch, h, w, c].
        draws: float32 [batch, 3] in [0, 1), for the size (from `smallest` of the sides to all of them), top and left.
        smallest: share of the sides, above 0.

    Returns:
        float32, the shape of `image`.
    """
    height, width = image.shape[1:3]
    rows = _shrinking(height, draws[:, 0], draws[:, 1], smallest)
    columns = _shrinking(width, draws[:, 0], draws[:, 2], smallest)
    return tf.einsum("bih,bjw,bhwc->bijc", rows, columns, image)


def _shrinking(pixels: int, size: tf.Tensor, place: tf.Tensor, smallest: float) -> tf.Tensor:
    """Return the matrices [batch, pixels, pixels] that shrink and pad lines of pixels, for draws [batch] in [0, 1)."""
    least = min(max(2, math.ceil(smallest * pixels)), pixels)
    sizes = least + tf.floor(size * (pixels - least + 1))
    begins = tf.floor(place * (pixels - sizes + 1))[:, None]
    sizes, number = sizes[:, None], tf.range(pixels, dtype=tf.float32)
    source = (number - begins) * tf.math.divide_no_nan(pixels - 1.0, sizes - 1)
    weights = tf.nn.relu(1 - tf.abs(source[:, :, None] - number))
    inside = (number >= begins) & (number < begins + sizes)
    return tf.where(inside[:, :, None], weights, 0.0)
