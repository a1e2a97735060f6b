"""The decoder: sizes, counts, range, errors."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense.backbones import decoder
from kerasdefense.types import UsageError

CODE = np.abs(np.random.default_rng(0).normal(size=(3, 5))).astype("float32")


def trainable_parameters(model):
    return sum(variable.shape.num_elements() for variable in model.trainable_variables)


# osdn_caml 2: the counts of section 2.4
@pytest.mark.parametrize(("side", "parameters"), [(32, 7_872_259), (64, 8_134_659)])
def test_decoder_has_the_parameters_of_the_paper(side, parameters):
    model = decoder(512, (side, side, 3))
    assert trainable_parameters(model) == parameters
    assert model.output_shape == (None, side, side, 3)


# osdn_caml 1: shapes and range
@pytest.mark.parametrize("shape", [(8, 8, 3), (28, 28, 1), (32, 32, 3), (64, 64, 3)])
def test_decoder_draws_images_between_minus_one_and_one(shape):
    image = decoder(5, shape, width=4)(CODE)
    assert image.shape == (3, *shape) and image.dtype == tf.float32
    assert tf.reduce_max(tf.abs(image)) < 1
    assert not np.allclose(image[0], image[1])


def test_decoder_keeps_the_proportions_of_its_stages_with_one_channel_at_least():
    model = decoder(5, (32, 32, 3), width=2)
    channels = [layer.filters for layer in model.layers if isinstance(layer, keras.layers.Conv2DTranspose)]
    assert model.get_layer("dense").units == 2 * 2 * 2
    assert channels == [2, 1, 1, 3]
    assert [layer.alpha for layer in model.layers if isinstance(layer, keras.layers.LeakyReLU)] == pytest.approx(
        [0.2] * 3
    )
    assert [layer.use_bias for layer in model.layers if hasattr(layer, "use_bias")] == [False] * 4 + [True]


def test_decoder_stage_doubles_as_kernel_four_padding_one():
    """Place (2 i + a - 1, 2 j + b - 1) gets pixel (i, j) by kernel value (a, b), as in the authors' framework."""
    model = decoder(4, (8, 8, 1), width=4)
    layer = model.get_layer("image")
    pixels = np.random.default_rng(1).normal(size=(4, 4)).astype("float32")
    kernel = np.random.default_rng(2).normal(size=(4, 4, 1, 1)).astype("float32")
    layer.kernel.assign(kernel)
    expected = np.zeros((10, 10))
    for i, j in np.ndindex(4, 4):
        expected[2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += pixels[i, j] * kernel[..., 0, 0]
    found = layer(pixels[None, :, :, None])[0, :, :, 0]
    np.testing.assert_allclose(found, np.tanh(expected[1:-1, 1:-1]), atol=1e-5)


def test_decoder_comes_back_from_its_file(tmp_path):
    model = decoder(5, (8, 8, 3), width=4)
    model.save(tmp_path / "decoder.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "decoder.keras")(CODE), model(CODE))


def test_decoder_draws_float32_images_under_mixed_precision():
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = decoder(5, (8, 8, 3), width=4)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert model(CODE).dtype == tf.float32
    assert model.get_layer("stage1_relu").output.dtype == tf.bfloat16


@pytest.mark.parametrize("shape", [(16, 16, 3), (32, 28, 3), (32, 32), (32, 32, 0)])
def test_decoder_refuses_other_sizes(shape):
    with pytest.raises(UsageError, match=r"^the decoder draws images of 8x8, 28x28, 32x32, 64x64 pixels and .*, not "):
        decoder(5, shape)


@pytest.mark.parametrize(("latent", "width"), [(0, 4), (5, 0)])
def test_decoder_refuses_sizes_below_one(latent, width):
    with pytest.raises(UsageError, match=f"^latent and width .* at least 1, not {latent} and {width}$"):
        decoder(latent, (8, 8, 3), width=width)
