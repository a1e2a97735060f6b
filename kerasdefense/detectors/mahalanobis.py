"""Mahalanobis distances of the embedding to the nearest class, plain and relative to all classes together."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from kerasdefense.detectors.base import Detector
from kerasdefense.detectors.training import Training
from kerasdefense.types import Activations, InputError, UsageError

_ROUNDING = 1e-12


class Mahalanobis(Detector):
    """Distance to the nearest class, `min_c (embedding - mean_c)^T covariance^-1 (embedding - mean_c)`.

    `covariance` is one for all classes, of the embeddings minus the means of their classes. The distance is the squared
    one between embedding and mean after both are whitened.

    Args:
        floor: eigenvalues of the covariance below this share of its largest are raised to it, in (0, 1).

    Source: Lee et al. 2018, section 2.1, last layer alone and no step on the image. Deviations: the floor; a class
    without samples is left out.
    """

    needs = ("embedding",)
    fitted: ClassVar[tuple[str, ...]] = ("centre", "whitening", "means")

    centre: tf.Variable
    whitening: tf.Variable
    means: tf.Variable

    def __init__(self, floor: float = 1e-6) -> None:
        super().__init__()
        if not 0 < floor < 1:
            raise UsageError(f"floor must be between 0 and 1, not {floor}")
        self.floor = floor

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {"floor": self.floor}

    def recorded(self) -> dict[str, Any]:
        """Return the settings and the number of classes with a mean."""
        fit = {"classes": int(self.means.shape[0])} if self.is_fitted else {}
        return {**self.get_config(), **fit}

    def _fit(self, training: Training, notes: list[str]) -> dict[str, np.ndarray]:
        present, of_class = np.unique(training.label, return_inverse=True)
        for missing in sorted(set(range(training.classes)) - set(present.tolist())):
            notes.append(f"class {missing}: no sample, so no distance is taken to it")
        centre = training.embedding.mean(axis=0)
        centred = training.embedding - centre
        means = np.stack([centred[of_class == each].mean(axis=0) for each in range(len(present))])
        whitening = self._whiten(centred - means[of_class], training.embedding)
        return {"centre": centre, "whitening": whitening, "means": means @ whitening}

    def _whiten(self, centred: np.ndarray, embedding: np.ndarray, lowest: float = 0.0) -> np.ndarray:
        """Return the matrix [d, d] after which `centred` [n, d] has covariance 1, up to the floor or `lowest`."""
        values, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
        if values[-1] <= _ROUNDING * np.mean(np.square(embedding)):
            raise InputError(
                "the embeddings of a class are all the same, which leaves no covariance to fit; give more images"
            )
        return vectors / np.sqrt(np.maximum(values, lowest or self.floor * values[-1]))

    def _score(self, activations: Activations) -> tf.Tensor:
        whitened = tf.matmul(activations["embedding"] - self.centre, self.whitening)
        # The short form loses digits, so it only chooses the class.
        of_mean = tf.reduce_sum(tf.square(self.means), axis=-1)
        nearest = tf.argmin(of_mean - 2 * tf.matmul(whitened, self.means, transpose_b=True), axis=-1)
        return tf.reduce_sum(tf.square(whitened - tf.gather(self.means, nearest)), axis=-1)


class RelativeMahalanobis(Mahalanobis):
    """Distance to the nearest class beyond that to all data, `min_c distance_c - distance_all`.

    `distance_all` is the Mahalanobis distance to the mean of all embeddings with the covariance about it.

    Args:
        floor: as in Mahalanobis; the lowest eigenvalue that it leaves there bounds those of the other covariance too.

    Source: Ren et al. 2021, "A simple fix to Mahalanobis distance for improving near-OOD detection", section 3.
    Deviations: as in Mahalanobis.
    """

    fitted: ClassVar[tuple[str, ...]] = (*Mahalanobis.fitted, "whitening_of_all")

    whitening_of_all: tf.Variable

    def _fit(self, training: Training, notes: list[str]) -> dict[str, np.ndarray]:
        arrays = super()._fit(training, notes)
        # With the floor of the classes' covariance, so that directions below it leave nothing in the difference.
        lowest = 1 / np.square(arrays["whitening"]).sum(axis=0).max()
        whitening = self._whiten(training.embedding - training.embedding.mean(axis=0), training.embedding, lowest)
        return {**arrays, "whitening_of_all": whitening}

    def _score(self, activations: Activations) -> tf.Tensor:
        whitened = tf.matmul(activations["embedding"] - self.centre, self.whitening_of_all)
        return super()._score(activations) - tf.reduce_sum(tf.square(whitened), axis=-1)
