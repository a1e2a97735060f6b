"""One attack on one path, compiled, and the exact path by which every candidate is scored."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable, Optional

import numpy as np
import tensorflow as tf

from kerasdefense.attacks import (
    FEATURE_DISTANCE,
    OBJECTIVES,
    PGD,
    TO_CLASS,
    Iterative,
    check_logits,
    norms,
    ranked_targets,
    seeds,
)
from kerasdefense.attacks.iterative import where
from kerasdefense.attacks.wrappers import draws_of
from kerasdefense.evaluation.suites import PlannedAttack
from kerasdefense.types import Context, LogitsFn, PathFn, UsageError

LABEL_ONLY = ("cross_entropy", "cross_entropy_x10", "cross_entropy_x50", "dlr", "margin")
"""Objectives that need no more of an example than its label."""
LOGITS, FEATURES, SIGNED = "logit_matching", "feature_matching", "signed_target"
"""Objectives that need the logits or features of another image, or the end of an axis, to go to."""
_ON_FEATURES = (FEATURES, FEATURE_DISTANCE)
"""Objectives of features, not of logits."""
FRESH_DRAWS = 10
"""Passes over whose mean probabilities a randomised model's answer is taken."""
_SHARES = (1, 3 / 4, 1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 1 / 16)
"""Chunks have the full size or one of these shares of it; fewer images are padded."""


def padded_size(count: int, largest: int) -> int:
    """Return the smallest of the few sizes that holds `count` images, at most `largest`."""
    sizes = {max(1, int(largest * share)) for share in _SHARES}
    return min((size for size in sizes if size >= count), default=largest)


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
        """Return the chunk with its first row repeated behind it, up to one of few fixed sizes."""
        count = len(self.label)
        rows = np.zeros(padded_size(count, chunk_size), np.int64)
        rows[:count] = np.arange(count)
        return self.rows(rows)


def compiled(function: Callable[..., Any], *like: Any) -> Callable[..., Any]:
    """Return a function traced once, for batches of any size, from nests of tensors with a leading batch axis."""
    specs = tf.nest.map_structure(lambda each: tf.TensorSpec([None, *each.shape[1:]], each.dtype), like)
    return tf.function(function).get_concrete_function(*specs)


def within(image_adv: np.ndarray, image: np.ndarray, norm: str, epsilon: float) -> np.ndarray:
    """Return which images [n, h, w, c] are in the ball of radius `epsilon` around `image` and in [0, 1], bool [n]."""
    distance = norms.length(tf.constant(image_adv - image), norm).numpy()
    flat = image_adv.reshape(len(image_adv), -1)
    return ((flat >= 0) & (flat <= 1)).all(axis=1) & (distance <= epsilon * (1 + 1e-5) + 1e-7)


class ExactPath:
    """The whole defended path, by which images are scored.

    Args:
        path: `(image, seed) -> logits`.
        seed: seed of the evaluation.
        chunk_size: images scored at once.
        draws: passes whose probabilities are averaged, for a path that draws at random.
    """

    def __init__(self, path: PathFn, *, seed: int, chunk_size: int, draws: int = 1) -> None:
        self._path = path
        self._seed = seed
        self._chunk_size = max(1, chunk_size // draws)
        self.draws = draws
        self._compiled: Optional[Callable[..., tf.Tensor]] = None

    def _mean_logits(self, image: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
        logits = draws_of(self._path, image, seeds.per_example(self._seed, -1, index), self.draws)
        if self.draws == 1:
            return logits
        log_probability = tf.reshape(tf.nn.log_softmax(logits), [-1, self.draws, logits.shape[-1]])
        return tf.reduce_logsumexp(log_probability, axis=1) - np.log(self.draws)

    def logits(self, chunk: Chunk) -> np.ndarray:
        """Return logits [n, classes] of a chunk of any size; of several draws, the log of the mean probabilities."""
        parts = []
        for first in range(0, len(chunk.label), self._chunk_size):
            part = chunk.rows(np.arange(first, min(first + self._chunk_size, len(chunk.label))))
            padded = part.padded(self._chunk_size)
            inputs = tf.constant(padded.image), tf.constant(padded.index)
            self._compiled = self._compiled or compiled(self._mean_logits, *inputs)
            parts.append(self._compiled(*inputs).numpy()[: len(part.label)])
        return np.concatenate(parts)

    def is_right(self, chunk: Chunk) -> np.ndarray:
        """Return whether each image of a chunk is given its label, bool [n]; never where logits are not finite."""
        logits = self.logits(chunk)
        return (np.argmax(logits, axis=1) == chunk.label) & np.isfinite(logits).all(axis=1)

    def check(self, chunk: Chunk) -> int:
        """Check on a few images that the path gives logits, and return for how many classes."""
        few = chunk.rows(np.arange(min(len(chunk.label), 8)))
        logits = self._path(tf.constant(few.image), seeds.per_example(self._seed, -1, tf.constant(few.index)))
        check_logits(logits, advice="; --evaluate_outputs=probabilities (outputs= in Python) turns them into logits")
        return logits.shape[1]


def mover(path: PathFn, attack: PGD, seed: int) -> Callable[[Chunk], np.ndarray]:
    """Return what moves the images of a chunk to where `attack` finds the highest cross-entropy of a path.

    Args:
        path: `(image, seed) -> logits`.
        attack: PGD.
        seed: seed of the random starts.
    """

    @functools.partial(tf.function, reduce_retracing=True)
    def find(image: tf.Tensor, label: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
        seed_of = seeds.per_example(seed, -2, index)
        loss_fn = OBJECTIVES["cross_entropy"](lambda each: path(each, seed_of))
        return attack(loss_fn, image, {"label": label}, seed_of).image

    return lambda chunk: find(*map(tf.constant, (chunk.image, chunk.label, chunk.index))).numpy()


class Search:
    """One attack on one path, ready to be run on any images.

    Args:
        planned: the attack, with its name, objective and random draws.
        path_name: what the path is called.
        path: `(image, seed) -> logits`.
        stream: number that tells this search's random draws from those of others.
        seed: seed of the evaluation.
        chunk_size: images attacked at once, with all their random draws.
        features: from images to what enters the last layer, [batch, d], for an attack that matches it.
        class_activation: from images to class activation features, [batch, h, w, c], for an attack that leaves them.
        target_of: from labels [n] to the class that each image is pulled to, for an attack that chooses none itself.
    """

    def __init__(
        self,
        planned: PlannedAttack,
        path_name: str,
        path: PathFn,
        *,
        stream: int,
        seed: int,
        chunk_size: int,
        features: Optional[LogitsFn] = None,
        class_activation: Optional[LogitsFn] = None,
        target_of: Optional[Callable[[np.ndarray], np.ndarray]] = None,
    ) -> None:
        self.planned = planned
        self.name = planned.name if path_name == "exact" else f"{planned.name}:{path_name}"
        self.attack: Any = planned.attack
        self.path_name = path_name
        self.slots = max(1, chunk_size // planned.draws)
        self.is_iterative = isinstance(planned.attack, Iterative)
        self._path = path
        by_objective = {FEATURES: features, FEATURE_DISTANCE: class_activation if path_name == "exact" else None}
        self._by_objective = {name: each for name, each in by_objective.items() if each is not None}
        self._features: Any = self._by_objective.get(planned.objective)
        self._target_of = target_of
        self._stream = stream
        self._seed = seed
        self._functions: dict[str, Callable[..., Any]] = {}
        if self.attack.takes == "loss":
            self._check_objective()
        if not self.is_iterative:
            # One function object (a method would be a new one at each access), for attacks that compile its gradient.
            self._path_seed = tf.Variable(tf.zeros([0, 2], tf.int32), shape=[None, 2], trainable=False)
            self._logits = lambda image: path(image, self._path_seed)

    def _check_objective(self) -> None:
        known: tuple[str, ...] = (*LABEL_ONLY, LOGITS, *self._by_objective)
        if self.attack.targets or self._target_of is not None:
            known += TO_CLASS
        if self.path_name == "signed" and self.attack.targets and self.attack.targets % 2 == 0:  # two ends of each axis
            known += (SIGNED,)
        if self.planned.objective not in known:
            raise UsageError(
                f"attack {self.name} must maximise one of {', '.join(known)}, not {self.planned.objective}"
            )

    @property
    def keeps_its_own(self) -> bool:
        """Whether the reference of an image is its own, and not that of an image of another class."""
        return self.planned.objective == FEATURE_DISTANCE

    @property
    def matches(self) -> bool:
        """Whether it goes to where another image is."""
        return self.planned.objective in (LOGITS, FEATURES)

    @property
    def runs(self) -> int:
        """Runs of the attack on each image: a restart of each target."""
        return self.attack.restarts * max(1, self.attack.targets)

    def context(self, chunk: Chunk, logits: np.ndarray, run: np.ndarray, reference: np.ndarray) -> Context:
        """Return what the objective needs of each image in its run number `run` [n].

        Args:
            chunk: the images.
            logits: float32 [n, classes], of the clean images.
            run: int [n].
            reference: float32 [n, ...], what `references` gives of an image of another class, or of the image itself.
        """
        index = tf.constant(chunk.index)
        of_run = tf.constant(np.stack([run, np.zeros_like(run)], axis=1), tf.int32)
        seed = seeds.per_example(self._seed, self._stream, index) + of_run
        context = {"label": tf.constant(chunk.label), "seed": seed}
        if self.attack.targets:
            number = tf.constant(run // self.attack.restarts, tf.int32)
            context["target"] = self._targets(tf.constant(logits), context["label"], number)
        if self._target_of is not None:
            context["target"] = tf.constant(self._target_of(chunk.label), tf.int32)
        if self.planned.objective in (LOGITS, *_ON_FEATURES):
            context["reference"] = tf.constant(reference)
        return context

    def _targets(self, logits: tf.Tensor, label: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
        """Return target number `number` [n] of each image, the likeliest first; of signed ones both ends of each."""
        if self.planned.objective != SIGNED:
            return tf.gather(ranked_targets(logits, label, self.attack.targets), number, batch_dims=1)
        ranked = ranked_targets(logits, label, self.attack.targets // 2)
        return tf.gather(ranked, number // 2, batch_dims=1) + logits.shape[-1] * (number % 2)

    def references(self, image: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """Return what is compared of clean images [n, h, w, c] with logits [n, classes]: features, or the logits."""
        if self.planned.objective not in _ON_FEATURES:
            return logits
        features = compiled(self._features, tf.constant(image[:1]))
        parts = [features(tf.constant(image[at : at + self.slots])) for at in range(0, len(image), self.slots)]
        return tf.concat(parts, axis=0).numpy()

    def start(self, image: tf.Tensor, context: Context, run: np.ndarray) -> Any:
        """Return the state in which an iterative attack begins run number `run` [n] on each image."""
        seed = context["seed"]
        if "start" not in self._functions:
            self._functions["start"] = compiled(self.attack.start, image, seed)
        state = self._functions["start"](image, seed)
        is_restart = run % self.attack.restarts > 0
        if not is_restart.any():
            return state
        if "again" not in self._functions:
            self._functions["again"] = compiled(self.attack.again, image, seed)
        return merged(is_restart, self._functions["again"](image, seed), state)

    def step(self, state: Any, image: tf.Tensor, context: Context) -> Any:
        """Return the state after one more pass through the model."""
        if "step" not in self._functions:
            self._functions["step"] = compiled(self._step, state, image, context)
        return self._functions["step"](state, image, context)

    def _step(self, state: Any, image: tf.Tensor, context: Context) -> Any:
        context = {**context, "seed": seeds.advance(context["seed"], state.best.queries)}
        answer = _Answer(self._path, context, self.planned.draws, is_signed=self.path_name == "signed")
        if self.attack.takes == "logits":
            return self.attack.step(answer.mean_logits, state, image, context, None)
        objective = OBJECTIVES[self.planned.objective]

        def loss_fn(each: tf.Tensor, _: Context) -> tf.Tensor:
            if self.planned.objective in _ON_FEATURES:
                return objective(self._features)(each, context)
            return answer.loss(objective, each)

        def success_fn(each: tf.Tensor, _: Context) -> tf.Tensor:
            return answer.fools(each)

        return self.attack.step(loss_fn, state, image, context, success_fn)

    def allows(self, image_adv: np.ndarray, image: np.ndarray) -> np.ndarray:
        """Return which candidates are in the ball and in the box, bool [n]."""
        return within(image_adv, image, self.attack.norm, self.attack.epsilon)

    def one_shot(self, chunk: Chunk) -> np.ndarray:
        """Return one candidate for each image of a chunk by an attack that is not iterative, float32 [n, h, w, c]."""
        padded = chunk.padded(self.slots)
        seed = seeds.per_example(self._seed, self._stream, tf.constant(padded.index))
        self._path_seed.assign(seed)
        found = self.attack(self._logits, tf.constant(padded.image), tf.constant(padded.label), seed).image
        return found.numpy()[: len(chunk.label)]


def merged(condition: np.ndarray, first: Any, second: Any) -> Any:
    """Return the rows of the state `first` where `condition` [n] holds, of `second` elsewhere."""
    mask = tf.constant(condition)
    return tf.nest.map_structure(lambda one, two: where(mask, one, two), first, second)


class _Answer:
    """What a path says of images in so many draws, asked once by all who want to know within one traced step."""

    def __init__(self, path: PathFn, context: Context, draws: int, *, is_signed: bool = False) -> None:
        self._path, self._context, self._draws, self._is_signed = path, context, draws, is_signed
        self._last: list[tf.Tensor] = []

    def _drawn(self, image: tf.Tensor) -> tf.Tensor:
        if not self._last or self._last[0] is not image:
            self._last = [image, draws_of(self._path, image, self._context["seed"], self._draws)]
        return self._last[1]

    def _mean(self, values: tf.Tensor) -> tf.Tensor:
        """Return the mean over the draws of `values` [batch * draws, ...]."""
        if self._draws == 1:
            return values
        return tf.reduce_mean(tf.reshape(values, [-1, self._draws, *values.shape[1:]]), axis=1)

    def loss(self, objective: Callable[..., Any], image: tf.Tensor) -> tf.Tensor:
        """Return the mean objective over the draws, [batch]."""
        logits = self._drawn(image)
        context = self._context
        if self._draws > 1:
            context = {name: tf.repeat(each, self._draws, axis=0) for name, each in context.items()}

        def drawn(_: tf.Tensor) -> tf.Tensor:
            return logits

        return self._mean(tf.cast(objective(drawn)(image, context), tf.float32))

    def fools(self, image: tf.Tensor) -> tf.Tensor:
        """Return whether the mean probabilities of the draws are highest for another class than the label, [batch]."""
        logits = tf.abs(self._drawn(image)) if self._is_signed else self._drawn(image)
        mean = logits if self._draws == 1 else self._mean(tf.nn.softmax(logits))
        return tf.argmax(mean, axis=-1, output_type=tf.int32) != self._context["label"]

    def mean_logits(self, image: tf.Tensor) -> tf.Tensor:
        """Return the mean logits of the draws, [batch, classes]."""
        return self._mean(self._drawn(image))
