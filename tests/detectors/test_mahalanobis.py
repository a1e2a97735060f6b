from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kerasdefense.detectors import Mahalanobis, RelativeMahalanobis
from kerasdefense.types import InputError, UsageError


def by_inverse(training, label, embedding, relative=False):
    """Return the score by a direct inverse in float64."""
    training, embedding = np.float64(training), np.float64(embedding)
    means = np.stack([training[label == each].mean(axis=0) for each in np.unique(label)])
    place = np.searchsorted(np.unique(label), label)
    inverse = np.linalg.inv((training - means[place]).T @ (training - means[place]) / len(label))
    score = np.min([np.einsum("ni,ij,nj->n", embedding - mean, inverse, embedding - mean) for mean in means], axis=0)
    if relative:
        inverse, from_mean = np.linalg.inv(np.cov(training.T, bias=True)), embedding - training.mean(axis=0)
        score = score - np.einsum("ni,ij,nj->n", from_mean, inverse, from_mean)
    return score


@pytest.mark.parametrize("kind, relative", [(Mahalanobis, False), (RelativeMahalanobis, True)])
@pytest.mark.parametrize("offset, stretch", [(0.0, 1.0), (100.0, 1.0), (0.0, 30.0)])
def test_distance_matches_a_direct_inverse(blobs, kind, relative, offset, stretch):
    scale = np.geomspace(1, stretch, 6).astype(np.float32)
    training = blobs.embedding * scale + np.float32(offset)
    probe = np.concatenate([training[:20], 5 * training[:20] - 3])
    detector = kind().fit({"embedding": training}, blobs.label)
    score = detector.score({"embedding": probe})
    np.testing.assert_allclose(score, by_inverse(training, blobs.label, probe, relative), rtol=2e-3, atol=2e-3)


def test_distance_is_least_and_zero_at_a_class_mean(blobs):
    # evaluation 13: MDS maximal (here: minimal) at a class mean.
    detector = Mahalanobis().fit(blobs.activations, blobs.label)
    means = np.stack([np.float64(blobs.embedding)[blobs.label == each].mean(axis=0) for each in range(4)])
    np.testing.assert_allclose(detector.score({"embedding": means}), 0, atol=1e-8)
    assert (detector.score(blobs.activations).numpy() > 1e-4).all()


@given(st.integers(0, 2**32 - 1))
def test_distance_is_that_of_linearly_mapped_embeddings(blobs, seed):
    # evaluation 13: MDS invariant to an invertible linear map of features.
    random = np.random.default_rng(seed)
    rotations = [np.linalg.qr(random.normal(size=[6, 6]))[0] for _ in range(2)]
    mapping = rotations[0] @ np.diag(random.uniform(0.2, 2, 6)) @ rotations[1]
    mapped = np.float64(blobs.embedding) @ mapping + random.normal(size=6)
    for kind in (Mahalanobis, RelativeMahalanobis):
        plain = kind().fit(blobs.activations, blobs.label).score(blobs.activations)
        other = kind().fit({"embedding": mapped}, blobs.label).score({"embedding": mapped})
        np.testing.assert_allclose(other, plain, rtol=1e-3, atol=1e-3)


def test_distance_by_hand():
    # Two classes about -2 and 2 with variance 1 on the first axis and 4 on the second.
    corners = np.array([[1.0, 2], [1, -2], [-1, 2], [-1, -2]])
    embedding = np.concatenate([corners - [2, 0], corners + [2, 0]])
    label = np.repeat([0, 1], 4)
    probe = {"embedding": np.array([[2.0, 0], [2, 2], [0, 0], [-5, 4]])}
    distance = Mahalanobis().fit({"embedding": embedding}, label).score(probe)
    np.testing.assert_allclose(distance, [0, 1, 4, 9 + 4], atol=1e-5)
    # All together: variance 1 + 4 on the first axis.
    relative = RelativeMahalanobis().fit({"embedding": embedding}, label).score(probe)
    np.testing.assert_allclose(relative, np.array([0, 1, 4, 13]) - [4 / 5, 4 / 5 + 1, 0, 5 + 4], atol=1e-5)


def test_floor_bounds_the_weight_of_a_direction_without_variance():
    random = np.random.default_rng(0)
    embedding = np.concatenate([random.normal(size=[50, 2]), np.zeros([50, 1])], axis=1)
    label = np.repeat([0, 1], 25)
    for floor in (1e-2, 1e-4):
        detector = Mahalanobis(floor).fit({"embedding": embedding}, label)
        centred = embedding - np.stack([embedding[label == each].mean(axis=0) for each in (0, 1)])[label]
        largest = np.linalg.eigvalsh(centred.T @ centred / 50)[-1]
        mean = embedding[label == 0].mean(axis=0)
        np.testing.assert_allclose(
            detector.score({"embedding": [mean + [0, 0, 1]]}), [1 / (floor * largest)], rtol=1e-3
        )


def test_class_without_samples_is_left_out_and_noted(blobs):
    keep = blobs.label != 2
    activations = {key: array[keep] for key, array in blobs.activations.items()}
    detector = Mahalanobis().fit(activations, blobs.label[keep])
    assert detector.notes == ("class 2: no sample, so no distance is taken to it",)
    assert detector.recorded() == {"floor": 1e-6, "classes": 3}
    expected = by_inverse(activations["embedding"], blobs.label[keep], blobs.embedding)
    np.testing.assert_allclose(detector.score(blobs.activations), expected, rtol=1e-3, atol=1e-3)
    assert detector.restore(detector.state(), notes=detector.notes).notes == detector.notes
    assert detector.fit(blobs.activations, blobs.label).notes == ()


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_classes_of_one_point_each_are_refused(offset):
    embedding = offset + np.random.default_rng(0).normal(size=[3, 5])[[0, 0, 1, 2, 2]]
    with pytest.raises(InputError, match="leaves no covariance to fit; give more images"):
        Mahalanobis().fit({"embedding": embedding}, np.array([0, 0, 1, 2, 2]))


@pytest.mark.parametrize("floor", [0, 1, -1])
def test_floor_is_checked(floor):
    with pytest.raises(UsageError, match=f"floor must be between 0 and 1, not {floor}"):
        RelativeMahalanobis(floor)
