"""One attack on one path, compiled, and the exact path by which every candidate is scored."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from kerasdefense.attacks import OBJECTIVES, check_logits, misclassified, seeds, share_pass
from kerasdefense.evaluation.suites import PlannedAttack
from kerasdefense.types import Context, LossFn, PathFn, SuccessFn, UsageError

_SMALL = 4
"""Chunks of few survivors are padded to a quarter of the chunk size, others to the whole."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some test images as NumPy arrays: image float32 [n, h, w, c], label int32 [n], index int32 [n]."""

    image: np.ndarray
    label: np.ndarray
    index: np.ndarray

    def rows(self, rows: np.ndarray) -> Chunk:
        """Return the rows of an index array."""
        return Chunk(self.image[rows], self.label[rows], self.index[rows])

    def padded(self, chunk_size: int) -> Chunk:
        """Return the chunk with its first row repeated behind it, up to one of two fixed sizes."""
        count, small = len(self.label), max(1, chunk_size // _SMALL)
        rows = np.zeros(small if count <= small else chunk_size, np.int64)
        rows[:count] = np.arange(count)
        return self.rows(rows)


class ExactPath:
    """The whole defended path, by which images are scored.

    Args:
        path: `(image, seed) -> logits`.
        seed: seed of the evaluation.
        chunk_size: images scored at once.
    """

    def __init__(self, path: PathFn, *, seed: int, chunk_size: int) -> None:
        self._logits = tf.function(path, reduce_retracing=True)
        self._seed = seed
        self._chunk_size = chunk_size

    def logits(self, chunk: Chunk) -> tf.Tensor:
        """Return logits [n, classes] of a chunk."""
        return self._logits(tf.constant(chunk.image), seeds.per_example(self._seed, -1, tf.constant(chunk.index)))

    def is_right(self, chunk: Chunk) -> np.ndarray:
        """Return whether each image of a chunk is given its label, bool [n]."""
        predicted = tf.argmax(self.logits(chunk.padded(self._chunk_size)), axis=-1).numpy()
        return predicted[: len(chunk.label)] == chunk.label

    def classes(self, chunk: Chunk) -> int:
        """Check on a few images that the path gives logits, and return for how many classes."""
        logits = self.logits(chunk.rows(np.arange(min(len(chunk.label), 8))))
        check_logits(logits)
        return logits.shape[1]


class Search:
    """One attack on one path: gives for each image of a chunk the candidate that is most likely to fool.

    Args:
        planned: the attack, with its name and objective.
        path_name: what the path is called.
        path: `(image, seed) -> logits`.
        stream: number that tells this search's random draws from those of others.
        seed: seed of the evaluation.
        chunk_size: images attacked at once.
    """

    def __init__(
        self, planned: PlannedAttack, path_name: str, path: PathFn, *, stream: int, seed: int, chunk_size: int
    ) -> None:
        self.name = planned.name
        self.objective = planned.objective
        self.attack: Any = planned.attack
        self.path_name = path_name
        self.seconds = 0.0
        self._path = path
        self._stream = stream
        self._seed = seed
        self._chunk_size = chunk_size
        if self.attack.takes == "loss":
            if self.objective not in ("cross_entropy", "margin"):
                raise UsageError(f"attack {self.name} must maximise cross_entropy or margin, not {self.objective}")
            self._compile()
        else:
            # One function object (a method would be a new one at each access), for attacks that compile its gradient.
            self._path_seed = tf.Variable(tf.zeros([0, 2], tf.int32), shape=[None, 2], trainable=False)
            self._logits = lambda image: path(image, self._path_seed)

    def _compile(self) -> None:
        attack, path, objective = self.attack, self._path, OBJECTIVES[self.objective]

        def functions() -> tuple[LossFn, SuccessFn]:
            shared = share_pass(path)

            def loss_fn(image: tf.Tensor, context: Context) -> tf.Tensor:
                return objective(lambda each: shared(each, context["seed"]))(image, context)

            def success_fn(image: tf.Tensor, context: Context) -> tf.Tensor:
                return misclassified(lambda each: shared(each, context["seed"]))(image, context)

            return loss_fn, success_fn

        def step(state: Any, image: tf.Tensor, context: Context) -> Any:
            loss_fn, success_fn = functions()
            return attack.step(loss_fn, state, image, context, success_fn)

        def finish(state: Any, context: Context) -> tf.Tensor:
            loss_fn, success_fn = functions()
            return attack.finish(loss_fn, state, context, success_fn).image

        self._start = tf.function(attack.start, reduce_retracing=True)
        self._step = tf.function(step, reduce_retracing=True)
        self._finish = tf.function(finish, reduce_retracing=True)

    def candidates(self, chunk: Chunk, restart: int) -> np.ndarray:
        """Return one candidate for each image of a chunk, float32 [n, h, w, c]."""
        padded = chunk.padded(self._chunk_size)
        seed = seeds.per_example(self._seed, self._stream, tf.constant(padded.index))
        image, label = tf.constant(padded.image), tf.constant(padded.label)
        if self.attack.takes == "logits":
            self._path_seed.assign(seed)
            found = self.attack(self._logits, image, label, seed).image
        else:
            context = {"label": label, "seed": seed}
            state = self._start(image, self.attack.restart_seed(seed, restart))
            for _ in range(self.attack.steps):
                state = self._step(state, image, context)
            found = self._finish(state, context)
        return found.numpy()[: len(chunk.label)]
