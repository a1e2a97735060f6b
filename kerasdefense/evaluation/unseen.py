"""What lies outside every ball: common corruptions and moved pixels. It counts towards no robust accuracy."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from kerasdefense.attacks import CORRUPTIONS, StAdv, seeds
from kerasdefense.attacks.wrappers import eot
from kerasdefense.evaluation.figures import Figures
from kerasdefense.evaluation.probes import Subject
from kerasdefense.evaluation.report import accuracy_interval
from kerasdefense.evaluation.search import FRESH_DRAWS, Chunk

SEVERITIES = (1, 3, 5)
AT_RANDOM = StAdv(tau=0.0, confidence=1e6)
"""What meets models that draw at random: one draw that was fooled by little says nothing of the next."""
_STREAM = 2000


def unseen(subject: Subject) -> Figures:
    """Return the accuracy on corrupted images, by corruption and severity, and after a spatial attack.

    Of a model that draws at random, that goes along the mean logits of ten draws, other ones at each step, to the
    highest margin that it finds.

    Returns:
        As results `corruptions`, `{name: {severity: {value, n, ci95}}}` without those that need colour where there is
        none; `mean_corrupted`, the mean over all of them; `st_adv`, the accuracy after StAdv. As arrays, by image,
        `st_adv`, bool, and `corrupted`, the share of its corruptions that are right.
    """
    chunk, exact = subject.chunk, subject.exact
    image = tf.constant(chunk.image)
    seed = seeds.per_example(subject.options.seed, _STREAM, tf.constant(chunk.index))
    names = [name for name in CORRUPTIONS if name != "saturate" or chunk.image.shape[-1] == 3]

    def is_right(changed: tf.Tensor) -> np.ndarray:
        return exact.is_right(Chunk(np.asarray(changed), chunk.label, chunk.index))

    right = {
        name: {str(severity): is_right(CORRUPTIONS[name](image, severity, seed)) for severity in SEVERITIES}
        for name in names
    }
    corruptions = {
        name: {severity: accuracy_interval(each) for severity, each in found.items()} for name, found in right.items()
    }
    values = [each["value"] for found in corruptions.values() for each in found.values()]
    standing = is_right(moved_pixels(subject))
    results = {
        "corruptions": corruptions,
        "mean_corrupted": float(np.mean(values)),
        "st_adv": accuracy_interval(standing),
    }
    corrupted = np.mean([each for found in right.values() for each in found.values()], axis=0)
    return Figures(results, {"index": chunk.index, "st_adv": standing, "corrupted": corrupted})


def moved_pixels(subject: Subject) -> np.ndarray:
    """Return the images after StAdv."""
    chunk, exact, is_random = subject.chunk, subject.attack_paths["exact"], subject.options.is_randomised
    path = eot(exact, FRESH_DRAWS)

    @tf.function(reduce_retracing=True)
    def moved(image: tf.Tensor, label: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        if is_random:
            return AT_RANDOM.search_at_random(path, image, label, seed).best.image
        return StAdv()(lambda each: exact(each, seed), image, label, seed).image

    seed = seeds.per_example(subject.options.seed, _STREAM, tf.constant(chunk.index))
    size = subject.options.chunk_size
    size = max(1, size // FRESH_DRAWS) if is_random else size
    starts = range(0, len(chunk.label), size)
    given = (tf.constant(chunk.image), tf.constant(chunk.label), seed)
    return np.concatenate([moved(*(each[first : first + size] for each in given)).numpy() for first in starts])
