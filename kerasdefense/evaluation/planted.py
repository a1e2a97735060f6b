"""Adversarial points that are planted for an attack to find: a test of the attack, whatever the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Callable, Optional

import numpy as np
import tensorflow as tf
from sklearn.linear_model import LogisticRegression

from kerasdefense.attacks import PGD, norms, seeds
from kerasdefense.evaluation.probes import STREAM, Subject
from kerasdefense.evaluation.search import compiled
from kerasdefense.types import LossFn, SuccessFn

INNER, PLANTED_WITHIN, MARGIN_SHARE = 999, 0.95, 1.5
_PART = 256
"""Images passed at once."""


def planted_goals_found(subject: Subject, *, examples: int = 64) -> Optional[float]:
    """Return the share of planted adversarial points that PGD finds, or None where none could be planted.

    For each image a logistic probe on the features tells points well inside the ball from one on its sphere; the
    attack, run on the probe, must come to the sphere point's side.

    Source: Zimmermann et al. 2022, "Increasing confidence in adversarial robustness evaluations". Deviations: one
    boundary point; points are drawn uniformly.
    """
    chunk = subject.chunk.rows(np.arange(min(examples, len(subject.chunk.label))))
    features = subject.features or (lambda image: subject.attack_paths["exact"](image, _no_seed(image)))
    probes = _Probes(subject, features)
    found = {row: probes.fit(chunk.image[row], row) for row in range(len(chunk.label))}
    kept = [row for row, probe in found.items() if probe is not None]
    if not kept:
        return None
    kernels, biases = zip(*(found[row] for row in kept))
    context = {"kernel": tf.constant(kernels, tf.float32), "bias": tf.constant(biases, tf.float32)}
    image = tf.constant(chunk.image[kept])

    def side(image: tf.Tensor, context: Mapping[str, tf.Tensor]) -> tf.Tensor:
        flat = tf.reshape(features(image), [tf.shape(image)[0], -1])
        return tf.reduce_sum(flat * context["kernel"], axis=1) + context["bias"]

    def reached(image: tf.Tensor, context: Mapping[str, tf.Tensor]) -> tf.Tensor:
        return side(image, context) > 0

    seed = seeds.per_example(subject.options.seed, STREAM + 1, tf.constant(chunk.index[kept]))
    return float(np.mean(_found(subject.attack(PGD, steps=50, restarts=5), side, reached, image, context, seed)))


def _found(attack: Any, loss_fn: LossFn, success_fn: SuccessFn, *inputs: Any) -> np.ndarray:
    """Return where any restart of an attack succeeds, bool [n]; `inputs` are image, context and seed."""
    image, context, seed = inputs

    def step(state: Any, image: tf.Tensor, context: Any) -> Any:
        return attack.step(loss_fn, state, image, context, success_fn)

    start = compiled(attack.start, image, seed)
    compiled_step = compiled(step, start(image, seed), image, context)
    success = np.zeros(len(image), bool)
    for restart in range(attack.restarts):
        state = start(image, attack.restart_seed(seed, restart))
        for _ in range(attack.passes):
            state = compiled_step(state, image, context)
        success |= state.best.success.numpy()
    return success


class _Probes:
    """Logistic probes on features, one for each image."""

    def __init__(self, subject: Subject, features: Callable[[tf.Tensor], tf.Tensor]) -> None:
        self._seed = subject.options.seed
        self._threat_model = subject.threat_model
        self._points = tf.function(self._draw)
        self._features = tf.function(features, reduce_retracing=True)

    def _draw(self, image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Return points well inside the ball around an image [h, w, c], and behind them one on its sphere."""
        norm, epsilon = self._threat_model
        many = tf.repeat(image[None], INNER + 1, axis=0)
        inner = norms.random_point(many[1:], epsilon=PLANTED_WITHIN * epsilon, norm=norm, seed=seed[1:])
        planted = norms.random_point(many[:1], epsilon=epsilon, norm=norm, seed=seed[:1], on_sphere=True)
        return tf.concat([inner, planted], axis=0)

    def fit(self, image: np.ndarray, row: int) -> Optional[tuple[np.ndarray, float]]:
        """Return kernel [d] and bias of a probe with the planted point alone on its positive side, or None."""
        points = self._points(tf.constant(image), seeds.per_example(self._seed, STREAM + 2 + row, tf.range(INNER + 1)))
        parts = [self._features(points[first : first + _PART]) for first in range(0, INNER + 1, _PART)]
        found = np.reshape(np.concatenate([part.numpy() for part in parts]), [INNER + 1, -1]).astype(np.float64)
        centre, scale = found.mean(axis=0), found.std(axis=0) + 1e-9
        inputs, is_planted = (found - centre) / scale, np.arange(INNER + 1) == INNER
        model = LogisticRegression(C=1e5, class_weight="balanced", max_iter=1000).fit(inputs, is_planted)
        score = model.decision_function(inputs)
        highest = score[:-1].max()
        if score[-1] <= highest:
            return None
        # The boundary lies between the planted point and the inner one that comes closest, nearer to the planted one.
        boundary = highest + (score[-1] - highest) / MARGIN_SHARE
        kernel = model.coef_[0] / scale
        return kernel, float(model.intercept_[0] - kernel @ centre - boundary)


def _no_seed(image: tf.Tensor) -> tf.Tensor:
    return tf.zeros([tf.shape(image)[0], 2], tf.int32)
