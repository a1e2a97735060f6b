"""FAB: the fast adaptive boundary attack, which looks for the smallest perturbation that fools."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, NamedTuple, Optional

import keras
import tensorflow as tf

from kerasdefense.attacks import norms
from kerasdefense.attacks.base import AttackResult
from kerasdefense.attacks.iterative import Iterative, check_counts, nothing_tried, where
from kerasdefense.types import Context, LogitsFn, SuccessFn, UsageError

_FAR = 1e10
_TINY = 1e-12
_PIECES = 64
"""Most pieces of a piecewise linear function that a projection walks along; it needs 5 to 15."""


class FABState(NamedTuple):
    """Where a search stands: the point to linearise at, the nearest adversarial image, and its distance [batch]."""

    image: tf.Tensor
    best: AttackResult
    distance: tf.Tensor


@keras.saving.register_keras_serializable(package="kerasdefense")
@dataclasses.dataclass(frozen=True)
class FAB(Iterative):
    """Minimum-norm attack: project onto the linearised decision boundary, and come back towards the image.

    1. Start at the image; a restart, at a random point within half of epsilon.
    2. `steps` times: linearise the difference of logits (of the nearest other class; with `targets`, of the given one),
       project both the point and the image onto its zero set within the box, and go to a mean of the two projections,
       overshooting by `eta`, with weight at most `alpha_max` for the image's.
    3. Where the new point fools, keep it if it is the nearest so far, and go back to `beta` of the way to it.

    It succeeds where the nearest point that fools lies in the ball, and is done there; else the image is given back.
    Without `targets` a step takes one gradient per class. A step passes the model twice, and counts as one query.

    Attributes:
        steps: linearisations of a run.
        alpha_max: largest weight of the image's own projection.
        eta: overshoot.
        beta: share of the way to an adversarial point that is kept.
        restarts: runs, the first from the image.
        targets: how many classes to go to, each in runs of its own; 0 = the nearest class at each step.

    Source: Croce & Hein 2020, "Minimally distorted adversarial examples with a fast adaptive boundary attack",
    algorithm 1, with the targeted form of AutoAttack. Deviations: restarts draw within half of epsilon, not of the
    distance found so far; a run ends at the first adversarial point in the ball, without looking for a nearer one.
    """

    takes: ClassVar[str] = "logits"

    steps: int = 100
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    restarts: int = 1
    targets: int = 0

    def __post_init__(self) -> None:
        """Check the search."""
        super().__post_init__()
        check_counts(self.steps, self.restarts, self.targets)
        if not (0 <= self.alpha_max <= 1 and self.eta >= 1 and 0 < self.beta < 1):
            given = f"{self.alpha_max}, {self.eta} and {self.beta}"
            raise UsageError(f"alpha_max must be in [0, 1], eta at least 1 and beta in (0, 1), not {given}")

    @property
    def passes(self) -> int:
        """Steps of one run."""
        return self.steps

    def start(self, image: tf.Tensor, seed: tf.Tensor) -> FABState:
        """Return the state before the first step of the first run, at the image."""
        best = nothing_tried(image)
        return FABState(image, best, tf.fill(tf.shape(best.loss), _FAR))

    def again(self, image: tf.Tensor, seed: tf.Tensor) -> FABState:
        """Return the state before the first step of a later restart, at a random point."""
        point = norms.random_point(image, epsilon=self.epsilon / 2, norm=self.norm, seed=seed, on_sphere=True)
        return self.start(image, seed)._replace(image=point)

    def step(
        self,
        fn: LogitsFn,
        state: FABState,
        image: tf.Tensor,
        context: Context,
        success_fn: Optional[SuccessFn] = None,
    ) -> FABState:
        """Go to the boundary of the linearised classifier, and look whether the new point fools."""
        label = context["label"]
        if self.targets:
            lead, gradient = _lead_of_target(fn, state.image, label, context["target"])
        else:
            lead, gradient = self._lead_of_nearest(fn, state.image, label)
        point = self._towards_boundary(state.image, image, lead, gradient)

        logits = fn(point)
        fools = tf.argmax(logits, axis=-1, output_type=tf.int32) != label
        length = norms.length(point - image, self.norm)
        nearer = fools & (length < state.distance)
        distance = tf.where(nearer, length, state.distance)
        inside = nearer & (length <= self.epsilon)
        best = AttackResult(
            image=where(inside, point, state.best.image),
            success=state.best.success | inside,
            loss=tf.where(distance < _FAR, -distance, state.best.loss),
            queries=state.best.queries + 1,
        )
        return FABState(where(fools, image + self.beta * (point - image), point), best, distance)

    def _lead_of_nearest(self, fn: LogitsFn, point: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return, of the class whose linearised boundary is nearest, how far it leads the label, and the gradient."""
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            tape.watch(point)
            logits = tf.cast(fn(point), tf.float32)
            columns = tf.unstack(logits, axis=1)
        zero = tf.UnconnectedGradients.ZERO
        gradients = tf.stack([tape.gradient(each, point, unconnected_gradients=zero) for each in columns], axis=1)
        leads = logits - tf.gather(logits, label, batch_dims=1)[:, None]
        slopes = gradients - tf.gather(gradients, label, batch_dims=1)[:, None]
        flat = tf.reshape(slopes, [-1, len(columns), math.prod(point.shape[1:])])
        dual = tf.reduce_sum(tf.abs(flat), axis=2) if self.norm == "linf" else tf.norm(flat, axis=2)
        is_label = tf.one_hot(label, len(columns), on_value=True, off_value=False, dtype=tf.bool)
        distance = tf.where(is_label, _FAR, tf.abs(leads) / (dual + _TINY))
        nearest = tf.argmin(distance, axis=1, output_type=tf.int32)
        return tf.gather(leads, nearest, batch_dims=1), tf.gather(slopes, nearest, batch_dims=1)

    def _towards_boundary(self, point: tf.Tensor, image: tf.Tensor, lead: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
        """Return the mean of the two projections onto the boundary, overshot, in the box."""
        batch, shape = tf.shape(image)[0], tf.shape(image)
        pixels = math.prod(image.shape[1:])
        slope, here, origin = (tf.reshape(each, [batch, pixels]) for each in (gradient, point, image))
        gap = tf.reduce_sum(slope * (here - origin), axis=1) - lead
        move = move_to_plane(
            tf.concat([here, origin], axis=0),
            tf.concat([slope, slope], axis=0),
            tf.concat([-lead, gap], axis=0),
            norm=self.norm,
        )
        length = tf.maximum(norms.length(move, self.norm), 1e-8)
        share = tf.minimum(length[:batch] / (length[:batch] + length[batch:]), self.alpha_max)[:, None]
        mean = (1 - share) * (here + self.eta * move[:batch]) + share * (origin + self.eta * move[batch:])
        return tf.reshape(tf.clip_by_value(mean, 0.0, 1.0), shape)


def _lead_of_target(fn: LogitsFn, point: tf.Tensor, label: tf.Tensor, target: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return how far the target's logit is above the label's [batch], and its gradient."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(point)
        logits = tf.cast(fn(point), tf.float32)
        lead = tf.gather(logits, target, batch_dims=1) - tf.gather(logits, label, batch_dims=1)
    return lead, tape.gradient(lead, point, unconnected_gradients=tf.UnconnectedGradients.ZERO)


def move_to_plane(point: tf.Tensor, slope: tf.Tensor, gap: tf.Tensor, *, norm: str) -> tf.Tensor:
    """Return the shortest move from `point` within the box [0, 1] that gains `gap`: `<slope, move> = gap`.

    Each coordinate i moves by `min(t q_i, room_i)` towards the plane, with q = 1 (linf) or |slope| (l2) and room its
    way to the box. What all of them gain, `sum_i |slope_i| min(t q_i, room_i)`, is concave and piecewise linear in t,
    so that Newton's method from t = 0 reaches the t of the plane from below in a few pieces, exactly. Where the plane
    does not meet the box, the move goes to the corner that is nearest to it.

    Args:
        point: float32 [batch, d] in [0, 1].
        slope: float32 [batch, d].
        gap: float32 [batch].
        norm: one of NORMS, in which the move is shortest.

    Returns:
        float32 [batch, d].

    Source: Croce & Hein 2020 (FAB), section 2 and its appendix; solved there by sorting. Deviations: none
    in the result.
    """
    sign = tf.sign(gap)[:, None] * tf.sign(slope)
    room = tf.where(sign > 0, 1 - point, point)
    weight = tf.abs(slope)
    # Scaled, so that neither tiny nor huge slopes leave the range of floats when squared.
    weight = tf.math.divide_no_nan(weight, tf.reduce_max(weight, axis=1, keepdims=True))
    gap = tf.math.divide_no_nan(tf.abs(gap), tf.reduce_max(tf.abs(slope), axis=1))
    speed = tf.ones_like(weight) if norm == "linf" else weight

    def next_time(time: tf.Tensor) -> tf.Tensor:
        """Return when the plane is reached if no other coordinate stops than those that have at `time`."""
        stopped = speed * time[:, None] >= room
        rest = gap - tf.reduce_sum(tf.where(stopped, weight * room, 0.0), axis=1)
        rate = tf.reduce_sum(tf.where(stopped, 0.0, weight * speed), axis=1)
        return tf.where(rate > _TINY, rest / tf.maximum(rate, _TINY), _FAR)

    def go_on(number: tf.Tensor, time: tf.Tensor, last: tf.Tensor) -> tf.Tensor:
        return (number < _PIECES) & tf.reduce_any(time > last * (1 + 1e-6))

    def advance(number: tf.Tensor, time: tf.Tensor, last: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        return number + 1, tf.maximum(next_time(time), time), time

    zero = tf.zeros_like(gap)
    _, time, _ = tf.while_loop(go_on, advance, (tf.constant(0), next_time(zero), zero))
    return sign * tf.minimum(speed * time[:, None], room)
