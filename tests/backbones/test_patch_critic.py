"""The patch critic: the acceptance properties of AToP's specification, sizes, replicas, errors."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import losses
from kerasdefense.backbones import build_purifier, patch_critic
from kerasdefense.layers import SpectralConv2D
from kerasdefense.training import mirrored
from kerasdefense.types import UsageError

SHAPE = (16, 16, 1)


def inputs(image_shape, batch=4):
    random = np.random.default_rng(0)
    image = random.uniform(size=(batch, *image_shape)).astype(np.float32)
    return [tf.constant(image), tf.cast(random.uniform(size=(batch, *image_shape[:2], 1)) < 0.25, tf.float32)]


def built(image_shape=SHAPE, width=2):
    keras.utils.set_random_seed(0)
    return patch_critic(image_shape, width=width)


def convolutions(critic):
    return [each for each in critic.layers if isinstance(each, SpectralConv2D)]


@pytest.fixture(scope="module")
def critic():
    return built()


# AToP P3: spectral norms after warm-up
def test_kernels_have_a_spectral_norm_of_one_after_warm_up(critic):
    before = [layer.kernel.numpy() for layer in convolutions(critic)]
    given = inputs(SHAPE, batch=1)
    for _ in range(40):
        critic(given, training=True)
    for layer, kernel in zip(convolutions(critic), before):
        used = np.reshape(layer.divided(layer.kernel), [-1, layer.filters])
        assert 0.99 <= np.linalg.svd(used, compute_uv=False).max() <= 1.01
        np.testing.assert_array_equal(layer.kernel, kernel)


# AToP P3: inference changes nothing, training the vectors of all layers alone
def test_only_training_turns_the_vectors():
    critic = built()
    before = critic.get_weights()
    critic(inputs(SHAPE), training=False)
    for one, two in zip(before, critic.get_weights()):
        np.testing.assert_array_equal(one, two)
    critic(inputs(SHAPE), training=True)
    changed = {each.name for each, one in zip(critic.weights, before) if np.abs(each - one).max() > 1e-6}
    assert changed == {layer.u.name for layer in convolutions(critic)}


def test_two_replicas_judge_as_one_does():
    strategy, one = mirrored(("/device:CPU:0", "/device:CPU:1")), built()
    with strategy.scope():
        two = built()
    given = inputs(SHAPE)
    parts = [
        strategy.experimental_distribute_values_from_function(
            lambda context, each=each: tf.split(each, 2)[context.replica_id_in_sync_group]
        )
        for each in given
    ]
    forward = tf.function(lambda *each: strategy.run(lambda *part: two(list(part), training=True), each))
    for _ in range(2):
        found = np.concatenate(strategy.experimental_local_results(forward(*parts)))
        np.testing.assert_allclose(found, one(given, training=True), atol=1e-6)
    for found, expected in zip(two.get_weights(), one.get_weights()):
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("image_shape", "layers", "places"),
    [
        ((8, 8, 1), 2, 2 * 2 * 4),
        ((9, 13, 2), 3, 2 * 2 * 8),
        ((32, 32, 3), 4, 2 * 2 * 8),
        ((64, 64, 1), 5, 2 * 2 * 8),
        ((65, 65, 1), 6, 2 * 2 * 8),
        ((256, 128, 3), 6, 4 * 2 * 8),
    ],
)
def test_sides_are_halved_to_two_places_or_six_times(image_shape, layers, places):
    critic = patch_critic(image_shape, width=2)
    assert [layer.filters for layer in convolutions(critic)] == [2, 4, 8, 8, 8, 8][:layers]
    assert critic.output_shape == (None, places) and critic.input_names == ["image", "mask"]


def test_parameters_are_those_of_the_specification():
    sizes = [(4, 64), (64, 128), (128, 256), (256, 256), (256, 256), (256, 256)]
    expected = sum(25 * before * after + after for before, after in sizes)
    critic = patch_critic((128, 128, 3))
    assert sum(int(np.prod(each.shape)) for each in critic.trainable_variables) == expected


def test_judgements_depend_on_the_mask_and_may_have_either_sign(critic):
    image, mask = inputs(SHAPE)
    judged = critic([image, mask]).numpy()
    assert judged.dtype == np.float32 and judged.min() < 0 < judged.max()
    assert np.abs(critic([image, 1 - mask]) - judged).max() > 1e-3


# AToP S4: the adversarial loss reaches the purifier's weights
def test_adversarial_loss_trains_the_purifier(critic):
    purifier, (image, mask) = build_purifier("gated_unet", SHAPE, width=3), inputs(SHAPE)
    with tf.GradientTape() as tape:
        restored = purifier([image, mask])["refined"]
        loss = tf.reduce_mean(losses.hinge_adversarial_loss(critic([restored, mask])))
    gradients = tape.gradient(loss, purifier.trainable_variables)
    assert all(np.abs(each).max() > 0 for each in gradients)


def test_critic_learns_to_tell_true_from_restored_images():
    critic, (image, mask) = built((8, 8, 1)), inputs((8, 8, 1), batch=8)
    optimizer, fake = keras.optimizers.Adam(0.05, beta_1=0.5), 0.2 * image

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            judged = critic([image, mask], training=True), critic([fake, mask], training=True)
            loss = tf.reduce_mean(losses.hinge_critic_loss(*judged))
        optimizer.minimize(loss, critic.trainable_variables, tape)
        return loss

    found = [float(step()) for _ in range(30)]
    assert found[-1] < found[0] - 0.1


def test_critic_is_saved_whole(critic, tmp_path):
    critic.save(tmp_path / "critic.keras")
    loaded = keras.models.load_model(tmp_path / "critic.keras")
    np.testing.assert_array_equal(loaded(inputs(SHAPE)), critic(inputs(SHAPE)))


@pytest.mark.parametrize(
    ("image_shape", "width", "message"),
    [
        (SHAPE, 0, "the width of a critic must be at least 1, not 0"),
        ((8, 7, 1), 2, r"with sides of at least 8 pixels for a patch critic, not \(8, 7, 1\)"),
        ((8, 8), 2, r"image_shape must be \(height, width, channels\)"),
        ((None, None, 3), 2, r"not \(None, None, 3\)"),
    ],
)
def test_critic_refuses(image_shape, width, message):
    with pytest.raises(UsageError, match=message):
        patch_critic(image_shape, width=width)
