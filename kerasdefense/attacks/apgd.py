"""Auto-PGD: projected gradient ascent that finds its step size by itself."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple, Optional

import keras
import numpy as np
import tensorflow as tf

from kerasdefense.attacks import norms
from kerasdefense.attacks.base import AttackResult
from kerasdefense.attacks.iterative import Iterative, better, check_counts, nothing_tried, where
from kerasdefense.types import Context, LossFn, SuccessFn, UsageError

MOMENTUM = 0.75


class APGDState(NamedTuple):
    """Where a search stands.

    `image` is tried next, `previous` was tried last. `top_image`, `top_gradient`, `top_loss` are those of the highest
    loss so far, to go back to. `length` is the step; `rises` counts, since the last checkpoint, the steps that raised
    the loss; `halved` and `checked_loss` say what happened at that checkpoint. All have the leading axis [batch].
    """

    image: tf.Tensor
    best: AttackResult
    previous: tf.Tensor
    top_image: tf.Tensor
    top_gradient: tf.Tensor
    top_loss: tf.Tensor
    loss: tf.Tensor
    length: tf.Tensor
    rises: tf.Tensor
    halved: tf.Tensor
    checked_loss: tf.Tensor


@keras.saving.register_keras_serializable(package="kerasdefense")
@dataclasses.dataclass(frozen=True)
class APGD(Iterative):
    """Auto-PGD on whatever objective it is given: no step size to tune.

    1. Start at a random point on the sphere (clipped to the box), with a step of 2 epsilon.
    2. `steps` times: step along the gradient's sign (linf) or unit vector (l2) and project; take 3/4 of that move and
       1/4 of the move before; project.
    3. At checkpoints, which come ever closer: where the loss rose in at most `rho` of the steps since the last one, or
       neither the step was halved there nor the highest loss rose since, halve the step and go back to the best point.
    4. Repeat from other starts, `restarts` in all; with `targets`, for each of the likeliest wrong classes.

    Each example has a step size of its own. It is done when it has succeeded; what is returned is the best iterate.

    Attributes:
        steps: gradient steps of a run, 100 in AutoAttack.
        rho: share of rising steps at and below which the step is halved.
        restarts: runs from other starts.
        targets: how many classes to pull to, each in a run of its own; 0 = untargeted.

    Source: Croce & Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks", algorithm 1. Deviations: as in the authors' code, rises are compared with `<=` where the paper has `<`;
    the first rise is counted against the loss at the start, where their code compares with an unset row.
    """

    steps: int = 100
    rho: float = 0.75
    restarts: int = 1
    targets: int = 0

    def __post_init__(self) -> None:
        """Check the search."""
        super().__post_init__()
        check_counts(self.steps, self.restarts, self.targets)
        if not 0 < self.rho < 1:
            raise UsageError(f"rho must be above 0 and below 1, not {self.rho}")

    @property
    def passes(self) -> int:
        """Steps of one run: a gradient each, and one at the start."""
        return self.steps + 1

    def start(self, image: tf.Tensor, seed: tf.Tensor) -> APGDState:
        """Return the state before the first step."""
        point = norms.random_point(image, epsilon=self.epsilon, norm=self.norm, seed=seed, on_sphere=True)
        best = nothing_tried(image)
        none = tf.zeros_like(best.loss)
        return APGDState(
            image=point,
            best=best,
            previous=point,
            top_image=point,
            top_gradient=tf.zeros_like(point),
            top_loss=best.loss,
            loss=best.loss,
            length=none + 2 * self.epsilon,
            rises=none,
            halved=tf.ones_like(best.success),
            checked_loss=best.loss,
        )

    def step(
        self,
        fn: LossFn,
        state: APGDState,
        image: tf.Tensor,
        context: Context,
        success_fn: Optional[SuccessFn] = None,
    ) -> APGDState:
        """Try the state's point, halve the step where a checkpoint says so, and move on."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(state.image)
            loss = tf.cast(fn(state.image, context), tf.float32)
        gradient = tape.gradient(loss, state.image, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        success = tf.zeros_like(state.best.success) if success_fn is None else success_fn(state.image, context)
        number = state.best.queries
        best = better(state.best, AttackResult(state.image, success, loss, tf.ones_like(number)))

        rises = state.rises + tf.cast((loss > state.loss) & (number > 0), tf.float32)
        is_top = loss > state.top_loss
        top_loss = tf.where(is_top, loss, state.top_loss)
        top_image, top_gradient = (
            where(is_top, new, old) for new, old in ((state.image, state.top_image), (gradient, state.top_gradient))
        )
        checked_loss = tf.where(number == 0, top_loss, state.checked_loss)

        window = tf.gather(self._windows(), tf.minimum(number, self.steps))
        at_checkpoint = window > 0
        stuck = (rises <= self.rho * window) | (~state.halved & (checked_loss >= top_loss))
        halve = at_checkpoint & stuck
        here, gradient = where(halve, top_image, state.image), where(halve, top_gradient, gradient)
        length = tf.where(halve, state.length / 2, state.length)
        return APGDState(
            image=self._moved(here, gradient, state.previous, image, length, number),
            best=best,
            previous=here,
            top_image=top_image,
            top_gradient=top_gradient,
            top_loss=top_loss,
            loss=loss,
            length=length,
            rises=tf.where(at_checkpoint, tf.zeros_like(rises), rises),
            halved=tf.where(at_checkpoint, halve, state.halved),
            checked_loss=tf.where(at_checkpoint, top_loss, checked_loss),
        )

    def _moved(
        self,
        here: tf.Tensor,
        gradient: tf.Tensor,
        previous: tf.Tensor,
        image: tf.Tensor,
        length: tf.Tensor,
        number: tf.Tensor,
    ) -> tf.Tensor:
        project = functools.partial(norms.project, image=image, epsilon=self.epsilon, norm=self.norm)
        stepped = project(here + norms.column(length, here) * norms.direction(gradient, self.norm))
        share = norms.column(tf.where(number == 0, 1.0, MOMENTUM), here)
        return project(here + share * (stepped - here) + (1 - share) * (here - previous))

    def _windows(self) -> tf.Tensor:
        """Return, for each step number 0..steps, the steps since the last checkpoint if it is one, else 0."""
        windows = np.zeros(self.steps + 1, np.float32)
        checkpoints = checkpoint_steps(self.steps)
        windows[checkpoints] = np.diff([0, *checkpoints])
        return tf.constant(windows)


def checkpoint_steps(steps: int) -> list[int]:
    """Return the numbers of the steps, from 1 on, after which APGD looks at its step size.

    Windows shrink from 22 % of the steps by 3 % each to 6 %. From 100 steps on they are rounded as in the authors'
    code, below as in the paper, where the code's would close after every few steps.
    """
    found = []
    if steps >= 100:
        window, shrink, least = int(0.22 * steps), int(0.03 * steps), int(0.06 * steps)
        step = window
        while step <= steps:
            found.append(step)
            window = max(window - shrink, least)
            step += window
        return found
    share, before = 0.22, 0.0
    while share <= 1 + 1e-9:
        found.append(min(steps, math.ceil(share * steps - 1e-9)))
        share, before = share + max(share - before - 0.03, 0.06), share
    return sorted(set(found))
