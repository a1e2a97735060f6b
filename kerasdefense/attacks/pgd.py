"""Projected gradient ascent in a ball: PGD, and its one-step relatives FGSM and FGSM-RS.

The attack is four small functions (start, step, finish, and the better of two results), so that training can put its
few steps into one graph while evaluation drives one compiled step from Python, with progress and early stops.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from typing import Any, Callable, ClassVar, Optional

import keras
import tensorflow as tf

from kerasdefense.attacks import norms
from kerasdefense.attacks.base import AttackResult
from kerasdefense.attacks.iterative import Iterative, Point, better, nothing_tried
from kerasdefense.types import Context, LossFn, SuccessFn, UsageError

_UNROLLED = 10
"""Steps that are put into a graph one after the other, which runs a little faster and is traced more slowly."""


@keras.saving.register_keras_serializable(package="kerasdefense")
@dataclasses.dataclass(frozen=True)
class PGD(Iterative):
    """Projected gradient descent on the negative objective.

    1. Start at the image, or at a uniform random point of the ball.
    2. `steps` times: move by `step_size` along the gradient's sign (linf) or unit vector (l2), project to ball and box.
    3. Return the best iterate, success before loss (`keep="best"`: `steps` gradients and one pass), or the last one
       (`keep="last"`: what training uses; in a graph the final pass is pruned unless its loss is asked for).
    4. Repeat from other starts `restarts` times and keep the best.

    Attributes:
        steps: gradient steps, at least 1.
        step_size: length of a step in image units; None = 2.5 epsilon / steps.
        random_start: whether to start from a random point of the ball.
        restarts: independent searches; more than one needs `random_start`.
        keep: "best" or "last".

    Source: Madry et al. 2018; the step of 2.5 epsilon / steps is from its authors' code. Deviations: none.
    """

    steps: int = 10
    step_size: Optional[float] = None
    random_start: bool = True
    restarts: int = 1
    keep: str = "best"

    fewest_steps: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Check the search."""
        super().__post_init__()
        if self.steps < self.fewest_steps or self.restarts < 1:
            least = "1" if self.fewest_steps else "0 and 1"
            raise UsageError(f"steps and restarts must be at least {least}, not {self.steps} and {self.restarts}")
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise UsageError(f"step_size must be a finite number above 0, not {self.step_size}")
        if self.restarts > 1 and not self.random_start:
            raise UsageError("several restarts need a random start: without one they are all the same")
        if self.keep not in ("best", "last"):
            raise UsageError(f"keep must be best or last, not {self.keep!r}")

    @property
    def length(self) -> float:
        """The length of a step."""
        return self.step_size if self.step_size is not None else 2.5 * self.epsilon / self.steps

    def __call__(
        self,
        loss_fn: LossFn,
        image: tf.Tensor,
        context: Context,
        seed: tf.Tensor,
        success_fn: Optional[SuccessFn] = None,
    ) -> AttackResult:
        """Search around `image` for the highest `loss_fn`.

        Args:
            loss_fn: objective to maximise, `(image, context) -> [batch]`.
            image: float32 [batch, height, width, channels] in [0, 1].
            context: nest of tensors with leading axis [batch].
            seed: int32 [batch, 2].
            success_fn: goal of the attack; iterates that reach it are preferred.

        Returns:
            AttackResult, stop-gradiented.
        """
        image, seed = tf.convert_to_tensor(image, tf.float32), tf.convert_to_tensor(seed, tf.int32)
        results = []
        for restart in range(self.restarts):
            state = self.start(image, self.restart_seed(seed, restart))
            state = self._walked(lambda each: self.step(loss_fn, each, image, context, success_fn), state)
            results.append(self.finish(loss_fn, state, context, success_fn))
        best: AttackResult = functools.reduce(lambda first, second: better(first, second), results)
        return AttackResult(*map(tf.stop_gradient, best))

    def _walked(self, step: Callable[[Any], Any], state: Any) -> Any:
        """Return the state after all steps: each in the graph, or where they are many, in a loop."""
        if self.steps <= _UNROLLED:
            for _ in range(self.steps):
                state = step(state)
            return state

        def advance(number: tf.Tensor, state: Any) -> tuple[tf.Tensor, Any]:
            moved = step(state)
            # A model behind `tf.numpy_function`, say, forgets how many images it was given.
            return number + 1, tf.nest.map_structure(lambda new, old: tf.ensure_shape(new, old.shape), moved, state)

        return tf.while_loop(lambda number, _: number < self.steps, advance, (tf.constant(0), state))[1]

    def scaled(self, share: tf.Tensor) -> PGD:
        """Return the attack with radius and step times `share`, a scalar tensor above 0: for use inside one graph."""
        scaled = copy.copy(self)
        object.__setattr__(scaled, "epsilon", self.epsilon * share)
        object.__setattr__(scaled, "step_size", self.length * share)
        return scaled

    @property
    def passes(self) -> int:
        """Steps of one run: a gradient each, and one at the start."""
        return self.steps + 1

    def start(self, image: tf.Tensor, seed: tf.Tensor) -> Any:
        """Return the state before the first step."""
        start = image
        if self.random_start:
            start = norms.random_point(image, epsilon=self.epsilon, norm=self.norm, seed=seed)
        return Point(start, nothing_tried(image))

    def step(
        self,
        loss_fn: LossFn,
        state: Any,
        image: tf.Tensor,
        context: Context,
        success_fn: Optional[SuccessFn] = None,
    ) -> Any:
        """Try the state's point and move on along its gradient."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(state.image)
            loss = loss_fn(state.image, context)
        gradient = tape.gradient(loss, state.image, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        # Clipped first, or the projection on l2 would shrink every pixel on account of those that the box stops.
        moved = tf.clip_by_value(state.image + self.length * norms.direction(gradient, self.norm), 0.0, 1.0)
        return Point(
            image=norms.project(moved, image, epsilon=self.epsilon, norm=self.norm),
            best=better(state.best, self._tried(state.image, loss, context, success_fn)),
        )

    def finish(
        self, loss_fn: LossFn, state: Point, context: Context, success_fn: Optional[SuccessFn] = None
    ) -> AttackResult:
        """Try the last point and return what the search found."""
        last = self._tried(state.image, loss_fn(state.image, context), context, success_fn)
        if self.keep == "last":
            return last._replace(queries=state.best.queries + last.queries)
        return better(state.best, last)

    def _tried(
        self, image: tf.Tensor, loss: tf.Tensor, context: Context, success_fn: Optional[SuccessFn]
    ) -> AttackResult:
        success = tf.zeros_like(loss, tf.bool) if success_fn is None else success_fn(image, context)
        return AttackResult(image, success, tf.cast(loss, tf.float32), tf.ones_like(loss, tf.int32))


@keras.saving.register_keras_serializable(package="kerasdefense")
@dataclasses.dataclass(frozen=True)
class FGSM(PGD):
    """Fast gradient sign method: one full step from the image itself (l2: along the unit gradient).

    Source: Goodfellow et al. 2015. Deviations: none.
    """

    steps: int = 1
    random_start: bool = False
    keep: str = "last"

    def __post_init__(self) -> None:
        """Check that it is one step."""
        super().__post_init__()
        if self.steps != 1:
            raise UsageError(f"{type(self).__name__} takes one step, not {self.steps}; use pgd for more")

    @property
    def length(self) -> float:
        """The length of the step, epsilon unless given."""
        return self.step_size if self.step_size is not None else self.epsilon


@keras.saving.register_keras_serializable(package="kerasdefense")
@dataclasses.dataclass(frozen=True)
class FGSMRS(FGSM):
    """FGSM from a random start, with a step of 1.25 epsilon.

    Source: Wong et al. 2020, "Fast is better than free", algorithm 3. Deviations: the start is clipped to [0, 1] before
    the gradient is taken, and BatchNormalization is in inference mode while crafting.
    """

    random_start: bool = True

    @property
    def length(self) -> float:
        """The length of the step, 1.25 epsilon unless given."""
        return self.step_size if self.step_size is not None else 1.25 * self.epsilon
