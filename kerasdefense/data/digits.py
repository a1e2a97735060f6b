"""Real handwritten digits that come with scikit-learn, as a TFDS set that prepares itself offline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import sklearn.datasets
import tensorflow_datasets as tfds

from kerasdefense.data.partition import holdout

_TEST_SEED = 1797


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 grey images of 8x8 pixels, ten classes, a fixed stratified fifth of them for the test."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012 (declared by the base class)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of the UCI repository that are bundled with scikit-learn.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        label = sklearn.datasets.load_digits().target
        test = holdout(label, 0.2, _TEST_SEED)
        train = np.setdiff1d(np.arange(len(label)), test)
        return {"train": self._generate_examples(train), "test": self._generate_examples(test)}

    def _generate_examples(self, index: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        bunch = sklearn.datasets.load_digits()
        image = np.round(bunch.images * 255 / 16).astype(np.uint8)[..., None]
        for example in index.tolist():
            yield example, {"image": image[example], "label": int(bunch.target[example])}
