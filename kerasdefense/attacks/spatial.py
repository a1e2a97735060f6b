"""Spatially transformed examples: an attack that moves pixels about, outside the balls that other attacks keep to."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Callable, ClassVar, NamedTuple

import keras
import tensorflow as tf

from kerasdefense import losses
from kerasdefense.attacks import norms, seeds
from kerasdefense.attacks.base import AttackResult
from kerasdefense.attacks.iterative import nothing_tried, where
from kerasdefense.types import LogitsFn, PathFn, UsageError

_FIRST_DECAY, _SECOND_DECAY, _TINY = 0.9, 0.999, 1e-8
_AtStep = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
"""From images and how many steps each has taken, int32 [batch], to logits."""


class StAdvState(NamedTuple):
    """Where a search stands.

    `flow` [batch, h, w, 2] is tried next; `first` and `second` are Adam's moments of its gradient. `best` is the best
    image tried, `best_flow` what made it, `roughness` [batch] the total variation of that.
    """

    flow: tf.Tensor
    first: tf.Tensor
    second: tf.Tensor
    best: AttackResult
    best_flow: tf.Tensor
    roughness: tf.Tensor


@keras.saving.register_keras_serializable(package="kerasdefense")
@dataclasses.dataclass(frozen=True)
class StAdv:
    """Fool by a smooth flow: each pixel takes the value found a little way off in the image.

    The threat model is no ball: any picture `warp(image, flow)` whose flow moves no pixel by more than `flow_bound`
    rows or columns. Where the image has edges it is far off in linf and l2, so that robust accuracy in a ball says
    nothing about it, and what it finds counts towards none; it is for claims about unseen attacks. It is therefore no
    `Attack`, has no norm and no radius, and does not stand in ATTACKS.

    1. Start at no flow.
    2. `steps` times: step by Adam up the gradient of `min(margin, confidence) - tau * total_variation(flow)`, and clip
       the flow to the bound.
    3. Return, of the images that fool, the one with the smoothest flow; where none does, the one of the highest margin.

    Attributes:
        flow_bound: furthest that a pixel may move along each axis, in pixels.
        tau: weight of the flow's total variation.
        confidence: margin in logits from which on only smoothness counts.
        steps: gradient steps.
        step_size: Adam's step size, in pixels.

    Source: Xiao et al. 2018, "Spatially transformed adversarial examples", section 3. Deviations: untargeted; Adam in
    place of L-BFGS; the flow is bounded; 1e-8 is added below the roots of the total variation, which have no gradient
    at zero.
    """

    takes: ClassVar[str] = "logits"
    restarts: ClassVar[int] = 1

    flow_bound: float = 1.0
    tau: float = 0.05
    confidence: float = 0.5
    steps: int = 100
    step_size: float = 0.05

    def __post_init__(self) -> None:
        """Check the threat model and the search."""
        for name in ("flow_bound", "tau", "confidence"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} must be a finite number of at least 0, not {getattr(self, name)}")
        if self.steps < 1:
            raise UsageError(f"steps must be at least 1, not {self.steps}")
        if not 0 < self.step_size < math.inf:
            raise UsageError(f"step_size must be a finite number above 0, not {self.step_size}")

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments, as Keras serialisation asks for them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> StAdv:
        """Build the attack from `get_config()`."""
        return cls(**config)

    def __call__(self, logits_fn: LogitsFn, image: tf.Tensor, label: tf.Tensor, seed: tf.Tensor) -> AttackResult:
        """Move the pixels of `image` so that `logits_fn` misses `label`.

        Args:
            logits_fn: `image -> logits [batch, classes]`.
            image: float32 [batch, height, width, channels] in [0, 1].
            label: int32 [batch].
            seed: int32 [batch, 2]; not used, for nothing is drawn.

        Returns:
            AttackResult, stop-gradiented; its loss is the margin.
        """
        del seed
        return self.search(logits_fn, image, label).best

    def search(self, logits_fn: LogitsFn, image: tf.Tensor, label: tf.Tensor) -> StAdvState:
        """Return the state after the last step, with the flow that makes the best image."""
        return self._search(lambda each, _: logits_fn(each), image, label, prefers_smooth=True)

    def search_at_random(self, path: PathFn, image: tf.Tensor, label: tf.Tensor, seed: tf.Tensor) -> StAdvState:
        """Return the same for a path that draws at random, which each step asks by seeds of its own.

        One draw that is fooled says little of the next: of the flows tried, that of the highest margin is kept, be it
        smooth or not. For the same reason `tau` should be 0 and `confidence` large.

        Args:
            path: `(image, seed) -> logits`, best the mean over several draws, as `eot` makes it.
            image: float32 [batch, height, width, channels] in [0, 1].
            label: int32 [batch].
            seed: int32 [batch, 2], from which those of the steps follow.
        """

        def at_step(each: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
            return path(each, seeds.advance(seed, number))

        return self._search(at_step, image, label, prefers_smooth=False)

    def _search(self, answer: _AtStep, image: tf.Tensor, label: tf.Tensor, *, prefers_smooth: bool) -> StAdvState:
        image, label = tf.convert_to_tensor(image, tf.float32), tf.convert_to_tensor(label, tf.int32)
        best = nothing_tried(image)
        flow = tf.repeat(tf.zeros_like(image[..., :1]), 2, axis=-1)
        state = StAdvState(flow, flow, flow, best, flow, tf.zeros_like(best.loss))
        _, state = tf.while_loop(
            lambda number, _: number <= self.steps,
            lambda number, state: (number + 1, self._step(answer, state, image, label, prefers_smooth)),
            (tf.constant(0), state),
        )
        return StAdvState(*tf.nest.map_structure(tf.stop_gradient, state))

    def _step(
        self, answer: _AtStep, state: StAdvState, image: tf.Tensor, label: tf.Tensor, prefers_smooth: bool
    ) -> StAdvState:
        """Try the state's flow, and move it on."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(state.flow)
            warped = warp(image, state.flow)
            logits = tf.cast(answer(warped, state.best.queries), tf.float32)
            margin = losses.margin(logits, label)
            roughness = total_variation(state.flow)
            objective = tf.minimum(margin, self.confidence) - self.tau * roughness
        gradient = tape.gradient(objective, state.flow)
        success = tf.argmax(logits, axis=-1, output_type=tf.int32) != label
        take = margin > state.best.loss
        if prefers_smooth:
            gains = tf.where(state.best.success, roughness < state.roughness, take)
            take = tf.where(state.best.success == success, gains, success)
        number = state.best.queries + 1
        best = AttackResult(
            image=where(take, warped, state.best.image),
            success=state.best.success | success,
            loss=tf.where(take, margin, state.best.loss),
            queries=number,
        )
        first = _FIRST_DECAY * state.first + (1 - _FIRST_DECAY) * gradient
        second = _SECOND_DECAY * state.second + (1 - _SECOND_DECAY) * gradient**2
        share = norms.column(tf.cast(number, tf.float32), gradient)
        mean, square = first / (1 - _FIRST_DECAY**share), second / (1 - _SECOND_DECAY**share)
        flow = state.flow + self.step_size * mean / (tf.sqrt(square) + _TINY)
        return StAdvState(
            flow=tf.clip_by_value(flow, -self.flow_bound, self.flow_bound),
            first=first,
            second=second,
            best=best,
            best_flow=where(take, state.flow, state.best_flow),
            roughness=tf.where(take, roughness, state.roughness),
        )


def warp(image: tf.Tensor, flow: tf.Tensor) -> tf.Tensor:
    """Return images whose pixel at (row, column) has the value at (row, column) + flow, bilinear, edges repeated.

    Args:
        image: float32 [batch, h, w, c].
        flow: float32 [batch, h, w, 2], in pixels down and to the right.

    Returns:
        float32, the shape of `image`, with gradients to image and flow.
    """
    height, width = image.shape[1:3]
    rows = tf.range(height, dtype=tf.float32)[None, :, None] + flow[..., 0]
    columns = tf.range(width, dtype=tf.float32)[None, None, :] + flow[..., 1]
    above, left = tf.floor(rows), tf.floor(columns)
    down, right = (rows - above)[..., None], (columns - left)[..., None]

    def at(row: tf.Tensor, column: tf.Tensor) -> tf.Tensor:
        place = tf.stack([tf.clip_by_value(row, 0, height - 1), tf.clip_by_value(column, 0, width - 1)], axis=-1)
        return tf.gather_nd(image, tf.cast(place, tf.int32), batch_dims=1)

    upper = (1 - right) * at(above, left) + right * at(above, left + 1)
    lower = (1 - right) * at(above + 1, left) + right * at(above + 1, left + 1)
    return (1 - down) * upper + down * lower


def total_variation(flow: tf.Tensor) -> tf.Tensor:
    """Return by how much a flow [batch, h, w, 2] differs between neighbours, Euclidean, summed over pairs: [batch]."""
    pairs = flow[:, 1:] - flow[:, :-1], flow[:, :, 1:] - flow[:, :, :-1]
    lengths = (tf.sqrt(tf.reduce_sum(pair**2, axis=-1) + _TINY) for pair in pairs)
    return tf.add_n([tf.reduce_sum(each, axis=(1, 2)) for each in lengths])
