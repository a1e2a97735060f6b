from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import tensorflow as tf
from sklearn.covariance import EmpiricalCovariance

from kerasdefense.detectors import ViM
from kerasdefense.detectors.vim import _rule
from kerasdefense.types import UsageError


def transcribed(blobs, components, embedding, logits):
    """Return alpha and the score as the paper's algorithm has them, in float64."""
    training, kernel = np.float64(blobs.embedding), np.float64(blobs.kernel)
    origin = -np.linalg.pinv(kernel.T) @ np.float64(blobs.bias)
    covariance = EmpiricalCovariance(assume_centered=True).fit(training - origin).covariance_
    values, vectors = np.linalg.eig(covariance)
    null = vectors[:, np.argsort(-values)[components:]]
    logit = (training @ kernel + blobs.bias).max(axis=1)
    alpha = logit.sum() / np.linalg.norm((training - origin) @ null, axis=1).sum()
    virtual = alpha * np.linalg.norm((np.float64(embedding) - origin) @ null, axis=1)
    return alpha, virtual - scipy.special.logsumexp(np.float64(logits), axis=1)


@pytest.mark.parametrize("components", [1, 3, 5])
def test_score_matches_numpy(blobs, components):
    detector = ViM(components).fit(blobs.activations, blobs.label, blobs.head)
    probe = np.random.default_rng(0).normal(size=[40, 6]).astype(np.float32) * 5
    logits = probe @ blobs.kernel + blobs.bias
    alpha, expected = transcribed(blobs, components, probe, logits)
    score = detector.score({"embedding": probe, "logits": logits})
    np.testing.assert_allclose(score, expected, rtol=1e-4, atol=1e-3)
    assert detector.recorded() == {"components": components, "alpha": pytest.approx(alpha, rel=1e-5)}
    assert detector.notes == ()


def test_residual_is_zero_and_its_gradient_finite_inside_the_principal_space(blobs):
    # evaluation 13: ViM residual zero for h-u inside the principal subspace.
    detector = ViM(3).fit(blobs.activations, blobs.label, blobs.head)
    state = detector.state()
    inside = np.linalg.svd(state["residual"])[0][:, 3:].T
    embedding = tf.constant(state["origin"] + np.concatenate([3 * inside, 0 * inside[:1]]), tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(embedding)
        score = detector.score({"embedding": embedding, "logits": tf.zeros([4, 4])})
    np.testing.assert_allclose(score, -np.log(4), atol=1e-4)
    assert np.isfinite(tape.gradient(score, embedding)).all()
    outside = state["origin"] + 2 * state["residual"][:, 0]
    score = detector.score({"embedding": outside[np.newaxis], "logits": np.zeros([1, 4])})
    np.testing.assert_allclose(score, [2 * state["scale"] - np.log(4)], rtol=1e-4)


def test_components_by_rule():
    # Wang et al. 2022 and its authors' code: 1000 from 2048, 512 from 768, else half.
    sizes = {4096: 1000, 2048: 1000, 2047: 512, 768: 512, 767: 383, 6: 3, 1: 0}
    assert {size: _rule(size) for size in sizes} == sizes


def test_default_takes_the_rule(blobs):
    by_rule, explicit = (ViM(count).fit(blobs.activations, blobs.label, blobs.head) for count in (0, 3))
    assert by_rule.recorded() == explicit.recorded() and by_rule.recorded()["components"] == 3
    assert by_rule.get_config() == {"components": 0}


@pytest.mark.parametrize("components", [6, 7])
def test_as_many_components_as_features_are_refused(blobs, components):
    with pytest.raises(
        UsageError, match=f"components of vim must be below the 6 .* of the embedding, not {components}"
    ):
        ViM(components).fit(blobs.activations, blobs.label, blobs.head)


def test_negative_components_are_refused():
    with pytest.raises(UsageError, match="components of vim must be at least 0, not -1"):
        ViM(-1)


def test_embeddings_without_residual_are_refused(blobs):
    flat = blobs.embedding.copy()
    flat[:, 3:] = 0
    with pytest.raises(UsageError, match="nothing outside 3 components; set vim fewer"):
        ViM(3).fit({**blobs.activations, "embedding": flat}, blobs.label, (blobs.kernel, None))


def test_negative_mean_logit_is_taken_by_its_size_and_noted(blobs):
    logits = blobs.activations["logits"]
    mean = logits.max(axis=1).mean()
    positive = ViM(3).fit(blobs.activations, blobs.label, blobs.head)
    below = {**blobs.activations, "logits": logits - 2 * mean}
    negative = ViM(3).fit(below, blobs.label, blobs.head)
    (note,) = negative.notes
    assert note.startswith("the mean largest logit is -") and "absolute value" in note
    assert negative.recorded()["alpha"] == pytest.approx(positive.recorded()["alpha"], rel=1e-4)
