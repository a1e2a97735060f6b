from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from kerasdefense.detectors import KNN
from kerasdefense.detectors.knn import balanced_draw
from kerasdefense.types import UsageError


def unit(embedding):
    return np.float64(embedding) / np.linalg.norm(np.float64(embedding), axis=1, keepdims=True)


@pytest.mark.parametrize("k", [1, 5, 200])
def test_score_and_stand_in_match_sklearn(blobs, k):
    detector = KNN(k=k, bank=5000).fit(blobs.activations, blobs.label)
    probe = np.random.default_rng(0).normal(size=[30, 6]) * 4
    distance = NearestNeighbors(n_neighbors=k).fit(unit(blobs.embedding)).kneighbors(unit(probe))[0]
    np.testing.assert_allclose(detector.score({"embedding": probe}), distance[:, -1] ** 2, rtol=1e-4, atol=1e-6)
    mean = detector.stand_ins()["mean_distance"]({"embedding": probe})
    np.testing.assert_allclose(mean, np.mean(distance**2, axis=1), rtol=1e-4, atol=1e-6)


def test_score_by_hand():
    embedding = np.array([[2.0, 0], [0, 3], [-1, 0]])
    detector = KNN(k=2).fit({"embedding": embedding}, np.array([0, 1, 1]))
    probe = {"embedding": np.array([[5.0, 0], [1, 1], [-2, 2]])}
    root = np.sqrt(2)
    np.testing.assert_allclose(detector.score(probe), [2, 2 - root, 2 - root], atol=1e-6)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 0.5, 1e3]))
def test_score_does_not_see_the_scale_of_an_embedding(blobs, seed, scale):
    # evaluation 13: KNN invariant to feature scale.
    probe = np.random.default_rng(seed).normal(size=[8, 6])
    detector = KNN(k=3).fit(blobs.activations, blobs.label)
    scaled = KNN(k=3).fit({"embedding": scale * blobs.embedding}, blobs.label)
    expected = detector.score({"embedding": probe})
    np.testing.assert_allclose(scaled.score({"embedding": probe}), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(detector.score({"embedding": scale * probe}), expected, rtol=1e-4, atol=1e-6)


def test_score_keeps_its_digits_close_to_a_neighbour(blobs):
    detector = KNN(k=1).fit(blobs.activations, blobs.label)
    tangent = np.cross(unit(blobs.embedding)[:1, :3], [[0.0, 0, 1]])
    probe = unit(blobs.embedding)[:1] + 1e-4 * np.pad(tangent, [(0, 0), (0, 3)]) / np.linalg.norm(tangent)
    np.testing.assert_allclose(detector.score({"embedding": probe}), [1e-8], rtol=0.01)


def test_score_of_the_zero_embedding_is_one(blobs):
    detector = KNN(k=3).fit(blobs.activations, blobs.label)
    np.testing.assert_allclose(detector.score({"embedding": np.zeros([1, 6])}), [1], rtol=1e-6)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 50), st.integers(0, 3))
def test_draw_is_as_balanced_as_the_classes_allow(label, count, seed):
    label = np.array(label)
    drawn = balanced_draw(label, count, seed)
    assert len(drawn) == len(set(drawn)) == min(count, len(label))
    assert (np.diff(drawn) > 0).all()
    taken, there = np.bincount(label[drawn], minlength=5), np.bincount(label, minlength=5)
    most = taken.max()
    assert (taken[taken < most - 1] == there[taken < most - 1]).all()


def test_draw_depends_on_the_seed_alone():
    label = np.arange(100) % 5
    np.testing.assert_array_equal(balanced_draw(label, 20, 1), balanced_draw(label, 20, 1))
    assert not np.array_equal(balanced_draw(label, 20, 1), balanced_draw(label, 20, 2))


def test_draw_takes_all_where_there_are_no_more():
    np.testing.assert_array_equal(balanced_draw(np.array([1, 0, 1]), 3, 0), [0, 1, 2])


def test_bank_holds_the_drawn_images_and_is_recorded(blobs):
    detector = KNN(bank=40, k=2, seed=5)
    assert detector.recorded() == {"bank": 40, "k": 2, "seed": 5}
    detector.fit(blobs.activations, blobs.label)
    expected = unit(blobs.embedding)[balanced_draw(blobs.label, 40, 5)]
    np.testing.assert_allclose(detector.state()["neighbours"], expected, rtol=1e-6)
    assert detector.recorded() == {"bank": 40, "k": 2, "seed": 5}
    assert KNN().fit(blobs.activations, blobs.label).recorded() == {"bank": 200, "k": 50, "seed": 0}
    assert KNN().get_config() == {"bank": 5000, "k": 50, "seed": 0}


@pytest.mark.parametrize("settings", [{"k": 0}, {"k": 11, "bank": 10}, {"seed": -1}])
def test_settings_are_checked(settings):
    with pytest.raises(UsageError, match="of knn must be at least"):
        KNN(**settings)


def test_k_beyond_the_training_images_is_refused(blobs):
    with pytest.raises(UsageError, match="k of knn must be at most the 3 training images, not 4"):
        KNN(k=4).fit({"embedding": blobs.embedding[:3]}, blobs.label[:3])
