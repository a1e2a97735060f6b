"""ViM: a virtual logit for the part of the embedding outside the principal space, against the energy of the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from kerasdefense.detectors.base import Detector
from kerasdefense.detectors.directions import length
from kerasdefense.detectors.training import Training
from kerasdefense.types import Activations, UsageError

_ROUNDING = 1e-6


class ViM(Detector):
    """The virtual logit minus the energy, `scale * ||(embedding - origin) @ residual|| - log sum_c exp(logits_c)`.

    `origin = -pinv(kernel^T) bias`; `residual` [d, d - components] are the eigenvectors of the uncentred covariance of
    `embedding - origin` after the first `components`; `scale` (alpha in the paper) is the mean largest logit over the
    mean length of the residual, both of training images.

    Args:
        components: size of the principal space, below d; 0 = the authors' rule: 1000 from d = 2048 on, 512 from
            d = 768 on, d // 2 below.

    Source: Wang et al. 2022, "ViM: Out-of-distribution with virtual-logit matching", section 4. Deviations: where the
    mean largest logit is negative, which would turn the virtual logit around, its absolute value is taken, with a note.
    """

    needs = ("logits", "embedding")
    needs_head = True
    fitted = ("origin", "residual", "scale")

    origin: tf.Variable
    residual: tf.Variable
    scale: tf.Variable

    def __init__(self, components: int = 0) -> None:
        super().__init__()
        if components < 0:
            raise UsageError(f"components of vim must be at least 0, not {components}")
        self.components = components

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {"components": self.components}

    def recorded(self) -> dict[str, Any]:
        """Return the size of the principal space and the scale of the virtual logit."""
        if not self.is_fitted:
            return self.get_config()
        size, of_residual = self.residual.shape
        return {"components": int(size - of_residual), "alpha": float(self.scale.numpy())}

    def _fit(self, training: Training, notes: list[str]) -> dict[str, np.ndarray]:
        size = training.embedding.shape[1]
        components = self.components or _rule(size)
        if components >= size:
            raise UsageError(f"components of vim must be below the {size} entries of the embedding, not {components}")
        origin = -np.linalg.pinv(training.kernel.T) @ training.bias
        centred = training.embedding - origin
        residual = np.linalg.eigh(centred.T @ centred / len(centred))[1][:, : size - components]
        outside = np.mean(np.linalg.norm(centred @ residual, axis=1))
        if outside <= _ROUNDING * np.mean(np.linalg.norm(centred, axis=1)):
            raise UsageError(f"the training embeddings have nothing outside {components} components; set vim fewer")
        logit = np.mean(np.max(training.logits, axis=1))
        if logit < 0:
            notes.append(f"the mean largest logit is {logit:.4g}, below 0, so alpha is taken from its absolute value")
        return {"origin": origin, "residual": residual, "scale": np.asarray(abs(logit) / outside)}

    def _score(self, activations: Activations) -> tf.Tensor:
        virtual = self.scale * length(tf.matmul(activations["embedding"] - self.origin, self.residual))
        return virtual - tf.reduce_logsumexp(activations["logits"], axis=-1)


def _rule(size: int) -> int:
    if size >= 2048:
        return 1000
    return 512 if size >= 768 else size // 2
