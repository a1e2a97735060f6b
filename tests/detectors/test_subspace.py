from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from kerasdefense.detectors import Head, MaxCosine, Subspace
from kerasdefense.types import InputError


def transcribed(training, label, embedding):
    """Return the angles with the first left singular vector of each class's columns, in float64."""
    embedding = np.float64(embedding)
    lengths = np.linalg.norm(embedding, axis=1) + 1e-4
    axes = [np.linalg.svd(np.float64(training[label == each]).T)[0][:, 0] for each in np.unique(label)]
    return np.min([np.arccos(np.minimum(np.abs(embedding @ axis) / lengths, 1)) for axis in axes], axis=0)


def axes_of(seed, size, classes):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=[size, classes]))[0]


def test_angle_matches_a_singular_value_decomposition(blobs):
    detector = Subspace().fit(blobs.activations, blobs.label)
    probe = np.random.default_rng(0).normal(size=[50, 6]) * 3
    expected = transcribed(blobs.embedding, blobs.label, probe)
    np.testing.assert_allclose(detector.score({"embedding": probe}), expected, atol=1e-3)
    stand_in = detector.stand_ins()["cosine"]({"embedding": probe})
    np.testing.assert_allclose(stand_in, -np.cos(expected), atol=1e-5)


def test_property_22_angle_is_near_0_on_class_axes_and_near_a_right_angle_in_random_directions():
    random, axes = np.random.default_rng(1), axes_of(0, 640, 4)
    label = np.arange(200) % 4
    sign = random.choice([-1, 1], size=[200, 1])

    def known():
        return sign * random.uniform(5, 20, [200, 1]) * axes.T[label] + 0.01 * random.normal(size=[200, 640])

    detector = Subspace().fit({"embedding": known()}, label)
    inside, outside = (
        detector.score({"embedding": each}).numpy() for each in (known(), random.normal(size=[200, 640]))
    )
    assert inside.max() < 0.1 and outside.min() > 1.4 and outside.max() <= np.pi / 2
    assert roc_auc_score(np.repeat([0, 1], 200), np.concatenate([inside, outside])) > 0.99


@given(st.integers(0, 2**32 - 1), st.sampled_from([-50.0, -1.0, 30.0]))
def test_property_22_angle_does_not_see_scale_and_sign(blobs, seed, scale):
    # The 1e-4 beside the length lets a scale through, which at these lengths is below the tolerance.
    detector = Subspace().fit(blobs.activations, blobs.label)
    scaled = Subspace().fit({"embedding": scale * blobs.embedding}, blobs.label)
    probe = 100 * np.random.default_rng(seed).normal(size=[8, 6])
    expected = detector.score({"embedding": probe})
    np.testing.assert_allclose(detector.score({"embedding": scale * probe}), expected, atol=2e-3)
    np.testing.assert_allclose(scaled.score({"embedding": probe}), expected, atol=2e-3)


def test_property_22_angle_does_not_see_the_sign_of_an_axis(blobs):
    detector = Subspace().fit(blobs.activations, blobs.label)
    expected = detector.score(blobs.activations)
    flipped = Subspace().restore({"axes": detector.state()["axes"] * [1, -1, -1, 1]})
    np.testing.assert_array_equal(flipped.score(blobs.activations), expected)


def test_angle_by_hand():
    detector = Subspace().restore({"axes": np.eye(3, 2)})
    probe = {"embedding": 1e3 * np.array([[1, 1, 0], [0, 0, 1], [1, 0, np.sqrt(3)], [0, -5, 0]])}
    np.testing.assert_allclose(detector.score(probe), [np.pi / 4, np.pi / 2, np.pi / 3, np.arccos(1 - 1e-6)], atol=1e-3)
    # The length counts 1e-4 more than it is.
    np.testing.assert_allclose(detector.score({"embedding": [[1e-4, 0, 0]]}), [np.pi / 3], atol=1e-5)


def test_class_without_an_axis_is_noted_and_never_nearest(blobs):
    embedding = np.where((blobs.label == 1)[:, np.newaxis], 0, blobs.embedding)
    keep = blobs.label != 3
    detector = Subspace().fit({"embedding": embedding[keep], "logits": np.zeros([keep.sum(), 4])}, blobs.label[keep])
    assert detector.notes == tuple(
        f"class {each}: no sample with an embedding other than zero, so it has no axis" for each in (1, 3)
    )
    assert detector.recorded() == {"classes": 2}
    there = np.isin(blobs.label, [0, 2])
    expected = transcribed(blobs.embedding[there], blobs.label[there], blobs.embedding)
    np.testing.assert_allclose(detector.score(blobs.activations), expected, atol=1e-3)


def test_embeddings_of_zero_have_a_right_angle_and_leave_nothing_to_fit_to(blobs):
    detector = Subspace().fit(blobs.activations, blobs.label)
    np.testing.assert_allclose(detector.score({"embedding": np.zeros([2, 6])}), np.pi / 2)
    with pytest.raises(InputError, match="every training embedding is zero, which leaves no axis"):
        Subspace().fit({"embedding": 0 * blobs.embedding}, blobs.label)


def test_max_cosine_by_hand():
    kernel = np.array([[2.0, 0], [0, 5], [0, 0]])
    detector = MaxCosine().fit({"embedding": np.ones([1, 3])}, np.array([0]), (kernel, None))
    probe = {"embedding": np.array([[3.0, 4, 0], [0, 0, 7], [-6, 0, 8], [0, 0, 0]])}
    np.testing.assert_allclose(detector.score(probe), [0.2, 1, 0.4, 1], atol=1e-6)


@given(st.integers(0, 2**32 - 1))
def test_property_22_angle_with_the_axes_of_the_head_ranks_exactly_as_the_cosine(seed):
    # At angles with an axis that float32 tells apart; the length counts 1e-4 more in one of the two.
    random, axes = np.random.default_rng(seed), axes_of(seed, 12, 5)
    axes, outside = axes[:, :4], axes[:, 4]
    angle = random.permutation(np.linspace(0.05, 1.5, 30))
    near = random.choice([-1, 1], size=[30, 1]) * axes.T[random.integers(4, size=30)]
    embedding = np.cos(angle)[:, np.newaxis] * near + np.sin(angle)[:, np.newaxis] * outside
    probe = {"embedding": random.uniform(100, 1000, [30, 1]) * embedding}
    uos = Subspace().restore({"axes": axes}).score(probe).numpy()
    cosine = MaxCosine().fit(probe, np.zeros(30, int), Head(axes, is_linear=False)).score(probe).numpy()
    np.testing.assert_allclose(uos, angle, atol=1e-3)
    np.testing.assert_array_equal(np.argsort(uos), np.argsort(cosine))
    np.testing.assert_array_equal(np.argsort(uos), np.argsort(angle))
