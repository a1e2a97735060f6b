"""How compact an embedding is: embeddings made by hand, and what figures must not depend on."""

import numpy as np
import pytest

from kerasdefense.evaluation import geometry
from kerasdefense.evaluation.geometry import closeness, directions, participation, participation_ratio

HALF, ROOT = 0.5, np.sqrt(0.5)
EMBEDDING = np.array([[1, 0, 0], [-1, 0, 0], [HALF, np.sqrt(0.75), 0], [0, 3, 0], [0, 5, 5]])
LABEL = np.array([0, 0, 0, 1, 1])


def random_embeddings(count=40, dimensions=6, classes=4):
    random = np.random.default_rng(1)
    return random.standard_normal((count, dimensions)), random.integers(classes, size=count)


def test_closeness_of_embeddings_made_by_hand():
    found = closeness(EMBEDDING, LABEL)
    far, near = np.sqrt(0.75), np.sqrt(0.75) * ROOT  # of the third image to the two of the other class
    np.testing.assert_allclose(found["intra_class_cosine"], [0.75, 0.75, HALF, ROOT, ROOT])
    np.testing.assert_allclose(found["inter_class_cosine"], [0, 0, (far + near) / 2, far / 3, near / 3], atol=1e-12)
    np.testing.assert_allclose(found["nearest_other_class"], [1, 1, 1 - far, 1 - far, 1 - near])


def test_closeness_depends_on_neither_length_nor_sign():
    embedding, label = random_embeddings()
    scale = np.random.default_rng(2).uniform(0.1, 9, len(label)) * np.where(np.arange(len(label)) % 3, 1, -1)
    expected = closeness(embedding, label)
    for name, values in closeness(embedding * scale[:, None], label).items():
        np.testing.assert_allclose(values, expected[name], atol=1e-12)
    assert not np.allclose(closeness(embedding + 1, label)["inter_class_cosine"], expected["inter_class_cosine"])


def test_closeness_is_the_same_by_blocks(monkeypatch):
    expected = closeness(*random_embeddings())
    monkeypatch.setattr(geometry, "_ROWS", 7)
    for name, values in closeness(*random_embeddings()).items():
        np.testing.assert_allclose(values, expected[name])


def test_closeness_without_others_to_be_close_to():
    found = closeness(EMBEDDING, np.array([0, 0, 0, 0, 1]))
    np.testing.assert_array_equal(np.isnan(found["intra_class_cosine"]), [False] * 4 + [True])
    assert not np.isnan(found["nearest_other_class"]).any()
    assert set(closeness(EMBEDDING, np.zeros(5, int))) == {"intra_class_cosine"}
    assert set(closeness(EMBEDDING, np.arange(5))) == {"inter_class_cosine", "nearest_other_class"}


def test_embedding_of_zero_has_no_direction_and_no_cosine():
    embedding = np.array([[0, 0], [0, 2], [0, 4]], np.float32)
    np.testing.assert_array_equal(directions(embedding), [[0, 0], [0, 1], [0, 1]])
    found = closeness(embedding, np.array([0, 0, 1]))
    np.testing.assert_array_equal(found["intra_class_cosine"], [0, 0, np.nan])
    np.testing.assert_array_equal(found["nearest_other_class"], [1, 0, 0])


@pytest.mark.parametrize("extra", [0, 20])
def test_participation_ratio_of_orthonormal_directions_is_their_number(extra):
    directions_alike = np.concatenate([np.eye(5, 5 + extra), -np.eye(5, 5 + extra)])
    assert participation_ratio(directions_alike) == pytest.approx(5)
    assert participation_ratio(np.eye(5, 5 + extra)) == pytest.approx(4)  # the mean takes one away


def test_participation_ratio_is_that_of_the_eigenvalues_of_the_covariance():
    embedding, _ = random_embeddings()
    spectrum = np.linalg.eigvalsh(np.cov(directions(embedding), rowvar=False))
    expected = spectrum.sum() ** 2 / np.square(spectrum).sum()
    assert 1 < expected < 6 and participation_ratio(directions(embedding)) == pytest.approx(expected)


def test_participation_ratio_without_spread_is_zero():
    assert participation_ratio(directions(np.full([7, 3], 0.1, np.float32))) == 0
    assert participation_ratio(np.array([[1.0, 0], [0, 1]])) == pytest.approx(1)


def test_participation_depends_on_neither_length_nor_the_sign_of_all():
    embedding, label = random_embeddings()
    scale = -np.random.default_rng(2).uniform(0.1, 9, len(label))
    expected = participation(embedding, label, seed=4)
    for name, figure in participation(embedding * scale[:, None], label, seed=4).items():
        assert figure["value"] == pytest.approx(expected[name]["value"])
        assert figure["ci95"] == pytest.approx(expected[name]["ci95"])


def test_class_participation_is_the_mean_over_classes_of_at_least_two():
    # A class on three axes, one on a line, and an image alone.
    embedding = np.concatenate([np.eye(4)[:3], -np.eye(4)[:3], np.eye(4)[3:], -np.eye(4)[3:], np.ones([1, 4])])
    found = participation(embedding, np.array([0] * 6 + [1] * 2 + [2]))["class_participation_ratio"]
    assert found["value"] == pytest.approx((3 + 1) / 2) and found["n"] == 8
    assert set(participation(embedding, np.arange(9))) == {"participation_ratio"}
    assert participation(embedding[:1], np.zeros(1, int)) == {}


def test_interval_is_the_spread_of_the_ratio_over_samples():
    random = np.random.default_rng(3)
    samples = random.standard_normal((60, 80, 6)) * [3, 2, 1, 1, 1, 1]
    spread = np.std([participation_ratio(directions(each)) for each in samples], ddof=1)
    found = participation(samples[0], np.zeros(80, int), seed=0)["participation_ratio"]
    low, high = found["ci95"]
    assert found["value"] == pytest.approx((low + high) / 2) and found["resamples"] == geometry.RESAMPLES
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.35)
    assert participation(samples[0], np.zeros(80, int), seed=0)["participation_ratio"] == found
