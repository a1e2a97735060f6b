"""What the sanity battery judges, measured on a few images: losses along a search, gradients, noise."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Callable, NamedTuple, Optional

import numpy as np
import tensorflow as tf

from kerasdefense import losses
from kerasdefense.attacks import APGD, Attack, norms, seeds
from kerasdefense.evaluation.block import Block
from kerasdefense.evaluation.robustness import Options
from kerasdefense.evaluation.search import FRESH_DRAWS, Chunk, ExactPath, Search, compiled
from kerasdefense.evaluation.suites import PlannedAttack, ThreatModel
from kerasdefense.types import Context, PathFn

STREAM = 1000
"""Streams of the probes' draws, above those of the searches of a suite."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is probed: the paths, a few images, and how they are attacked.

    `features` returns what enters the last layer, [batch, d]; None = the logits stand in for it.
    """

    attack_paths: Mapping[str, PathFn]
    chunk: Chunk
    threat_model: ThreatModel
    classes: int
    options: Options
    features: Optional[Callable[[tf.Tensor], tf.Tensor]] = None

    @functools.cached_property
    def exact(self) -> ExactPath:
        """The path that judges."""
        draws = FRESH_DRAWS if self.options.is_randomised else 1
        path, size = self.attack_paths["exact"], self.options.chunk_size
        return ExactPath(path, seed=self.options.seed, chunk_size=size, draws=draws)

    def search(self, planned: PlannedAttack, *, path: str = "exact", stream: int = 0) -> Search:
        """Return an attack on one of the paths."""
        options = self.options
        settings: dict[str, Any] = {"seed": options.seed, "chunk_size": options.chunk_size, "stream": STREAM + stream}
        return Search(planned, path, self.attack_paths[path], **settings)

    def attacked(self, plan: Sequence[PlannedAttack], *, path: str = "exact", cascade: bool = False) -> Block:
        """Return the images after attacks, each on all that are right clean, or on those that stand (`cascade`)."""
        searches = [self.search(planned, path=path, stream=stream) for stream, planned in enumerate(plan)]
        block = Block(self.chunk, self.exact, searches, first=0, cascade=cascade)
        block.attack(lambda: None)
        return block

    def attack(self, kind: type[Attack], *, epsilon: Optional[float] = None, **settings: Any) -> Any:
        """Return an attack of the threat model, or of another radius."""
        radius = self.threat_model.epsilon if epsilon is None else epsilon
        return kind(norm=self.threat_model.norm, epsilon=radius, **settings)


class Radii:
    """Who stands at any radius under APGD on two losses, compiled once for all radii."""

    def __init__(self, subject: Subject, *, draws: int) -> None:
        self.subject = subject
        self._radius = tf.Variable(0.0, trainable=False)
        attack = copy.copy(subject.attack(APGD, steps=50))
        object.__setattr__(attack, "epsilon", self._radius)
        plan = [PlannedAttack(name, attack, name, draws) for name in ("cross_entropy", "margin")]
        self._searches = [subject.search(planned, stream=stream) for stream, planned in enumerate(plan)]
        self._known: dict[float, np.ndarray] = {}

    def standing(self, radius: float) -> np.ndarray:
        """Return which images stand, bool [n]."""
        if radius not in self._known:
            self._radius.assign(radius)
            block = Block(self.subject.chunk, self.subject.exact, self._searches, first=0, cascade=True)
            block.attack(lambda: None)
            self._known[radius] = block.standing
        return self._known[radius]

    @property
    def unbounded(self) -> float:
        """The radius from which on any image can become any other."""
        return 1.0 if self.subject.threat_model.norm == "linf" else float(np.sqrt(self.subject.chunk.image[0].size))


class Climb(NamedTuple):
    """A search without early end: the highest loss so far after each pass [passes, n], and who fell at any [n]."""

    loss: np.ndarray
    fell: np.ndarray


def climb(subject: Subject, planned: PlannedAttack, rows: np.ndarray) -> Climb:
    """Run every step of an attack on some images and note the best loss."""
    search = subject.search(planned)
    parts = []
    for image, context, run in _parts(subject, search, rows):
        state = search.start(image, context, run)
        loss: list[np.ndarray] = []
        for _ in range(search.attack.passes):
            state = search.step(state, image, context)
            loss.append(_highest(loss, state.best.loss.numpy()))
        parts.append(Climb(np.array(loss), state.best.success.numpy()))
    return Climb(np.concatenate([part.loss for part in parts], axis=1), np.concatenate([part.fell for part in parts]))


def _parts(subject: Subject, search: Search, rows: np.ndarray) -> Iterator[tuple[tf.Tensor, Context, np.ndarray]]:
    """Yield image, context and run of as many images at a time as a search takes."""
    for first in range(0, len(rows), search.slots):
        chunk = subject.chunk.rows(rows[first : first + search.slots])
        run = np.zeros(len(chunk.label), np.int64)
        logits = np.zeros([len(run), subject.classes], np.float32)  # of no use to an untargeted objective
        yield tf.constant(chunk.image), search.context(chunk, logits, run, logits), run


def _highest(before: Sequence[np.ndarray], loss: np.ndarray) -> np.ndarray:
    # The attack prefers what succeeded to what has a higher loss; here the loss alone counts.
    return np.maximum(before[-1], loss) if before else loss


def first_step(subject: Subject, planned: PlannedAttack) -> np.ndarray:
    """Return whether each image, right clean or not, is right after the first step of an attack, bool [n]."""
    search, chunk = subject.search(planned), subject.chunk
    parts = _parts(subject, search, np.arange(len(chunk.label)))
    moved = [search.step(search.start(image, context, run), image, context).image for image, context, run in parts]
    return subject.exact.is_right(Chunk(np.concatenate(moved), chunk.label, chunk.index))


def dead_gradients(subject: Subject) -> float:
    """Return the share of images whose gradient of the cross-entropy is all zero, or not finite, here or nearby."""
    path = subject.attack_paths["exact"]
    norm, epsilon = subject.threat_model

    def dead(image: tf.Tensor, label: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(image)
            loss = losses.cross_entropy(path(image, seed), label)
        gradient = tape.gradient(loss, image, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        flat = tf.reshape(gradient, [tf.shape(image)[0], -1])
        return tf.reduce_all(flat == 0, axis=1) | ~tf.reduce_all(tf.math.is_finite(flat), axis=1)

    image, label = tf.constant(subject.chunk.image), tf.constant(subject.chunk.label)
    seed = seeds.per_example(subject.options.seed, STREAM, tf.constant(subject.chunk.index))

    def dead_nearby(image: tf.Tensor, label: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return dead(norms.random_point(image, epsilon=epsilon, norm=norm, seed=seed), label, seed)

    asked = [compiled(function, image, label, seed) for function in (dead, dead_nearby)]
    here, nearby = (_in_parts(ask, subject.options.chunk_size, image, label, seed) for ask in asked)
    return float(np.mean(here | nearby))


def _in_parts(function: Callable[..., tf.Tensor], size: int, *arrays: tf.Tensor) -> np.ndarray:
    starts = range(0, len(arrays[0]), size)
    return np.concatenate([function(*(each[first : first + size] for each in arrays)).numpy() for first in starts])


def instability(subject: Subject, *, directions: int = 100, radius: float = 8 / 255) -> float:
    """Return the mean change of the margin under uniform noise of +-radius/2, relative to the mean margin, at most 1.

    Relative to each image's own margin, as in Pintor et al. 2022, an undefended network would count as unstable for the
    sake of the few images that lie close to a boundary.
    """
    chunk, exact = subject.chunk, subject.exact
    random = np.random.default_rng(subject.options.seed)

    def margin(image: np.ndarray) -> np.ndarray:
        logits = exact.logits(Chunk(image.astype(np.float32), chunk.label, chunk.index))
        return losses.margin(tf.constant(logits), tf.constant(chunk.label)).numpy()

    before = margin(chunk.image)
    change = np.zeros(len(before))
    for _ in range(directions):
        noise = random.uniform(-radius / 2, radius / 2, chunk.image.shape)
        change += np.abs(margin(np.clip(chunk.image + noise, 0, 1)) - before)
    return float(min(1.0, change.sum() / directions / max(np.abs(before).sum(), 1e-12)))


def swapped(subject: Subject, rows: np.ndarray) -> np.ndarray:
    """Return which of some images stand against a copy of an image that the model puts in another class, bool [n].

    With an unbounded radius any image may be replaced by any other.
    """
    logits = subject.exact.logits(subject.chunk)
    predicted = np.argmax(logits, axis=1)
    return np.array([not (predicted != subject.chunk.label[row]).any() for row in rows], bool)
