"""Angles between the embedding and one axis per class, fitted to embeddings or taken from the classifier."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from kerasdefense.detectors.base import Detector, ScoreFn
from kerasdefense.detectors.directions import TINY, direction
from kerasdefense.detectors.training import Training
from kerasdefense.types import Activations, InputError

_LONGER = 1e-4
_LARGEST_COSINE = 1 - 1e-6


class Subspace(Detector):
    """The angle to the nearest class axis, `min_c arccos(|axis_c . embedding| / (||embedding|| + 1e-4))`, at most pi/2.

    The axis of a class is the first left singular vector of the matrix whose columns are its training embeddings. A
    class without samples, or with zero embeddings alone, has no axis, which is in the notes; if none has one, the fit
    raises an InputError. An embedding of zero scores pi/2.

    Source: the union of subspaces of Zaeemzadeh et al. 2021, section 3, which DFA (Liu et al. 2022) names as its
    detector. Deviations: one pass instead of 50 with dropout, which DFA's backbone does not have; the cosine is clipped
    to 1 - 1e-6, where the gradient of arccos is finite.
    """

    needs = ("embedding",)
    fitted = ("axes",)
    follows_own = False

    axes: tf.Variable

    def recorded(self) -> dict[str, Any]:
        """Return the number of classes with an axis."""
        return {"classes": int(np.count_nonzero(self.axes.numpy().any(axis=0)))} if self.is_fitted else {}

    def _fit(self, training: Training, notes: list[str]) -> dict[str, np.ndarray]:
        axes = np.zeros([training.embedding.shape[1], training.classes])
        for each in range(training.classes):
            embedding = training.embedding[training.label == each]
            if embedding.any():
                # The first left singular vector of the columns is the last eigenvector of their products' sum.
                axes[:, each] = np.linalg.eigh(embedding.T @ embedding)[1][:, -1]
            else:
                notes.append(f"class {each}: no sample with an embedding other than zero, so it has no axis")
        if not axes.any():
            raise InputError(
                "every training embedding is zero, which leaves no axis to take angles with; check the model"
            )
        return {"axes": axes}

    def _score(self, activations: Activations) -> tf.Tensor:
        return tf.acos(tf.minimum(self._cosine(activations), _LARGEST_COSINE))

    def _stand_ins(self) -> dict[str, ScoreFn]:
        return {"cosine": lambda activations: -self._cosine(activations)}

    def _cosine(self, activations: Activations) -> tf.Tensor:
        return _largest_cosine(direction(activations["embedding"], _LONGER), self.axes)


class MaxCosine(Detector):
    """One minus the largest cosine with a column of the kernel, `1 - max_c |kernel_c . embedding|`, both of length 1.

    With an OrthogonalHead that is one minus the largest logit. An embedding of zero scores 1.

    Source: the logits of DFA (Liu et al. 2022), whose kernel has orthonormal columns. Deviations: a column of another
    length is divided by it.
    """

    needs = ("embedding",)
    needs_head = True
    takes_cosines = True
    fitted = ("axes",)

    axes: tf.Variable

    def _fit(self, training: Training, notes: list[str]) -> dict[str, np.ndarray]:
        return {"axes": training.kernel / (np.linalg.norm(training.kernel, axis=0) + TINY)}

    def _score(self, activations: Activations) -> tf.Tensor:
        return 1.0 - _largest_cosine(direction(activations["embedding"]), self.axes)


def _largest_cosine(feature: tf.Tensor, axes: tf.Tensor) -> tf.Tensor:
    return tf.reduce_max(tf.abs(tf.matmul(feature, axes)), axis=-1)
