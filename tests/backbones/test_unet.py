"""The denoiser, the purifier that it makes, and the critic: sizes, shapes, initial values, errors."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense.backbones import critic, purifier, residual_unet
from kerasdefense.types import UsageError

SHAPE = (8, 8, 1)


def random_image(image_shape, batch=3):
    return np.random.default_rng(0).uniform(size=(batch, *image_shape)).astype(np.float32)


def trainable_parameters(model):
    return sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)


def stirred(denoiser):
    """Return a denoiser that is no longer the identity."""
    kernel = denoiser.get_layer("residual").kernel
    kernel.assign(np.random.default_rng(1).normal(size=kernel.shape))
    return denoiser


def sides(model, names):
    return [model.get_layer(name).output_shape[1] for name in names]


# CAFD 12: as many parameters as the authors' networks
@pytest.mark.parametrize("legacy_stride", [False, True])
def test_parameters_of_the_denoiser_are_the_published_ones(legacy_stride):
    assert trainable_parameters(residual_unet((32, 32, 3), legacy_stride=legacy_stride)) == 11_038_851


# CAFD 12: and of their critic
def test_parameters_of_the_critic_are_the_published_ones():
    assert trainable_parameters(critic((32, 32, 3))) == 899_465


# CAFD 10: the denoiser starts as the identity
def test_denoiser_gives_zero_until_it_is_trained():
    denoiser, image = residual_unet(SHAPE, width=2), random_image(SHAPE)
    for training in (False, True):
        np.testing.assert_array_equal(denoiser(image, training=training), np.zeros_like(image))
    np.testing.assert_array_equal(purifier(denoiser)(image), image)
    assert np.abs(stirred(denoiser)(image)).max() > 0.1


# CAFD 11: images of any size
@pytest.mark.parametrize(
    ("image_shape", "legacy_stride"),
    [((32, 32, 3), False), ((17, 9, 2), False), ((17, 9, 2), True), ((1, 5, 1), False)],
)
def test_residual_has_the_shape_of_the_image(image_shape, legacy_stride):
    denoiser = stirred(residual_unet(image_shape, width=1, legacy_stride=legacy_stride))
    assert denoiser.output_shape == denoiser.input_shape == (None, *image_shape)
    assert denoiser(random_image(image_shape)).dtype == tf.float32


# CAFD 11: sides are halved and rounded up; the way up takes the sizes of the way down
def test_stages_have_the_sizes_of_the_specification():
    down = [f"down{number}_3_relu" for number in range(2, 6)]
    up = [f"up{number}_{units}_relu" for number, units in ((1, 3), (2, 3), (3, 3), (4, 2))]
    resized = [f"up{number}_resize" for number in range(1, 5)]
    denoiser = residual_unet((32, 32, 3), width=1)
    assert sides(denoiser, down) == [16, 8, 4, 2] and sides(denoiser, up) == [4, 8, 16, 32]
    released = residual_unet((32, 32, 3), width=1, legacy_stride=True)
    assert sides(released, resized) == [4, 8, 16, 32] and sides(released, up) == [2, 4, 8, 32]
    odd = residual_unet((28, 28, 1), width=1)
    assert sides(odd, down) == [14, 7, 4, 2] and sides(odd, resized) == [4, 7, 14, 28]


def test_units_of_the_denoiser_have_a_bias_and_decay_is_of_kernels_alone():
    denoiser = residual_unet(SHAPE, width=1, l2=0.5)
    convolutions = [each for each in denoiser.layers if isinstance(each, keras.layers.Conv2D)]
    assert len(convolutions) == 2 + 4 * 3 + 3 * 3 + 2 + 1 and all(each.use_bias for each in convolutions)
    total = sum(float(tf.reduce_sum(layer.kernel**2)) for layer in convolutions)
    assert float(tf.add_n(denoiser.losses)) == pytest.approx(total / 2, rel=1e-5)
    assert residual_unet(SHAPE, width=1).losses == []


@pytest.mark.parametrize("image_shape", [(32, 32, 3), (9, 5, 1)])
def test_critic_gives_one_logit_of_images_of_any_size(image_shape):
    made = critic(image_shape, width=2)
    assert made.output_shape == (None, 1) and made.layers[-1].activation is keras.activations.linear
    logits = made(random_image(image_shape)).numpy()
    assert logits.dtype == np.float32 and logits.std() > 0


def test_layers_of_the_critic_have_a_bias_or_batch_normalisation():
    made = critic((32, 32, 3), width=2, l2=0.5)
    convolutions = [each for each in made.layers if isinstance(each, keras.layers.Conv2D)]
    assert [each.use_bias for each in convolutions] == [True] + 7 * [False]
    assert [each.kernel_size[0] for each in convolutions] == 4 * [3, 4]
    assert [each.output_shape[1] for each in convolutions] == [32, 16, 16, 8, 8, 4, 4, 2]
    assert sum(isinstance(each, keras.layers.BatchNormalization) for each in made.layers) == 7
    weighted = [*convolutions, *(each for each in made.layers if isinstance(each, keras.layers.Dense))]
    total = sum(float(tf.reduce_sum(layer.kernel**2)) for layer in weighted)
    assert float(tf.add_n(made.losses)) == pytest.approx(total / 2, rel=1e-5)


def test_purifier_clips_the_sum_and_is_made_of_keras_layers_alone(tmp_path):
    denoiser, image = stirred(residual_unet((8, 8, 2), width=1)), random_image((8, 8, 2))
    denoiser.get_layer("residual").bias.assign([-0.5, 0.5])
    made = purifier(denoiser)
    whole = image + denoiser(image)
    assert np.min(whole) < 0 and np.max(whole) > 1
    np.testing.assert_allclose(made(image), np.clip(whole, 0, 1), atol=1e-6)
    layers = [each for each in made.submodules if isinstance(each, keras.layers.Layer)]
    assert all(type(each).__module__.startswith("keras.") for each in layers)
    made.save(tmp_path / "purifier.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "purifier.keras")(image), made(image))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: residual_unet(SHAPE, width=0), "the width of a denoiser must be at least 1, not 0"),
        (lambda: residual_unet((8, None, 1)), r"each at least 1, not \(8, None, 1\)"),
        (lambda: residual_unet((8, 8)), r"image_shape must be \(height, width, channels\)"),
        (lambda: critic(SHAPE, width=0), "the width of a critic must be at least 1, not 0"),
    ],
)
def test_denoiser_and_critic_refuse(make, message):
    with pytest.raises(UsageError, match=message):
        make()
