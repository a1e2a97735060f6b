"""The images among which an attack that matches another image looks for it: the first ones of a data set.

They do not depend on the block that an image is attacked in, so that outcomes do not either.
"""

from __future__ import annotations

import functools
from typing import Callable

import numpy as np

from kerasdefense.evaluation.search import Chunk, ExactPath, Search

_STRIDE = 7919
"""Images between the choices of one run and the next."""


class References:
    """Images to match, read and scored when the first attack asks for them.

    Args:
        exact: says what class an image is taken for.
        read: returns the images.
    """

    def __init__(self, exact: ExactPath, read: Callable[[], Chunk]) -> None:
        self._exact = exact
        self._read = read
        self._known: dict[str, np.ndarray] = {}

    @functools.cached_property
    def chunk(self) -> Chunk:
        """The images."""
        return self._read()

    @functools.cached_property
    def logits(self) -> np.ndarray:
        """Logits of the images, float32 [images, classes]."""
        return self._exact.logits(self.chunk)

    def of(self, search: Search, label: np.ndarray, place: np.ndarray, run: np.ndarray) -> np.ndarray:
        """Return what a search compares, of one image for each row that is not taken for the row's class.

        Args:
            search: the attack on its path.
            label: int [n].
            place: int [n], how many images come before the row's in the data set.
            run: int [n], number of the run.
        """
        if search.name not in self._known:
            self._known[search.name] = search.references(self.chunk.image, self.logits)
        answer = self.logits.argmax(axis=1)
        found = (place + 1 + run * _STRIDE) % len(answer)
        for _ in answer:
            same = answer[found] == label
            if not same.any():
                break
            found = np.where(same, (found + 1) % len(answer), found)
        return self._known[search.name][found]
