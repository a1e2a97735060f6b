"""One block of images on its way through all searches of an evaluation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Callable, Optional

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from kerasdefense import losses
from kerasdefense.evaluation.journal import Arrays
from kerasdefense.evaluation.outcomes import from_levels, to_levels
from kerasdefense.evaluation.pool import Pool
from kerasdefense.evaluation.references import References
from kerasdefense.evaluation.search import Chunk, ExactPath, Search

Watch = Callable[[], None]
"""Called between steps; it may store the block, or raise to stop."""

_PROGRESS = (
    *("clean", "logits", "survived", "standing", "image_adv", "margin"),
    *("met", "unconfirmed", "seconds", "number"),
)
_POOL = "pool_"


class Block:
    """Images, and what has become of them so far.

    Args:
        chunk: the images.
        first: how many images came before.
        exact: judges images.
        searches: what they go through, in order.
        cascade: whether a search only meets images that stand after those before it.
        references: images that attacks match; None = these.
    """

    def __init__(
        self,
        chunk: Chunk,
        exact: ExactPath,
        searches: Sequence[Search],
        *,
        first: int,
        cascade: bool,
        references: Optional[References] = None,
    ) -> None:
        self.chunk = chunk
        self.first = first
        self.exact = exact
        self.searches = searches
        self.cascade = cascade
        self.references = references or References(exact, lambda: chunk)
        self.logits = exact.logits(chunk)
        self.clean = np.argmax(self.logits, axis=1) == chunk.label
        self.survived = np.repeat(self.clean[:, None], len(searches), axis=1)
        self.standing = self.clean.copy()
        self.image_adv = chunk.image.copy()
        self.margin = np.full(len(self.clean), -np.inf, np.float32)
        self.met, self.unconfirmed = np.zeros((2, len(searches)), np.int64)
        self.seconds = np.zeros(len(searches))
        self.number = np.int64(0)
        self._pool: Optional[Pool] = None
        self._stored_pool: Optional[Arrays] = None

    def attack(self, watch: Watch, *, progress: bool = False) -> None:
        """Run the searches that are left; `watch` is called every few steps."""
        while self.number < len(self.searches):
            search = self.searches[int(self.number)]
            rows = self._rows(search)
            self.met[self.number] = len(rows)
            with tqdm(total=len(rows), desc=search.name, unit="image", disable=not progress, leave=False) as bar:
                if search.is_iterative:
                    self._iterate(search, rows, watch, bar)
                else:
                    self._try_once(search, rows, watch, bar)
            self.number += 1

    def _rows(self, search: Search) -> np.ndarray:
        if self._stored_pool is not None:
            return self._stored_pool["rows"]
        met = self.standing if self.cascade and not search.planned.alone else self.clean
        within = search.planned.examples - self.first if search.planned.examples else len(met)
        return np.flatnonzero(met & (np.arange(len(met)) < within))

    def _iterate(self, search: Search, rows: np.ndarray, watch: Watch, bar: tqdm) -> None:
        pool = self._pool = Pool(
            search, self.chunk, self.logits, rows, self.exact, first=self.first, references=self.references
        )
        if self._stored_pool is not None:
            pool.from_arrays(self._stored_pool)
            self._stored_pool = None
        while not pool.finished:
            started = time.perf_counter()
            pool.advance()
            self.seconds[self.number] += time.perf_counter() - started
            self._show(bar, pool.done.sum(), pool.fooled.sum())
            watch()
        self._record(rows, pool.fooled, pool.image_adv)
        self.unconfirmed[self.number] = (pool.claimed & ~pool.fooled).sum()
        self._pool = None

    def _try_once(self, search: Search, rows: np.ndarray, watch: Watch, bar: tqdm) -> None:
        """Run an attack that is not iterative on a chunk of rows after the other; it is not stored in between."""
        fooled, image_adv = np.zeros(len(rows), bool), self.chunk.image[rows]
        for first in range(0, len(rows), search.slots):
            started = time.perf_counter()
            part = np.arange(first, min(first + search.slots, len(rows)))
            chunk = self.chunk.rows(rows[part])
            image_adv[part] = search.one_shot(chunk)
            wrong = ~self.exact.is_right(Chunk(image_adv[part], chunk.label, chunk.index))
            fooled[part] = wrong & search.allows(image_adv[part], chunk.image)
            self.seconds[self.number] += time.perf_counter() - started
            self._show(bar, part[-1] + 1, fooled.sum())
            watch()
        self._record(rows, fooled, image_adv)

    def _record(self, rows: np.ndarray, fooled: np.ndarray, image_adv: np.ndarray) -> None:
        """Note who fell, and keep of each image the candidate that is the worse one for the model.

        What has fooled once is kept; by a mean over draws only until another fools by a higher margin, or what fooled
        by a little would be all that other draws are asked about.
        """
        fell = rows[fooled]
        standing = self.standing[rows]
        margin = self._margin(image_adv, rows)
        higher = margin > self.margin[rows]
        worse = standing & (fooled | higher)
        if self.exact.draws > 1:
            worse |= ~standing & fooled & higher
        self.image_adv[rows[worse]], self.margin[rows[worse]] = image_adv[worse], margin[worse]
        self.survived[fell, self.number] = False
        self.standing[fell] = False

    def _margin(self, image: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return how far the best other class is above the label on the exact path, float32 [n]."""
        if not rows.size:
            return np.zeros(0, np.float32)
        chunk = self.chunk.rows(rows)
        logits = self.exact.logits(Chunk(image, chunk.label, chunk.index))
        return losses.margin(tf.constant(logits), tf.constant(chunk.label)).numpy()

    def _show(self, bar: tqdm, done: int, fooled: int) -> None:
        bar.n = int(done)
        standing = int(self.standing.sum()) - int(fooled)
        bar.set_postfix(standing=standing, robust=f"{max(0, standing) / len(self.clean):.3f}", refresh=False)
        bar.update(0)

    def outcome(self) -> Arrays:
        """Return what is known of every image, for `outcomes.collect`; what is at work counts as far as it came."""
        if self._pool is not None:
            self._record(self._pool.rows, self._pool.fooled, self._pool.image_adv)
            self._pool = None
        fallen = np.flatnonzero(self.clean & ~self.standing)
        rounded = self.standing.copy()
        if fallen.size:
            chunk = self.chunk.rows(fallen)
            image = from_levels(to_levels(self.image_adv[fallen]))
            rounded[fallen] = self.exact.is_right(Chunk(image, chunk.label, chunk.index))
        kept = {
            name: getattr(self, name) for name in ("clean", "survived", "image_adv", "met", "unconfirmed", "seconds")
        }
        return {**kept, "index": self.chunk.index, "label": self.chunk.label, "rounded": rounded}

    def to_arrays(self) -> Arrays:
        """Return all that `from_arrays` needs to go on from here."""
        arrays = {name: np.asarray(getattr(self, name)) for name in _PROGRESS}
        if self._pool is not None:
            arrays |= {f"{_POOL}{name}": each for name, each in self._pool.to_arrays().items()}
        return arrays

    def from_arrays(self, arrays: Arrays) -> None:
        """Take up the block where `to_arrays` left it."""
        for name in _PROGRESS:
            setattr(self, name, arrays[name])
        pool = {name.removeprefix(_POOL): each for name, each in arrays.items() if name.startswith(_POOL)}
        self._stored_pool = pool or None
