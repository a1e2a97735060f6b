"""Two goals at once: fool the classifier and stay below the detector's alarm."""

from __future__ import annotations

import dataclasses
import math
from typing import Callable, ClassVar, NamedTuple, Optional

import keras
import tensorflow as tf

from kerasdefense.attacks import norms
from kerasdefense.attacks.base import AttackResult
from kerasdefense.attacks.iterative import Iterative, Point, better, check_counts, nothing_tried, where
from kerasdefense.types import Context, SuccessFn, UsageError

PairFn = Callable[[tf.Tensor, Context], "Pair"]


class Pair(NamedTuple):
    """What a joint attack raises: `first` [batch], above all, then `second` [batch] without losing the first."""

    first: tf.Tensor
    second: tf.Tensor


@keras.saving.register_keras_serializable(package="kerasdefense")
@dataclasses.dataclass(frozen=True)
class JointPGD(Iterative):
    """Projected gradient ascent on a first objective until it is reached, and then on a second.

    1. Start at the image itself; restarts begin at random points of the ball.
    2. Where the first objective is at most `slack`, step along its gradient, elsewhere along that of the second.
       With `orthogonal`, each gradient first loses its component along the other one, so that a step for one objective
       does not undo, to first order, what was reached for the other.
    3. Keep the iterate of the highest second objective among those with the first above 0.

    To fool a classifier unseen by a detector, the first is the margin of the wrong classes, the second minus the
    anomaly score. It takes `fn(image, context) -> Pair`.

    Attributes:
        steps: steps of a run.
        step_size: length of a step in image units; None = epsilon / 8 (1/255 in a ball of 8/255).
        orthogonal: whether gradients are made orthogonal; else "selective".
        slack: what the first objective must exceed before the second is followed.
        restarts: runs, all but the first from random points.

    Source: Bryniarski et al. 2022, "Evading adversarial example detection defenses with orthogonal projected gradient
    descent", sections 4.1 (selective) and 4.2 (orthogonal). Deviations: restarts; steps on l2 take the unit gradient.
    """

    takes: ClassVar[str] = "pair"

    steps: int = 100
    step_size: Optional[float] = None
    orthogonal: bool = True
    slack: float = 0.05
    restarts: int = 1

    def __post_init__(self) -> None:
        """Check the search."""
        super().__post_init__()
        check_counts(self.steps, self.restarts, 0)
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise UsageError(f"step_size must be a finite number above 0, not {self.step_size}")
        if not 0 <= self.slack < math.inf:
            raise UsageError(f"slack must be a finite number of at least 0, not {self.slack}")

    @property
    def passes(self) -> int:
        """Steps of one run: gradients of both objectives each, and one at the start."""
        return self.steps + 1

    def again(self, image: tf.Tensor, seed: tf.Tensor) -> Point:
        """Return the state before the first step of a restart."""
        point = norms.random_point(image, epsilon=self.epsilon, norm=self.norm, seed=seed)
        return Point(point, nothing_tried(image))

    def step(
        self,
        fn: PairFn,
        state: Point,
        image: tf.Tensor,
        context: Context,
        success_fn: Optional[SuccessFn] = None,
    ) -> Point:
        """Try the state's point and move on for one of the two objectives."""
        here = state.image
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            tape.watch(here)
            pair = Pair(*(tf.cast(each, tf.float32) for each in fn(here, context)))
        first, second = (tape.gradient(each, here, unconnected_gradients=tf.UnconnectedGradients.ZERO) for each in pair)
        del tape
        if self.orthogonal:
            first, second = without(first, second), without(second, first)
        step_size = self.epsilon / 8 if self.step_size is None else self.step_size
        direction = norms.direction(where(pair.first > self.slack, second, first), self.norm)
        moved = tf.clip_by_value(here + step_size * direction, 0.0, 1.0)
        reached = pair.first > 0
        success = reached if success_fn is None else success_fn(here, context)
        loss = tf.where(reached, pair.second, tf.fill(tf.shape(pair.second), -float("inf")))
        tried = AttackResult(here, success, loss, tf.ones_like(state.best.queries))
        return Point(
            image=norms.project(moved, image, epsilon=self.epsilon, norm=self.norm), best=better(state.best, tried)
        )


def without(gradient: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
    """Return `gradient` [batch, ...] less its component along `other`: `g - <g, o> / <o, o> o` per example."""
    axes = tf.range(1, tf.rank(gradient))
    # The unit vector first: the squares of a confident classifier's tiny gradient would vanish.
    unit = norms.direction(other, "l2")
    along = tf.reduce_sum(gradient * unit, axis=axes, keepdims=True)
    return gradient - along * unit
