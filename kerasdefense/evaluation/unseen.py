"""What lies outside every ball: common corruptions and moved pixels. It counts towards no robust accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from kerasdefense.attacks import CORRUPTIONS, StAdv, seeds
from kerasdefense.attacks.wrappers import eot
from kerasdefense.evaluation.probes import Subject
from kerasdefense.evaluation.report import accuracy_interval
from kerasdefense.evaluation.search import FRESH_DRAWS, Chunk

SEVERITIES = (1, 3, 5)
_STREAM = 2000


def unseen(subject: Subject) -> dict[str, Any]:
    """Return the accuracy on corrupted images, by corruption and severity, and after a spatial attack.

    Of a model that draws at random, that goes along the mean logits of ten draws.

    Returns:
        `corruptions`, `{name: {severity: {value, n, ci95}}}` without those that need colour where there is none;
        `mean_corrupted`, the mean over all of them; `st_adv`, the accuracy after StAdv.
    """
    chunk, exact = subject.chunk, subject.exact
    seed = seeds.per_example(subject.options.seed, _STREAM, tf.constant(chunk.index))
    image = tf.constant(chunk.image)
    names = [name for name in CORRUPTIONS if name != "saturate" or chunk.image.shape[-1] == 3]

    def accuracy(changed: tf.Tensor) -> dict[str, Any]:
        return accuracy_interval(exact.is_right(Chunk(np.asarray(changed), chunk.label, chunk.index)))

    corruptions = {
        name: {str(severity): accuracy(CORRUPTIONS[name](image, severity, seed)) for severity in SEVERITIES}
        for name in names
    }
    values = [each["value"] for found in corruptions.values() for each in found.values()]
    path = eot(subject.attack_paths["exact"], FRESH_DRAWS if subject.options.is_randomised else 1)

    @tf.function(reduce_retracing=True)
    def moved(image: tf.Tensor, label: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return StAdv()(lambda each: path(each, seed), image, label, seed).image

    label, size = tf.constant(chunk.label), subject.options.chunk_size
    size = max(1, size // FRESH_DRAWS) if subject.options.is_randomised else size
    starts = range(0, len(chunk.label), size)
    parts = [moved(*(each[first : first + size] for each in (image, label, seed))) for first in starts]
    attacked = tf.concat(parts, axis=0)
    return {"corruptions": corruptions, "mean_corrupted": float(np.mean(values)), "st_adv": accuracy(attacked)}
