"""An iterative attack on many images: a fixed number of slots, in each of which one image is attacked at a time.

An image leaves its slot when it has fallen or all its runs are over, and the next one takes its place, so that every
step of the model works on a full batch of images that still stand. Each is at a step of its own. When none are waiting
any more, the slots are halved as often as the rest allows.
"""

from __future__ import annotations

from typing import Any, Optional

import numpy as np
import tensorflow as tf

from kerasdefense.evaluation.references import References
from kerasdefense.evaluation.search import Chunk, ExactPath, Search, merged, padded_size

_FREE = -1
_PROGRESS = ("rows", "fooled", "done", "claimed", "image_adv", "entered", "place", "run")


class Pool:
    """One search over some images, which can be stopped after any call of `advance`, stored and taken up again.

    After it, `fooled` bool [n] says which images fell by the exact path's verdict, `image_adv` [n, h, w, c] holds for
    each what fooled it or what was tried last, `done` bool [n] is true of all. `claimed` bool [n] says which images the
    search took for fooled at any time, be it that the exact path agreed or not.

    Args:
        search: what is run.
        block: all images at hand.
        logits: float32 [images, classes], those of the clean images.
        rows: int [n], which of them are attacked.
        exact: judges candidates.
        first: how many images came before the block.
        references: images that attacks match; None = those of the block.
    """

    def __init__(
        self,
        search: Search,
        block: Chunk,
        logits: np.ndarray,
        rows: np.ndarray,
        exact: ExactPath,
        *,
        first: int = 0,
        references: Optional[References] = None,
    ) -> None:
        self.search = search
        self.block = block
        self.logits = logits
        self.exact = exact
        self._first = first
        self._others = references or References(exact, lambda: block)
        self._own = search.references(block.image, logits) if search.keeps_its_own else None
        self.rows = rows
        self.fooled = np.zeros(len(rows), bool)
        self.done = np.zeros(len(rows), bool)
        self.image_adv = block.image[rows]
        self.entered = np.int64(0)
        self.claimed = np.zeros(len(rows), bool)
        size = padded_size(len(rows), search.slots)
        self.place = np.full(size, _FREE)
        self.run = np.zeros(size, np.int64)
        self._state: Any = None
        self._inputs: Any = ()

    @property
    def finished(self) -> bool:
        """Whether every image has fallen or withstood all runs."""
        return bool(self.done.all())

    def advance(self) -> None:
        """Give free slots to waiting images, take a burst of steps, and see who has fallen or is through."""
        self._shrink()
        self._admit()
        # No run takes more passes than it has: the one that is nearest to its end ends the burst.
        left = self.search.attack.passes - self._state.best.queries.numpy()[self.place != _FREE].max()
        for _ in range(min(self.search.attack.burst, int(left))):
            self._state = self.search.step(self._state, *self._inputs)
        self._harvest()

    def _admit(self) -> None:
        free = np.flatnonzero(self.place == _FREE)[: len(self.rows) - int(self.entered)]
        self.place[free] = self.entered + np.arange(len(free))
        self.run[free] = 0
        self.entered += len(free)
        if len(free):
            self._begin(np.isin(np.arange(len(self.place)), free))

    def _begin(self, fresh: np.ndarray) -> None:
        """Start the runs of the slots that `fresh` [slots] marks."""
        self._set_inputs()
        image, context = self._inputs
        begun = self.search.start(image, context, self.run)
        self._state = begun if self._state is None else merged(fresh, begun, self._state)

    def _set_inputs(self) -> None:
        """Look up image and context of every slot; a free one repeats the first image."""
        rows = self.rows[np.maximum(self.place, 0)]
        chunk = self.block.rows(rows)
        context = self.search.context(chunk, self.logits[rows], self.run, self._references(rows))
        self._inputs = (tf.constant(chunk.image), context)

    def _references(self, rows: np.ndarray) -> np.ndarray:
        """Return what is compared: for each row and run of another clean image, not taken for the row's class.

        An attack that goes away from the clean image has that of the row itself; one that compares nothing, its logits.
        """
        if self._own is not None:
            return self._own[rows]
        if not self.search.matches:
            return self.logits[rows]
        return self._others.of(self.search, self.block.label[rows], self._first + rows, self.run)

    def _shrink(self) -> None:
        taken = np.flatnonzero(self.place != _FREE)
        size = padded_size(max(1, len(taken)), self.search.slots)
        if self._state is None or int(self.entered) < len(self.rows) or size >= len(self.place):
            return
        free = np.setdiff1d(np.arange(len(self.place)), taken)
        kept = np.concatenate([taken, free])[:size]
        self.place, self.run = self.place[kept], self.run[kept]
        self._state = tf.nest.map_structure(lambda each: tf.gather(each, kept), self._state)
        self._set_inputs()

    def _harvest(self) -> None:
        best, taken = self._state.best, self.place != _FREE
        claimed = taken & best.success.numpy()
        self.claimed[self.place[claimed]] = True
        over = taken & (best.queries.numpy() >= self.search.attack.passes)
        # On the exact path itself every iterate was judged; on others the last word is only said here.
        judged = np.flatnonzero(claimed | over if self.search.path_name != "exact" else claimed)
        fell = np.zeros(len(taken), bool)
        if judged.size:
            image = tf.gather(best.image, judged).numpy()
            chunk = self.block.rows(self.rows[self.place[judged]])
            fooled = ~self.exact.is_right(Chunk(image, chunk.label, chunk.index))
            fell[judged] = fooled & self.search.allows(image, chunk.image)
        denied = claimed & ~fell
        if denied.any():
            success = best.success & tf.constant(~denied)
            self._state = self._state._replace(best=best._replace(success=success))
        over &= ~fell
        again = over & (self.run + 1 < self.search.runs)
        leaving = np.flatnonzero(fell | (over & ~again))
        if leaving.size:
            places = self.place[leaving]
            self.image_adv[places] = tf.gather(best.image, leaving).numpy()
            self.fooled[places], self.done[places] = fell[leaving], True
            self.place[leaving] = _FREE
        if again.any():
            self.run[again] += 1
            self._begin(again)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return everything that `from_arrays` needs to go on from here, bit for bit."""
        state = {} if self._state is None else enumerate(tf.nest.flatten(self._state))
        stored = {f"state_{number}": each.numpy() for number, each in dict(state).items()}
        return {**stored, **{name: np.asarray(getattr(self, name)) for name in _PROGRESS}}

    def from_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Take up a search where `to_arrays` left it."""
        for name in _PROGRESS:
            setattr(self, name, arrays[name])
        if "state_0" not in arrays:
            return
        self._set_inputs()
        image, context = self._inputs
        like = self.search.start(image, context, self.run)
        flat = [tf.constant(arrays[f"state_{number}"]) for number in range(len(tf.nest.flatten(like)))]
        self._state = tf.nest.pack_sequence_as(like, flat)
