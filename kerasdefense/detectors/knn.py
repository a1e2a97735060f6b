"""Distance of the embedding's direction to its k-th nearest neighbour among training images."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from kerasdefense.detectors.base import Detector, ScoreFn
from kerasdefense.detectors.directions import TINY, direction
from kerasdefense.detectors.training import Training
from kerasdefense.types import Activations, UsageError


class KNN(Detector):
    """The k-th smallest `||feature - neighbour||^2`, with `feature = embedding / (||embedding|| + 1e-10)`.

    The neighbours are the features of a bank of training images: the same number of every class as far as it goes,
    drawn with a seed; all of them where there are no more than `bank`.

    Args:
        bank: how many training images are kept.
        k: which neighbour counts, from 1 for the nearest, at most `bank`.
        seed: of the draw.

    Source: Sun et al. 2022, "Out-of-distribution detection with deep nearest neighbors", section 3. Deviations: the
    distance is squared, as in OpenOOD; the bank is balanced over the classes.
    """

    needs = ("embedding",)
    fitted = ("neighbours",)

    neighbours: tf.Variable

    def __init__(self, bank: int = 5000, k: int = 50, seed: int = 0) -> None:
        super().__init__()
        if not 1 <= k <= bank:
            raise UsageError(f"k of knn must be at least 1 and at most bank, {bank}, not {k}")
        if seed < 0:
            raise UsageError(f"seed of knn must be at least 0, not {seed}")
        self.bank, self.k, self.seed = bank, k, seed

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {"bank": self.bank, "k": self.k, "seed": self.seed}

    def recorded(self) -> dict[str, Any]:
        """Return the settings, with the number of images in the bank."""
        fit = {"bank": int(self.neighbours.shape[0])} if self.is_fitted else {}
        return {**self.get_config(), **fit}

    def _fit(self, training: Training, notes: list[str]) -> dict[str, np.ndarray]:
        if self.k > len(training.label):
            raise UsageError(f"k of knn must be at most the {len(training.label)} training images, not {self.k}")
        chosen = training.embedding[balanced_draw(training.label, self.bank, self.seed)]
        return {"neighbours": chosen / (np.linalg.norm(chosen, axis=1, keepdims=True) + TINY)}

    def _score(self, activations: Activations) -> tf.Tensor:
        feature = direction(activations["embedding"])
        # The short form loses digits, so it only chooses the neighbour.
        last = self._nearest(feature).indices[:, -1]
        return tf.reduce_sum(tf.square(feature - tf.gather(self.neighbours, last)), axis=-1)

    def _stand_ins(self) -> dict[str, ScoreFn]:
        return {"mean_distance": self._mean_distance}

    def _mean_distance(self, activations: Activations) -> tf.Tensor:
        feature = direction(activations["embedding"])
        return tf.reduce_sum(tf.square(feature), axis=-1) - tf.reduce_mean(self._nearest(feature).values, axis=-1)

    def _nearest(self, feature: tf.Tensor) -> Any:
        """Return value and index of the k largest `2 feature . neighbour - ||neighbour||^2`, by distance."""
        product = tf.matmul(feature, self.neighbours, transpose_b=True)
        return tf.math.top_k(2 * product - tf.reduce_sum(tf.square(self.neighbours), axis=-1), self.k)


def balanced_draw(label: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return which images to take so that all classes have the same number of them, as far as they go.

    Args:
        label: int [n].
        count: how many to take; all where there are fewer.
        seed: of the draw.

    Returns:
        int [min(n, count)], ascending.
    """
    shuffled = np.random.default_rng(seed).permutation(len(label))
    place = np.empty(len(label), int)
    for each in np.unique(label):
        of_class = shuffled[label[shuffled] == each]
        place[of_class] = np.arange(len(of_class))
    in_turn = shuffled[np.argsort(place[shuffled], kind="stable")]
    return np.sort(in_turn[:count])
