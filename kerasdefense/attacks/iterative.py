"""Attacks in steps: what an evaluation drives one compiled step at a time, with each example at a step of its own."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable, ClassVar, NamedTuple, Optional

import tensorflow as tf

from kerasdefense.attacks import norms
from kerasdefense.attacks.base import Attack, AttackResult
from kerasdefense.types import Context, SuccessFn, UsageError


class Point(NamedTuple):
    """The least that a search knows: the image to be tried next [batch, h, w, c], and the best of those tried."""

    image: tf.Tensor
    best: AttackResult


def better(first: AttackResult, second: AttackResult) -> AttackResult:
    """Return per example the result that succeeded, or of two equals the one of higher loss; add up the queries."""
    take = tf.where(first.success == second.success, second.loss > first.loss, second.success)
    return AttackResult(
        image=where(take, second.image, first.image),
        success=first.success | second.success,
        loss=tf.where(take, second.loss, first.loss),
        queries=first.queries + second.queries,
    )


def where(condition: tf.Tensor, first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
    """Return the rows of `first` where `condition` [batch] holds, of `second` elsewhere."""
    return tf.where(norms.column(condition, first), first, second)


def check_counts(steps: int, restarts: int, targets: int) -> None:
    """Raise a UsageError for numbers of steps, restarts or targets with which nothing can be searched."""
    if steps < 1 or restarts < 1 or targets < 0:
        given = f"{steps}, {restarts} and {targets}"
        raise UsageError(f"steps and restarts must be at least 1 and targets at least 0, not {given}")


def nothing_tried(image: tf.Tensor) -> AttackResult:
    """Return the result of a search around `image` [batch, h, w, c] that has not begun."""
    batch = tf.shape(image)[0]
    return AttackResult(
        image=image,
        success=tf.zeros([batch], tf.bool),
        loss=tf.fill([batch], -float("inf")),
        queries=tf.zeros([batch], tf.int32),
    )


@dataclasses.dataclass(frozen=True)
class Iterative(Attack):
    """An attack as three functions: `start`, `step` and `passes`, which an evaluation drives itself.

    A state is a NamedTuple of tensors [batch, ...] with the fields of `Point`. `start(image, seed)` does not pass the
    model; `step(fn, state, image, context, success_fn)` tries the state's image, keeps it if it is the best, and moves
    on, each example by itself: examples of one batch may be at different steps, which `state.best.queries` counts.
    After `passes` steps a run is over. `fn` is what `takes` says, a LossFn or a LogitsFn.

    `targets` > 0: the attack pulls to a class, `context["target"]`; it is run for so many classes, likeliest first.
    """

    burst: ClassVar[int] = 4
    """Steps that an evaluation takes before it looks which examples have fallen."""

    @property
    def restarts(self) -> int:
        """Runs, with seeds of their own."""
        return 1

    @property
    def targets(self) -> int:
        """Classes to pull to, each in runs of its own; 0 = untargeted."""
        return 0

    @property
    def passes(self) -> int:
        """Steps of one run."""
        raise TypeError(f"{type(self).__name__} does not say how many steps it takes")

    def start(self, image: tf.Tensor, seed: tf.Tensor) -> Any:
        """Return the state before the first step."""
        return Point(image, nothing_tried(image))

    def again(self, image: tf.Tensor, seed: tf.Tensor) -> Any:
        """Return the state before the first step of a restart, by default as at first, with other seeds."""
        return self.start(image, seed)

    def step(
        self,
        fn: Callable[..., tf.Tensor],
        state: Any,
        image: tf.Tensor,
        context: Context,
        success_fn: Optional[SuccessFn] = None,
    ) -> Any:
        """Return the state after one more pass."""
        raise TypeError(f"{type(self).__name__} does not say how it steps")

    def restart_seed(self, seed: tf.Tensor, restart: int) -> tf.Tensor:
        """Return the seeds [batch, 2] of one restart."""
        return seed + tf.constant([restart, 0], tf.int32)

    def __call__(
        self,
        fn: Callable[..., tf.Tensor],
        image: tf.Tensor,
        context: Context,
        seed: tf.Tensor,
        success_fn: Optional[SuccessFn] = None,
    ) -> AttackResult:
        """Search around `image` [batch, h, w, c] in [0, 1], with all restarts, and return the best, stop-gradiented.

        Args:
            fn: `loss_fn(image, context)` where the attack takes a loss, `logits_fn(image)` where it takes logits.
            image: float32 [batch, h, w, c] in [0, 1].
            context: nest of tensors with leading axis [batch]; where the attack takes logits, the label int32 [batch]
                will do.
            seed: int32 [batch, 2].
            success_fn: goal of an attack that takes a loss; those that take logits know theirs.
        """
        image, seed = tf.convert_to_tensor(image, tf.float32), tf.convert_to_tensor(seed, tf.int32)
        if self.takes == "logits" and not isinstance(context, dict):
            context = {"label": tf.convert_to_tensor(context, tf.int32)}

        def advance(number: tf.Tensor, state: Any) -> tuple[tf.Tensor, Any]:
            # A model behind `tf.numpy_function`, say, forgets how many images it was given.
            moved = self.step(fn, state, image, context, success_fn)
            return number + 1, tf.nest.map_structure(lambda new, old: tf.ensure_shape(new, old.shape), moved, state)

        results = []
        for restart in range(self.restarts):
            begin = self.again if restart else self.start
            state = begin(image, self.restart_seed(seed, restart))
            _, state = tf.while_loop(lambda number, _: number < self.passes, advance, (tf.constant(0), state))
            results.append(state.best)
        best: AttackResult = functools.reduce(better, results)
        return AttackResult(*map(tf.stop_gradient, best))
