"""Random noise in the ball: what no defense should fall to, and a check that better attacks beat."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, NamedTuple, Optional

import keras
import tensorflow as tf

from kerasdefense import losses
from kerasdefense.attacks import norms, seeds
from kerasdefense.attacks.base import AttackResult
from kerasdefense.attacks.iterative import Iterative, better, nothing_tried
from kerasdefense.types import Context, LogitsFn, SuccessFn, UsageError

_KINDS = 3


class NoiseState(NamedTuple):
    """Where a search stands: the image to be tried next, the best so far, and the seeds [batch, 2] of the draws."""

    image: tf.Tensor
    best: AttackResult
    seed: tf.Tensor


@keras.saving.register_keras_serializable(package="kerasdefense")
@dataclasses.dataclass(frozen=True)
class RandomNoise(Iterative):
    """Try noise of three kinds in turn and keep what has the highest margin.

    Draws number 0, 3, ... are uniform in the ball; 1, 4, ... normal with the standard deviation epsilon, projected to
    the ball; 2, 5, ... corners of a cube: +epsilon or -epsilon in each value for linf, scaled to the length epsilon for
    l2. All are clipped to [0, 1].

    Attributes:
        draws: tries, each one pass.

    Source: Carlini et al. 2019, "On evaluating adversarial robustness", section 4.3, asks for noise as a check.
    Deviations: none.
    """

    takes: ClassVar[str] = "logits"
    burst: ClassVar[int] = 20

    draws: int = 1000

    def __post_init__(self) -> None:
        """Check the search."""
        super().__post_init__()
        if self.draws < 1:
            raise UsageError(f"draws must be at least 1, not {self.draws}")

    @property
    def passes(self) -> int:
        """Steps of one run."""
        return self.draws

    def start(self, image: tf.Tensor, seed: tf.Tensor) -> NoiseState:
        """Return the state before the first try."""
        best = nothing_tried(image)
        return NoiseState(self.noisy(image, seed, best.queries), best, seed)

    def step(
        self,
        fn: LogitsFn,
        state: NoiseState,
        image: tf.Tensor,
        context: Context,
        success_fn: Optional[SuccessFn] = None,
    ) -> NoiseState:
        """Ask for the logits of the state's image, keep it if it is the best, and draw the next one."""
        logits, label = fn(state.image), context["label"]
        success = tf.argmax(logits, axis=-1, output_type=tf.int32) != label
        margin = tf.cast(losses.margin(logits, label), tf.float32)
        best = better(state.best, AttackResult(state.image, success, margin, tf.ones_like(state.best.queries)))
        return NoiseState(self.noisy(image, state.seed, best.queries), best, state.seed)

    def noisy(self, image: tf.Tensor, seed: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
        """Return draw number `number` int32 [batch] around `image` [batch, h, w, c], in the ball and in [0, 1]."""
        values = math.prod(image.shape[1:])
        draws = seeds.uniform(seed, number, values + 1)
        uniform, extra = draws[:, 1:], draws[:, :1]
        signs = tf.where(uniform < 0.5, -1.0, 1.0)
        normal = tf.math.ndtri(tf.clip_by_value(uniform, 1e-7, 1 - 1e-7))
        if self.norm == "linf":
            even = 2 * uniform - 1
        else:
            even = normal / tf.maximum(tf.norm(normal, axis=1, keepdims=True), 1e-12) * extra ** (1 / values)
            signs /= math.sqrt(values)
        kind = (number % _KINDS)[:, None]
        delta = self.epsilon * tf.where(kind == 0, even, tf.where(kind == 1, normal, signs))
        return norms.project(image + tf.reshape(delta, tf.shape(image)), image, epsilon=self.epsilon, norm=self.norm)
