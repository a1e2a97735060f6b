"""DeepFool: repeated steps to the nearest boundary of the linearised classifier."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, NamedTuple, Optional

import keras
import tensorflow as tf

from kerasdefense import losses
from kerasdefense.attacks import norms
from kerasdefense.attacks.base import AttackResult
from kerasdefense.attacks.iterative import Iterative, nothing_tried, where
from kerasdefense.attacks.objectives import ranked_targets
from kerasdefense.types import Context, LogitsFn, SuccessFn, UsageError

_STRIDE = 1e-4
"""Added to the length of every move: else moves that the box cuts short come ever closer to the boundary and stay."""
_FAR = 1e10
_TINY = 1e-12


class DeepFoolState(NamedTuple):
    """Where a search stands: the point to be tried next, the result so far, and the sum of the moves made."""

    image: tf.Tensor
    best: AttackResult
    moved: tf.Tensor


@keras.saving.register_keras_serializable(package="kerasdefense")
@dataclasses.dataclass(frozen=True)
class DeepFool(Iterative):
    """Minimum-norm attack: go straight to the nearest boundary of the linearised classifier until the class changes.

    1. Start at the image.
    2. `steps` times, until the point fools: of the likeliest classes other than the label, take the one whose
       linearised boundary is nearest, `|lead| / ||gradient||_dual`, and add the shortest move onto it to those made;
       the next point is the image plus `1 + overshoot` times their sum, clipped to [0, 1].

    It succeeds where the point that fools lies in the ball; else the image is given back. A step takes a gradient of
    each of the `classes - 1` rivals, and counts as one query. The loss is the margin.

    Attributes:
        steps: moves at most.
        overshoot: by how much the moves are lengthened, to come to the other side of the boundary.
        classes: how many classes are looked at, the label and the likeliest others.

    Source: Moosavi-Dezfooli et al. 2016, "DeepFool: a simple and accurate method to fool deep neural networks",
    algorithm 2; other norms: its section 3.3. Deviations: as in the authors' code, the sum is overshot at every step
    and every move is 1e-4 longer; points are clipped to the box; the likeliest classes are those at the current point,
    where that code keeps those at the image; it moves off the label, where the paper moves off the predicted class.
    """

    takes: ClassVar[str] = "logits"

    steps: int = 50
    overshoot: float = 0.02
    classes: int = 10

    def __post_init__(self) -> None:
        """Check the search."""
        super().__post_init__()
        if self.steps < 1 or self.classes < 2:
            raise UsageError(f"steps must be at least 1 and classes at least 2, not {self.steps} and {self.classes}")
        if not 0 <= self.overshoot < math.inf:
            raise UsageError(f"overshoot must be a finite number of at least 0, not {self.overshoot}")

    @property
    def passes(self) -> int:
        """Steps of one run: one at the image, and one after each move."""
        return self.steps + 1

    def start(self, image: tf.Tensor, seed: tf.Tensor) -> DeepFoolState:
        """Return the state before the first step, at the image."""
        return DeepFoolState(image, nothing_tried(image), tf.zeros_like(image))

    def step(
        self,
        fn: LogitsFn,
        state: DeepFoolState,
        image: tf.Tensor,
        context: Context,
        success_fn: Optional[SuccessFn] = None,
    ) -> DeepFoolState:
        """Look whether the state's point fools, and if not, move on to the nearest linearised boundary."""
        label = context["label"]
        logits, leads, slopes = self._rivals(fn, state.image, label)
        fools = tf.argmax(logits, axis=-1, output_type=tf.int32) != label
        inside = norms.length(state.image - image, self.norm) <= self.epsilon
        first = state.best.queries == 0
        take = first | (fools & inside & ~state.best.success)
        best = AttackResult(
            image=where(take, state.image, state.best.image),
            success=state.best.success | (fools & inside),
            loss=tf.where(take, losses.margin(logits, label), state.best.loss),
            queries=state.best.queries + 1,
        )
        moved = where(fools, state.moved, state.moved + self._shortest_move(leads, slopes))
        point = tf.clip_by_value(image + (1 + self.overshoot) * moved, 0.0, 1.0)
        return DeepFoolState(where(fools, state.image, point), best, moved)

    def _rivals(self, fn: LogitsFn, point: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Return the logits [batch, classes], the rivals' leads over the label [batch, n], and their gradients."""
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            tape.watch(point)
            logits = tf.cast(fn(point), tf.float32)
        count = logits.shape[-1]
        rivals = ranked_targets(logits, label, min(self.classes, count) - 1)
        weights = tf.one_hot(rivals, count) - tf.one_hot(label, count)[:, None]
        zero = tf.UnconnectedGradients.ZERO
        slopes = [
            tape.gradient(logits, point, each, unconnected_gradients=zero) for each in tf.unstack(weights, axis=1)
        ]
        return logits, tf.reduce_sum(weights * logits[:, None], axis=2), tf.stack(slopes, axis=1)

    def _shortest_move(self, leads: tf.Tensor, slopes: tf.Tensor) -> tf.Tensor:
        """Return the shortest move [batch, h, w, c] that brings one of the leads to zero where they are linear."""
        flat = tf.reshape(slopes, [-1, leads.shape[1], math.prod(slopes.shape[2:])])
        # Scaled, so that the squares of a confident classifier's tiny gradient do not vanish.
        size = tf.maximum(tf.reduce_max(tf.abs(flat), axis=2), _TINY)
        scaled = flat / size[:, :, None]
        direction = tf.sign(scaled) if self.norm == "linf" else scaled
        gain = tf.reduce_sum(scaled * direction, axis=2)
        unit = tf.sqrt(gain) if self.norm == "l2" else tf.sign(gain)  # the length of the direction
        length = tf.math.divide_no_nan(tf.abs(leads) / size, gain) * unit
        nearest = tf.argmin(tf.where(gain > 0, length, _FAR), axis=1, output_type=tf.int32)
        times = tf.math.divide_no_nan(length + _STRIDE, unit)
        move = tf.gather(times[:, :, None] * direction, nearest, batch_dims=1)
        return tf.reshape(move, tf.shape(slopes[:, 0]))
