from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest


class Blobs(NamedTuple):
    """Four classes as stretched blobs in six dimensions, in float32 as a model gives them, and a linear head."""

    embedding: np.ndarray
    label: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray

    @property
    def activations(self):
        return {"logits": self.embedding @ self.kernel + self.bias, "embedding": self.embedding}

    @property
    def head(self):
        return self.kernel, self.bias


@pytest.fixture(scope="session")
def blobs():
    random = np.random.default_rng(7)
    label = random.integers(0, 4, 200)
    means = random.normal(size=[4, 6]) * 3
    stretch = random.normal(size=[6, 6])
    embedding = means[label] + random.normal(size=[200, 6]) @ stretch
    kernel, bias = means.T, -0.5 * np.sum(means**2, axis=1) + 20
    return Blobs(embedding.astype(np.float32), label, kernel.astype(np.float32), bias.astype(np.float32))
