"""Attacks on an anomaly score: unknown images made to be accepted, known ones to be refused, or mistaken and accepted.

What is attacked is the score as it is deployed. Where it is flat a detector names stand-ins, which are followed instead
or as well; whatever is followed, the point that is kept is the best by the score itself, the clean image among them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from kerasdefense import losses
from kerasdefense.attacks import Iterative, JointPGD, Pair, seeds
from kerasdefense.attacks.iterative import where
from kerasdefense.detectors import Detector
from kerasdefense.evaluation.open_set.scoring import Scorer
from kerasdefense.evaluation.search import Chunk, compiled, within
from kerasdefense.types import Activations, ActivationsFn, Context

Followed = Callable[[tf.Tensor, Activations], tf.Tensor]
"""`(image, activations) -> [batch]`, what an attack differentiates in place of a detector's score."""
_OWN = "score"


class Target(NamedTuple):
    """A fitted detector on a model, and how it is attacked.

    Attributes:
        name: of the detector.
        detector: fitted.
        activations_fn: of the model.
        scorer: judges images by this detector alone.
        seed: of the attacks.
        chunk_size: images attacked at once.
        progress: whether to show a progress bar.
    """

    name: str
    detector: Detector
    activations_fn: ActivationsFn
    scorer: Scorer
    seed: int = 0
    chunk_size: int = 256
    progress: bool = False

    def score(self, image: tf.Tensor, activations: Activations) -> tf.Tensor:
        """Return the anomaly score [batch] of images whose activations are at hand."""
        return self.detector.score_with(activations, self.activations_fn, image)

    def followed(self) -> dict[str, Followed]:
        """Return what attacks follow, by name: the score itself, unless it is flat, and its stand-ins."""
        stand_ins = {name: _of_activations(function) for name, function in self.detector.stand_ins().items()}
        return {**({_OWN: self.score} if self.detector.follows_own else {}), **stand_ins}


def _of_activations(function: Callable[[Activations], tf.Tensor]) -> Followed:
    return lambda image, activations: function(activations)


class Moved(NamedTuple):
    """Images [n, h, w, c] after an attack on their score, that score [n], and the class predicted of each [n]."""

    image: np.ndarray
    score: np.ndarray
    prediction: np.ndarray


def move_scores(target: Target, chunk: Chunk, sign: np.ndarray, attacks: tuple[Iterative, ...]) -> Moved:
    """Raise or lower the anomaly score of images within the ball.

    Args:
        target: the detector.
        chunk: the images.
        sign: float [n], +1 where the score is to rise (a known image is to be refused), -1 where it is to fall.
        attacks: each follows everything that `target` names, with all its restarts.

    Returns:
        For each image the best point found by the score itself; the clean image where none was better.
    """
    sign = sign.astype(np.float32)

    def follow(attack: Iterative, name: str, followed: Followed) -> _Follow:
        def step(state: Any, kept: _Kept, image: tf.Tensor, context: Context) -> tuple[Any, _Kept]:
            tried, seen = state.image, []

            def raised(point: tf.Tensor) -> tf.Tensor:
                activations = target.activations_fn(point)
                value = context["sign"] * followed(point, activations)
                if point is tried:  # a search may look at others too
                    own = name == _OWN
                    seen.append(value if own else context["sign"] * target.score(point, activations))
                return value

            moved = attack.step(_asked_by(attack, raised), state, image, context)
            value = seen[0] if seen else context["sign"] * target.score(tried, target.activations_fn(tried))
            return moved, kept.or_better(tried, value)

        return step

    best = target.scorer.of_chunk(chunk)
    image_adv, value, prediction = chunk.image.copy(), sign * best.score[target.name], best.prediction.copy()
    for attack in attacks:
        for name, followed in target.followed().items():
            # The label is that of the logits which `_asked_by` makes.
            context = {"sign": sign, "label": np.zeros_like(chunk.label)}
            found = _search(target, chunk, context, attack, follow(attack, name, followed), words=name)
            scored = target.scorer.of_chunk(Chunk(found, chunk.label, chunk.index))
            better = sign * scored.score[target.name] > value
            image_adv[better], prediction[better] = found[better], scored.prediction[better]
            value = np.where(better, sign * scored.score[target.name], value)
    return Moved(image_adv, sign * value, prediction)


def _asked_by(attack: Iterative, raised: Callable[[tf.Tensor], tf.Tensor]) -> Callable[..., tf.Tensor]:
    """Return what an attack asks for to raise a value: a loss, or logits in which class 1 leads by that value."""
    if attack.takes == "loss":
        return lambda image, _: raised(image)

    def logits(image: tf.Tensor) -> tf.Tensor:
        value = raised(image)
        return tf.stack([tf.zeros_like(value), value], axis=1)

    return logits


def fool_unnoticed(target: Target, chunk: Chunk, attacks: tuple[JointPGD, ...]) -> np.ndarray:
    """Look for points of the ball that are given a wrong class at a low anomaly score.

    Args:
        target: the detector.
        chunk: images of known classes.
        attacks: joint ones; each follows everything that `target` names, with all its restarts.

    Returns:
        float32 [n], the lowest anomaly score of a point with a wrong class; infinite where none was found. An image
        is fooled unnoticed at every threshold that is not below it.
    """

    def follow(attack: JointPGD, name: str, followed: Followed) -> _Follow:
        def step(state: Any, kept: _Kept, image: tf.Tensor, context: Context) -> tuple[Any, _Kept]:
            seen: list[tf.Tensor] = []

            def pair_fn(point: tf.Tensor, each: Context) -> Pair:
                activations = target.activations_fn(point)
                margin = losses.margin(activations["logits"], each["label"])
                second = -followed(point, activations)
                low = second if name == _OWN else -target.score(point, activations)
                seen.append(tf.where(margin > 0, low, tf.fill(tf.shape(low), -float("inf"))))
                return Pair(margin, second)

            moved = attack.step(pair_fn, state, image, context)
            return moved, kept.or_better(state.image, seen[0])

        return step

    lowest = np.full(len(chunk.label), np.inf, np.float32)
    for attack, (name, followed) in itertools.product(attacks, target.followed().items()):
        words = f"{name} {'orthogonal' if attack.orthogonal else 'selective'}"
        found = _search(target, chunk, {"label": chunk.label}, attack, follow(attack, name, followed), words=words)
        scored = target.scorer.of_chunk(Chunk(found, chunk.label, chunk.index))
        lowest = np.where(scored.right, lowest, np.minimum(lowest, scored.score[target.name]))
    return lowest


class _Kept(NamedTuple):
    """The best point so far [batch, h, w, c], and by how much it is the best [batch]."""

    image: tf.Tensor
    value: tf.Tensor

    def or_better(self, image: tf.Tensor, value: tf.Tensor) -> _Kept:
        """Return the better of these points and those, example by example."""
        value = tf.cast(value, tf.float32)
        take = value > self.value
        return _Kept(where(take, image, self.image), tf.where(take, value, self.value))


_Follow = Callable[[Any, _Kept, tf.Tensor, Context], "tuple[Any, _Kept]"]
"""One step of a search, and the best point after it."""


def _search(
    target: Target, chunk: Chunk, context: dict[str, np.ndarray], attack: Iterative, step: _Follow, *, words: str
) -> np.ndarray:
    """Return for each image the best point of all restarts of a search, or the image itself, [n, h, w, c]."""
    function: list[Callable[..., Any]] = []
    image_adv = chunk.image.copy()
    parts = list(_parts(len(chunk.label), target.chunk_size))
    total = len(parts) * attack.restarts * attack.passes
    with tqdm(total=total, desc=f"{target.name} {words}", unit="step", disable=not target.progress, leave=False) as bar:
        for rows in parts:
            padded = chunk.rows(rows).padded(target.chunk_size)
            repeated = np.concatenate([rows, np.full(len(padded.label) - len(rows), rows[0])])
            of_rows = {name: tf.constant(each[repeated]) for name, each in context.items()}
            image, seed = tf.constant(padded.image), seeds.per_example(target.seed, 0, tf.constant(padded.index))
            kept = _Kept(image, tf.fill([len(repeated)], -float("inf")))
            for restart in range(attack.restarts):
                begin = attack.again if restart else attack.start
                state = begin(image, attack.restart_seed(seed, restart))
                function = function or [compiled(step, state, kept, image, of_rows)]
                for _ in range(attack.passes):
                    state, kept = function[0](state, kept, image, of_rows)
                    bar.update()
            image_adv[rows] = kept.image.numpy()[: len(rows)]
    allowed = within(image_adv, chunk.image, attack.norm, attack.epsilon)
    image_adv[~allowed] = chunk.image[~allowed]
    return image_adv


def _parts(count: int, size: int) -> Iterator[np.ndarray]:
    for first in range(0, count, size):
        yield np.arange(first, min(first + size, count))
