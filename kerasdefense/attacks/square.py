"""Square Attack: random search by squares, which sees nothing of a classifier but its logits."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple, Optional

import keras
import numpy as np
import tensorflow as tf

from kerasdefense import losses
from kerasdefense.attacks import norms, seeds
from kerasdefense.attacks.base import AttackResult
from kerasdefense.attacks.iterative import Iterative, better, nothing_tried
from kerasdefense.types import Context, LogitsFn, SuccessFn, UsageError

_SWITCHES = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries of 10,000 after which the share of pixels in a square halves."""
_TINY = 1e-12
_FIRST, _SECOND, _SHAPE = 2, 4, 5
"""Where among a query's draws the second window, the turn of the pattern and the signs begin."""


class SquareState(NamedTuple):
    """Where a search stands: the candidate, the best image so far, and the seeds [batch, 2] of the draws."""

    image: tf.Tensor
    best: AttackResult
    seed: tf.Tensor


@keras.saving.register_keras_serializable(package="kerasdefense")
@dataclasses.dataclass(frozen=True)
class Square(Iterative):
    """Score-based black box: keep a random change of a square of pixels if the margin gains by it.

    1. Start at stripes of +-epsilon (linf), or at a mosaic of tiles scaled to epsilon (l2).
    2. `queries` times: choose a square, whose share of the pixels falls from `p_init` with the queries spent. linf: set
       each channel there to +epsilon or -epsilon. l2: write a pattern onto the square, with the mass that a second one
       gives up, and scale to epsilon. Keep the candidate if the label's margin fell, or if it is the first that fools.

    Attributes:
        queries: passes through the model after the first one, 5,000 in AutoAttack.
        p_init: share of pixels in the first squares.
        rescale: stretch the schedule, which is made for 10,000 queries, to the number of queries.
        restarts: runs with other draws.

    Source: Andriushchenko et al. 2020, "Square Attack", algorithms 1 to 3; settings of AutoAttack. Deviations: squares
    are drawn per image, where the authors' code shares them in a batch, and reach the last row and column, which that
    code leaves out.
    """

    takes: ClassVar[str] = "logits"
    burst: ClassVar[int] = 20

    queries: int = 5000
    p_init: float = 0.8
    rescale: bool = False
    restarts: int = 1

    def __post_init__(self) -> None:
        """Check the search."""
        super().__post_init__()
        if self.queries < 1 or self.restarts < 1:
            raise UsageError(f"queries and restarts must be at least 1, not {self.queries} and {self.restarts}")
        if not 0 < self.p_init <= 1:
            raise UsageError(f"p_init must be above 0 and at most 1, not {self.p_init}")

    @property
    def passes(self) -> int:
        """Steps of one run: a query each, and one at the start."""
        return self.queries + 1

    def share(self, query: np.ndarray) -> np.ndarray:
        """Return the share of pixels in the square of query number 0, 1, ..."""
        spent = query * 10_000 // self.queries if self.rescale else query
        return self.p_init / 2.0 ** np.searchsorted(_SWITCHES, spent, side="left")

    def sides(self, height: int, width: int) -> np.ndarray:
        """Return the side of the square of each query, int32 [queries]; odd and at least 3 for l2."""
        longest = min(height, width)
        side = np.rint(np.sqrt(self.share(np.arange(self.queries)) * height * width)).astype(np.int32)
        if self.norm == "linf":
            return np.clip(side, 1, longest)
        odd = np.maximum(side, 3)
        odd += 1 - odd % 2
        return np.minimum(odd, longest - 1 + longest % 2)

    def start(self, image: tf.Tensor, seed: tf.Tensor) -> SquareState:
        """Return the state before the first query."""
        height, width, channels = image.shape[1:]
        before = tf.fill([tf.shape(image)[0]], -1)
        if self.norm == "linf":
            signs = _signs(seeds.uniform(seed, before, width * channels))
            first = image + self.epsilon * tf.reshape(signs, [-1, 1, width, channels])
        else:
            if min(height, width) < 5:
                raise UsageError(f"square needs images of at least 5x5 pixels in l2, not {height}x{width}")
            first = image + self._scaled(self._mosaic(image, seed, before))
        return SquareState(tf.clip_by_value(first, 0.0, 1.0), nothing_tried(image), seed)

    def step(
        self,
        fn: LogitsFn,
        state: SquareState,
        image: tf.Tensor,
        context: Context,
        success_fn: Optional[SuccessFn] = None,
    ) -> SquareState:
        """Ask for the candidate's logits, keep it if it is better, and draw the next one."""
        logits, label, query = fn(state.image), context["label"], state.best.queries
        loss = tf.cast(losses.margin(logits, label), tf.float32)
        success = tf.argmax(logits, axis=-1, output_type=tf.int32) != label
        best = better(state.best, AttackResult(state.image, success, loss, tf.ones_like(query)))
        height, width, channels = image.shape[1:]
        side = tf.gather(tf.constant(self.sides(height, width)), tf.minimum(query, self.queries - 1))
        draws = seeds.uniform(state.seed, query, _SHAPE + channels)
        window = _window(draws[:, :_FIRST], side, height, width)
        if self.norm == "linf":
            edge = image + self.epsilon * _signs(draws[:, None, None, _SHAPE:])
            candidate = tf.where(window, edge, best.image)
        else:
            candidate = image + self._scaled(self._rewritten(best.image - image, window, side, draws))
        return SquareState(tf.clip_by_value(candidate, 0.0, 1.0), best, state.seed)

    def _scaled(self, delta: tf.Tensor) -> tf.Tensor:
        """Return `delta` [batch, h, w, c] with the length epsilon."""
        return self.epsilon * delta / norms.column(norms.length(delta, "l2") + _TINY, delta)

    def _mosaic(self, image: tf.Tensor, seed: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        """Return tiles of the pattern, 5 along the shorter side and more along the other, with signs of their own."""
        height, width, channels = image.shape[1:]
        side = min(height, width) // 5
        rows, columns = height // side, width // side
        draws = seeds.uniform(seed, count, rows * columns * (channels + 1))
        signs = _signs(tf.reshape(draws[:, : rows * columns * channels], [-1, rows, 1, columns, 1, channels]))
        turned = tf.reshape(draws[:, rows * columns * channels :], [-1, rows, 1, columns, 1, 1]) < 0.5
        tile = pattern(side).astype(np.float32)
        tiles = tf.where(turned, tile.T[None, None, :, None, :, None], tile[None, None, :, None, :, None]) * signs
        mosaic = tf.reshape(tiles, [-1, rows * side, columns * side, channels])
        above, left = (height - rows * side) // 2, (width - columns * side) // 2
        below, right = height - rows * side - above, width - columns * side - left
        return tf.pad(mosaic, [[0, 0], [above, below], [left, right], [0, 0]])

    def _rewritten(self, delta: tf.Tensor, window: tf.Tensor, side: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        """Return `delta` with the pattern added in the first window, paid for by what the second one held."""
        height, width, channels = delta.shape[1:]
        first = tf.cast(window, tf.float32)
        second = tf.cast(_window(draws[:, _FIRST:_SECOND], side, height, width), tf.float32)
        either = tf.maximum(first, second)
        shape = self._pattern_at(draws[:, :_FIRST], draws[:, _SECOND] < 0.5, side, height, width)[..., None]
        old = delta * first
        new = shape * _signs(draws[:, None, None, _SHAPE:]) + old / (_channel_length(old) + _TINY)
        free = tf.maximum(self.epsilon**2 - tf.reduce_sum(delta**2, axis=(1, 2, 3), keepdims=True), 0.0) / channels
        new *= tf.sqrt(free + _channel_length(delta * either) ** 2) / (_channel_length(new) + _TINY)
        return tf.where(window, new, delta * (1 - either))

    def _pattern_at(self, draws: tf.Tensor, turned: tf.Tensor, side: tf.Tensor, height: int, width: int) -> tf.Tensor:
        """Return each example's pattern of its side, in its window, [batch, h, w]."""
        sizes = np.unique(self.sides(height, width))
        table = np.zeros([2, len(sizes), height + 1, width + 1], np.float32)  # the last row and column stay empty
        for place, size in enumerate(sizes):
            table[0, place, :size, :size] = pattern(int(size))
            table[1, place, :size, :size] = pattern(int(size)).T
        which = tf.searchsorted(tf.constant(sizes), side)
        chosen = tf.gather_nd(tf.constant(table), tf.stack([tf.cast(turned, tf.int32), which], axis=1))
        top, left = _corner(draws, side, height, width)
        rows, columns = tf.range(height)[None] - top[:, None], tf.range(width)[None] - left[:, None]
        rows = tf.where((rows >= 0) & (rows < side[:, None]), rows, height)
        columns = tf.where((columns >= 0) & (columns < side[:, None]), columns, width)
        return tf.gather(tf.gather(chosen, rows, axis=1, batch_dims=1), columns, axis=2, batch_dims=1)


def pattern(side: int) -> np.ndarray:
    """Return the pattern of the l2 attack, float64 [side, side] of length 1: a bump above, its negative below."""
    found = np.zeros([side, side])
    found[: side // 2] = _bump(side // 2, side)
    found[side // 2 :] = -_bump(side - side // 2, side)
    return found / np.sqrt((found**2).sum())


def _bump(height: int, width: int) -> np.ndarray:
    """Return centred rectangles of growing size added up, the k-th one weighing 1 / k^2, of length 1."""
    found = np.zeros([height, width])
    middle = height // 2, width // 2
    for grown in range(max(middle) + 1):
        rows, columns = (slice(max(each - grown, 0), each + grown + 1) for each in middle)
        found[rows, columns] += 1 / (grown + 1) ** 2
    return found / np.sqrt((found**2).sum())


def _signs(draws: tf.Tensor) -> tf.Tensor:
    return tf.where(draws < 0.5, -1.0, 1.0)


def _channel_length(delta: tf.Tensor) -> tf.Tensor:
    return tf.sqrt(tf.reduce_sum(delta**2, axis=(1, 2), keepdims=True))


def _corner(draws: tf.Tensor, side: tf.Tensor, height: int, width: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the top row and the left column [batch] of a window of each side, from two draws each."""
    free = tf.stack([height - side + 1, width - side + 1], axis=1)
    corner = tf.minimum(tf.cast(draws * tf.cast(free, tf.float32), tf.int32), free - 1)
    return corner[:, 0], corner[:, 1]


def _window(draws: tf.Tensor, side: tf.Tensor, height: int, width: int) -> tf.Tensor:
    """Return where the window is, bool [batch, h, w, 1]."""
    top, left = _corner(draws, side, height, width)
    rows, columns = tf.range(height)[None], tf.range(width)[None]
    inside_rows = (rows >= top[:, None]) & (rows < (top + side)[:, None])
    inside_columns = (columns >= left[:, None]) & (columns < (left + side)[:, None])
    return (inside_rows[:, :, None] & inside_columns[:, None, :])[..., None]
