"""Activations and anomaly scores of many images, a batch at a time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any, Callable, Optional

import numpy as np
import tensorflow as tf

from kerasdefense.detectors import Detector
from kerasdefense.evaluation.search import Chunk, compiled
from kerasdefense.types import ActivationsFn, InputError

_BATCH = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """Anomaly scores {detector: float32 [n]}, the predicted class int [n], and label and index of n images."""

    score: dict[str, np.ndarray]
    prediction: np.ndarray
    label: np.ndarray
    index: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """Whether each prediction is the label, bool [n]."""
        return self.prediction == self.label


class Scorer:
    """Scores images by several fitted detectors in one pass of the model, and passes more where they score images.

    Args:
        activations_fn: of the model.
        detectors: fitted, by name.

    After a call `seconds` holds what the passes took: `together`, and by the name of each that scores images.
    """

    def __init__(self, activations_fn: ActivationsFn, detectors: Mapping[str, Detector]) -> None:
        self._activations_fn = activations_fn
        self._detectors = dict(detectors)
        self._compiled: dict[str, Callable[..., Any]] = {}
        self.seconds: dict[str, float] = {}

    def __call__(self, dataset: tf.data.Dataset) -> Scored:
        """Return the scores of batches of dicts with image, label and index."""
        parts = [self._batch(batch) for batch in dataset.as_numpy_iterator() if len(batch["label"])]
        if not parts:
            raise InputError("there are no images to score")
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        score = {name: joined["score/" + name] for name in self._detectors}
        for name, each in score.items():
            if np.isnan(each).any():
                where = joined["index"][np.isnan(each)][0]
                raise InputError(f"detector {name} gives image {where} the score NaN; check the model's activations")
        return Scored(score, joined["prediction"], joined["label"], joined["index"])

    def of_chunk(self, chunk: Chunk) -> Scored:
        """Return the scores of images at hand."""
        elements = {"image": chunk.image, "label": chunk.label, "index": chunk.index}
        return self(tf.data.Dataset.from_tensor_slices(elements).batch(_BATCH))

    def _batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        image = tf.constant(batch["image"])
        found = self._timed("together", self._together, image)
        for name, detector in self._detectors.items():
            if detector.scores_images:
                found |= self._timed(name, lambda each, name=name: self._alone(name, each), image)
        return {**found, "label": batch["label"], "index": batch["index"]}

    def _timed(self, what: str, function: Callable[..., Any], image: tf.Tensor) -> dict[str, np.ndarray]:
        if what not in self._compiled:
            self._compiled[what] = compiled(function, image)
        started = time.perf_counter()
        found = {name: each.numpy() for name, each in self._compiled[what](image).items()}
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started
        return found

    def _together(self, image: tf.Tensor) -> dict[str, tf.Tensor]:
        activations = self._activations_fn(image)
        found = {
            "score/" + name: each.score(activations) for name, each in self._detectors.items() if not each.scores_images
        }
        return {**found, "prediction": tf.argmax(activations["logits"], axis=-1, output_type=tf.int32)}

    def _alone(self, name: str, image: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"score/" + name: self._detectors[name].score_image(self._activations_fn, image)}


def activations_of(
    activations_fn: ActivationsFn,
    dataset: tf.data.Dataset,
    *,
    examples: int = 0,
    moved: Optional[Callable[[Chunk], np.ndarray]] = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return logits, and embeddings where there are some, of the first images of a dataset, and their labels.

    Args:
        activations_fn: of the model.
        dataset: batches of dicts with image, label and index.
        examples: how many images; 0 = all.
        moved: returns the images to take in place of those of a chunk: adversarial ones, say.
    """
    parts: list[dict[str, np.ndarray]] = []
    function: Optional[Callable[..., Any]] = None

    def kept(image: tf.Tensor) -> dict[str, tf.Tensor]:
        activations = activations_fn(image)
        return {name: activations[name] for name in ("logits", "embedding") if name in activations}

    for chunk in _chunks(dataset, examples):
        image = tf.constant(chunk.image if moved is None else moved(chunk))
        function = function or compiled(kept, image)
        parts.append({**{name: each.numpy() for name, each in function(image).items()}, "label": chunk.label})
    if not parts:
        raise InputError("there are no training images to fit detectors on")
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return joined, joined.pop("label")


def _chunks(dataset: tf.data.Dataset, examples: int) -> Iterator[Chunk]:
    seen = 0
    for batch in dataset.as_numpy_iterator():
        count = min(len(batch["label"]), examples - seen) if examples else len(batch["label"])
        if count <= 0:
            return
        yield Chunk(*(batch[name][:count] for name in ("image", "label", "index")))
        seen += count
