"""Carlini and Wagner's L2 attack: gradient descent on the distance and on a margin at once."""

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
from kerasdefense.types import Context, LogitsFn, SuccessFn, UsageError

_INNER = 1 - 1e-6
"""Share of the box to which images are drawn in, so that the hyperbolic arctangent of black and white is finite."""
_DECAYS = (0.9, 0.999)
_TINY = 1e-8


class CarliniWagnerState(NamedTuple):
    """Where a search stands.

    `image` is tried next, `best` is the result so far. `variable` [batch, h, w, c] is what descends, of which the image
    is `(1 + tanh) / 2`, and `mean` and `square` are Adam's moments of its gradient. `constant` [batch] weights the
    margin, `low` and `high` [batch] enclose the least constant that fools, and `fooled` says whether this one has.
    """

    image: tf.Tensor
    best: AttackResult
    variable: tf.Tensor
    mean: tf.Tensor
    square: tf.Tensor
    constant: tf.Tensor
    low: tf.Tensor
    high: tf.Tensor
    fooled: tf.Tensor


@keras.saving.register_keras_serializable(package="kerasdefense")
@dataclasses.dataclass(frozen=True)
class CarliniWagner(Iterative):
    """Minimum-norm attack: descend on the squared distance plus a constant times how far the label still leads.

    1. Start at the image, `(1 + tanh variable) / 2`, so that the box needs no clipping.
    2. `steps` times: try the point, and move the variable by Adam down the gradient of
       `||delta||_2^2 + constant * max(z_label - max_{c != label} z_c + kappa, 0)`.
    3. Start again with another constant, `searches` times in all: ten times as much as long as none has fooled; then
       the middle between the largest that has not and the smallest that has.

    It succeeds where a point that fools, by a margin of at least `kappa`, lies in the ball, and gives the nearest such
    point; else the image is given back. An evaluation that drives its steps is done at the first such point. The loss
    is the margin. What the constant does depends on the scale of the logits: where they are bounded, a small one makes
    fooling not worth the way. `searches=1, constant=1e-4` is the default of some libraries, and says little of a model.

    Attributes:
        steps: points that are tried with each constant, the image first.
        searches: constants that are tried.
        constant: the first of them.
        learning_rate: Adam's.
        kappa: margin that is asked for, in logits.

    Source: Carlini & Wagner 2017, "Towards evaluating the robustness of neural networks", section VI.A, untargeted.
    Deviations: no search is left early where its loss stands still, and the last one does not go back to the largest
    constant.
    """

    takes: ClassVar[str] = "logits"

    norm: str = "l2"
    epsilon: float = 0.5
    steps: int = 1000
    searches: int = 9
    constant: float = 1e-2
    learning_rate: float = 0.01
    kappa: float = 0.0

    def __post_init__(self) -> None:
        """Check the search."""
        super().__post_init__()
        if self.norm != "l2":
            raise UsageError(f"{type(self).__name__} attacks in the l2 norm only, not {self.norm}")
        if self.steps < 1 or self.searches < 1:
            raise UsageError(f"steps and searches must be at least 1, not {self.steps} and {self.searches}")
        if not (0 < self.constant < math.inf and 0 < self.learning_rate < math.inf):
            given = f"{self.constant} and {self.learning_rate}"
            raise UsageError(f"constant and learning_rate must be finite numbers above 0, not {given}")
        if not 0 <= self.kappa < math.inf:
            raise UsageError(f"kappa must be a finite number of at least 0, not {self.kappa}")

    @property
    def passes(self) -> int:
        """Steps of one run, with all constants."""
        return self.searches * self.steps

    def start(self, image: tf.Tensor, seed: tf.Tensor) -> CarliniWagnerState:
        """Return the state before the first step, at the image."""
        best = nothing_tried(image)
        zero = tf.zeros_like(best.loss)
        return _begun(image, best, constant=zero + self.constant, low=zero, high=zero + math.inf)

    def step(
        self,
        fn: LogitsFn,
        state: CarliniWagnerState,
        image: tf.Tensor,
        context: Context,
        success_fn: Optional[SuccessFn] = None,
    ) -> CarliniWagnerState:
        """Look whether the state's point fools, and go on down the gradient, or to another constant."""
        label = context["label"]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(state.image)
            logits = tf.cast(fn(state.image), tf.float32)
            margin = losses.margin(logits, label)
            distance = tf.reduce_sum(tf.math.squared_difference(state.image, image), axis=(1, 2, 3))
            cost = distance + state.constant * tf.nn.relu(self.kappa - margin)
        gradient = tape.gradient(cost, state.image)
        fools = (tf.argmax(logits, axis=-1, output_type=tf.int32) != label) & (margin >= self.kappa)
        moved = self._descended(state, gradient)._replace(
            best=self._best(state, image, fools, margin), fooled=state.fooled | fools
        )
        return self._restarted(moved, image)

    def _best(self, state: CarliniWagnerState, image: tf.Tensor, fools: tf.Tensor, margin: tf.Tensor) -> AttackResult:
        """Return the result with the state's point in it, where that fools and is the nearest in the ball."""
        best = state.best
        distance = norms.length(state.image - image, self.norm)
        nearer = ~best.success | (distance < norms.length(best.image - image, self.norm))
        found = fools & (distance <= self.epsilon)
        take = (best.queries == 0) | (found & nearer)
        return AttackResult(
            image=where(take, state.image, best.image),
            success=best.success | found,
            loss=tf.where(take, margin, best.loss),
            queries=best.queries + 1,
        )

    def _descended(self, state: CarliniWagnerState, gradient: tf.Tensor) -> CarliniWagnerState:
        """Return the state after a step of Adam, for the gradient at its point [batch, h, w, c]."""
        slope = (1 - tf.square(tf.tanh(state.variable))) / 2
        gradient = tf.where(tf.math.is_nan(gradient), 0.0, gradient * slope)
        first, second = _DECAYS
        mean = first * state.mean + (1 - first) * gradient
        square = second * state.square + (1 - second) * tf.square(gradient)
        count = norms.column(tf.cast(state.best.queries % self.steps + 1, tf.float32), gradient)
        spread = tf.sqrt(square / (1 - second**count)) + _TINY
        variable = state.variable - self.learning_rate * mean / (1 - first**count) / spread
        return state._replace(image=(1 + tf.tanh(variable)) / 2, variable=variable, mean=mean, square=square)

    def _restarted(self, state: CarliniWagnerState, image: tf.Tensor) -> CarliniWagnerState:
        """Return the state at the image with the next constant where the steps of this one are over."""
        low = tf.where(state.fooled, state.low, state.constant)
        high = tf.where(state.fooled, state.constant, state.high)
        constant = tf.where(tf.math.is_inf(high), 10 * state.constant, (low + high) / 2)
        begun = _begun(image, state.best, constant=constant, low=low, high=high)
        over = state.best.queries % self.steps == 0
        return tf.nest.map_structure(lambda new, old: where(over, new, old), begun, state)


def _begun(
    image: tf.Tensor, best: AttackResult, *, constant: tf.Tensor, low: tf.Tensor, high: tf.Tensor
) -> CarliniWagnerState:
    """Return the state in which the search with a constant begins, at the image and without momentum."""
    return CarliniWagnerState(
        image=image,
        best=best,
        variable=tf.atanh(_INNER * (2 * image - 1)),
        mean=tf.zeros_like(image),
        square=tf.zeros_like(image),
        constant=constant,
        low=low,
        high=high,
        fooled=tf.zeros_like(best.success),
    )
