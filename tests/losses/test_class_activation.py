"""Class activation features and how far apart they are, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from kerasdefense import backbones, losses
from kerasdefense.types import UsageError

CHANNELS, CLASSES, BATCH, SIDE = 5, 4, 3, 2
KERNEL = np.random.default_rng(9).normal(size=(CHANNELS, CLASSES)).astype(np.float32)
seeds = st.integers(0, 2**32 - 1)


def draw(seed):
    """Return features as after a ReLU, and logits."""
    random = np.random.default_rng(seed)
    features = np.maximum(random.normal(size=(BATCH, SIDE, SIDE, CHANNELS)), 0).astype(np.float32)
    return features, random.normal(size=(BATCH, CLASSES)).astype(np.float32)


def terms(denoised, clean, **settings):
    found = losses.class_activation_terms(denoised, clean, tf.constant(KERNEL), **settings)
    return {name: term.numpy() for name, term in found.items()}


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


# CAFD 1: an exact decomposition of the winning logit, and of the class activation map
def test_features_make_the_winning_logit_and_the_class_activation_map():
    model = backbones.small_cnn((8, 8, 1), CLASSES, width=2)
    head = model.get_layer("logits")
    head.bias.assign(np.linspace(-1, 1, CLASSES))
    image = np.random.default_rng(0).uniform(size=(BATCH, 8, 8, 1)).astype(np.float32)
    outputs = model(image, training=False)
    found = losses.class_activation_features(outputs["feature_map"], outputs["logits"], head.kernel).numpy()
    logits, winner = outputs["logits"].numpy(), np.argmax(outputs["logits"], axis=1)
    np.testing.assert_allclose(
        found.mean(axis=(1, 2)).sum(axis=1) + head.bias.numpy()[winner], logits.max(axis=1), atol=1e-5
    )
    maps = np.einsum("bhwc,cb->bhw", outputs["feature_map"], head.kernel.numpy()[:, winner])
    np.testing.assert_allclose(found.sum(axis=-1), maps, atol=1e-5)


# CAFD 2: of the predicted class, place by place and channel by channel
@given(seeds)
def test_features_are_weighted_by_the_class_that_each_image_is_predicted_to_be_of(seed):
    features, logits = draw(seed)
    found = losses.class_activation_features(features, logits, KERNEL)
    assert found.shape == (BATCH, SIDE, SIDE, CHANNELS) and found.dtype == tf.float32
    for row in range(BATCH):
        np.testing.assert_allclose(found[row], features[row] * KERNEL[:, logits[row].argmax()], rtol=1e-6)


# CAFD 7: zero of equal images, else above
@given(seeds, st.sampled_from(losses.class_activation.WEIGHT_TERMS))
def test_terms_are_zero_of_equal_images_and_at_least_zero_of_others(seed, weight_term):
    one, two = draw(seed), draw(seed + 1)
    for each in terms(one, one, weight_term=weight_term).values():
        np.testing.assert_array_equal(each, np.zeros(BATCH))
    found = terms(one, two, weight_term=weight_term)
    assert (found["feature_loss"] > 0).all() and all((each >= 0).all() for each in found.values())


# CAFD 7: the term of the features is symmetric, and weights of 0 leave nothing
@given(seeds)
def test_feature_term_is_symmetric_and_weights_of_zero_leave_nothing(seed):
    one, two = draw(seed), draw(seed + 1)
    back, forth = terms(one, two)["feature_loss"], terms(two, one)["feature_loss"]
    np.testing.assert_allclose(back, forth, rtol=1e-6)
    for weight_term in losses.class_activation.WEIGHT_TERMS:
        for each in terms(one, two, weight_term=weight_term, lam_f=0.0, lam_w=0.0).values():
            np.testing.assert_array_equal(each, np.zeros(BATCH))


@given(seeds, st.sampled_from([0.5, 1.0, 3.0]))
def test_terms_match_numpy(seed, temperature):
    one, two = draw(seed), draw(seed + 1)
    feature = 2 * ((one[0] - two[0]) ** 2).mean(axis=(1, 2, 3))
    soft, aim = (softmax(each[1] / temperature) @ KERNEL.T for each in (one, two))
    hard, goal = (KERNEL[:, each[1].argmax(axis=1)].T for each in (one, two))
    settings = {"lam_f": 2.0, "lam_w": 3.0, "temperature": temperature}
    for weight_term, weights, target in (("soft", soft, aim), ("hard", hard, goal)):
        found = terms(one, two, weight_term=weight_term, **settings)
        np.testing.assert_allclose(found["feature_loss"], feature, rtol=1e-5)
        np.testing.assert_allclose(found["weight_loss"], 3 * ((weights - target) ** 2).mean(axis=1), atol=1e-5)
    joint = 2 * ((one[0] - two[0]) * goal[:, None, None, :]) ** 2
    found = terms(one, two, weight_term="joint", **settings)
    assert list(found) == ["feature_loss"]
    np.testing.assert_allclose(found["feature_loss"], joint.mean(axis=(1, 2, 3)), rtol=1e-5)


# CAFD 8: hard weights have no gradient, soft ones do
@pytest.mark.parametrize("weight_term", ["hard", "soft"])
def test_weights_have_a_gradient_where_they_are_soft(weight_term):
    (features, logits), clean = map(tf.constant, draw(1)), draw(2)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        found = losses.class_activation_terms((features, logits), clean, KERNEL, weight_term=weight_term)
    gradient = tape.gradient(found["weight_loss"], logits)
    assert np.max(found["weight_loss"]) > 0
    if weight_term == "hard":
        assert gradient is None
    else:
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


# CAFD 8: as the temperature falls, soft weights become hard
def test_soft_weights_become_hard_as_the_temperature_falls():
    _, logits = draw(3)
    hard = losses.winning_weights(logits, KERNEL).numpy()
    distance = [np.abs(losses.soft_weights(logits, KERNEL, temperature=each) - hard).max() for each in (1.0, 0.1, 1e-3)]
    assert distance[0] > 0.1 > distance[1] > 1e-5 > distance[2]


def test_no_gradient_flows_to_the_clean_images():
    one, two = ([tf.constant(each) for each in draw(seed)] for seed in (1, 2))
    for weight_term in losses.class_activation.WEIGHT_TERMS:
        with tf.GradientTape() as tape:
            tape.watch([one, two])
            found = losses.class_activation_terms(tuple(one), tuple(two), KERNEL, weight_term=weight_term)
            total = tf.add_n(list(found.values()))
        to_denoised, to_clean = tape.gradient(total, [one, two])
        assert to_clean == [None, None] and np.abs(to_denoised[0]).max() > 0


def test_features_in_float16_are_compared_in_float32():
    features, logits = draw(4)
    found = losses.class_activation_features(tf.constant(1e3 * features, tf.float16), logits, 100 * KERNEL)
    assert found.dtype == tf.float32 and np.isfinite(found).all() and np.max(found) > 65504


def test_features_of_an_output_that_the_kernel_does_not_weight_are_a_map_of_one_place():
    features, logits = draw(5)
    embedding = np.float32([[1, 2, 3, 4, 5]])
    activations = {"feature_map": features[:1], "embedding": embedding, "logits": logits[:1]}
    np.testing.assert_array_equal(losses.features_of(activations, KERNEL), features[:1])
    for others in ({**activations, "feature_map": features[:1, ..., :3]}, {"embedding": embedding}):
        np.testing.assert_array_equal(losses.features_of(others, KERNEL), embedding[:, None, None, :])


def test_released_maps_are_rectified_scaled_by_the_batch_and_resized():
    features = np.float32([[[[-4, 1]]], [[[2, 4]]]])
    found = losses.released_maps(tf.constant(features), (2, 3))
    assert found.shape == (2, 2, 3, 2)
    np.testing.assert_allclose(found, np.broadcast_to(np.float32([[[[0, 0.25]]], [[[0.5, 1]]]]), (2, 2, 3, 2)))


def test_squared_distance_sums_over_each_example():
    found = losses.squared_distance(np.float32([[[1, 2]], [[0, 3]]]), np.float32([[[1, 0]], [[1, 1]]]))
    np.testing.assert_array_equal(found, [4, 5])


def test_unknown_term_of_the_weights_is_refused():
    with pytest.raises(UsageError, match=r"^weight_term must be one of soft, hard, joint, not 'firm'$"):
        terms(draw(0), draw(1), weight_term="firm")
