"""Every built-in backbone: sizes, outputs, initial values, errors."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import config
from kerasdefense.backbones import (
    BACKBONES,
    blocks,
    bottleneck_resnet,
    build,
    cifar_resnet,
    denoising_places,
    plain_copy,
    resnet18,
    small_cnn,
    vgg19,
    wide_resnet,
    with_precision,
)
from kerasdefense.layers import DualAttention, NonLocal
from kerasdefense.training import mirrored
from kerasdefense.types import UsageError

CLASSES = 4
WIDE = ("wide_resnet", "dfa_wide_resnet")
SETTINGS = {name: {"width": 2} for name in BACKBONES} | {name: {"width": 1, "depth": 10} for name in WIDE}
BLOCKS = {"resnet8": 1, "resnet14": 2, "resnet20": 3, "resnet18": 2}
BOTTLENECK = {"cafd_resnet50": (3, 4, 6), "resnet50": (3, 4, 6, 3)}
"""Blocks per stage of backbones whose blocks are bottlenecks."""
HALVED = {"resnet18": 3, "osdn_resnet18": 3, "resnet50": 3, "vgg19": 4}
"""How often a backbone halves the side of its images, where that is not twice."""
BIASED = ("dfa_wide_resnet", "vgg19")
DENOISING = {name: name.removeprefix("osdn_") for name in BACKBONES if name.startswith("osdn_")}
"""Backbones whose embedding is a dense layer on the mean of the feature map, by the name of their trunk."""


@functools.cache
def narrow(name, image_shape):
    return BACKBONES[name](image_shape, CLASSES, **SETTINGS[name])


def random_image(image_shape, batch=3):
    return np.random.default_rng(0).uniform(size=(batch, *image_shape)).astype("float32")


def trainable_parameters(model):
    return sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)


def small_cnn_size(channels, width):
    """Kernel values, and channels that are batch-normalised."""
    kernels = 9 * width * (channels + 2 * width + 4 * width + 8 * width + 16 * width)
    return kernels, 13 * width


def resnet_size(channels, width, *, stages, blocks_per_stage):
    n = blocks_per_stage
    kernels, normalised = 9 * channels * width + n * 2 * 9 * width**2, width + 2 * n * width
    for stage in range(1, stages):
        wide = width * 2**stage
        kernels += 9 * wide**2 // 2 + (2 * n - 1) * 9 * wide**2 + wide**2 // 2
        normalised += 2 * n * wide + wide
    return kernels, normalised


def wide_resnet_size(channels, width, *, depth):
    n = (depth - 4) // 6
    kernels, normalised, narrow = 9 * channels * 16, 64 * width, 16
    for wide in (16 * width, 32 * width, 64 * width):
        kernels += 9 * narrow * wide + (2 * n - 1) * 9 * wide**2 + (narrow * wide if narrow != wide else 0)
        normalised += narrow + wide + (n - 1) * 2 * wide
        narrow = wide
    return kernels, normalised


def bottleneck_size(channels, width, *, blocks_per_stage):
    kernels, normalised, narrow = 9 * channels * width, width, width
    for stage, count in enumerate(blocks_per_stage):
        inside = 2**stage * width
        kernels += 4 * narrow * inside + (narrow + (count - 1) * 4 * inside) * inside + count * 13 * inside**2
        normalised += 4 * inside + count * 6 * inside
        narrow = 4 * inside
    return kernels, normalised


def vgg_size(channels, width):
    """Kernel values with their biases, and channels that are batch-normalised."""
    kernels, normalised, narrow = 0, 0, channels
    for multiple, convolutions in ((1, 2), (2, 2), (4, 4), (8, 4), (8, 4)):
        wide = multiple * width
        kernels += 9 * narrow * wide + (convolutions - 1) * 9 * wide**2 + convolutions * wide
        normalised += convolutions * wide
        narrow = wide
    return kernels, normalised


def denoising_size(channels, width, *, stages, blocks_per_stage):
    """Beside the trunk: its blocks, whose narrow MLP has one unit and biases, and the dense layer of the embedding."""
    kernels, normalised = resnet_size(channels, width, stages=stages, blocks_per_stage=blocks_per_stage)
    latent, feature = 8 * width, width * 2 ** (stages - 1)
    for wide in (width, *(width * 2**stage for stage in range(stages))):
        middle = max(1, wide // 16)
        kernels += wide**2 + 2 * wide * middle + middle + wide + 49 * 2
        normalised += wide + 1
    return kernels + (feature + 1) * latent, normalised + latent


def size(name, channels):
    """Kernel values (with the few biases of denoising blocks), channels that are normalised, size of the embedding."""
    if name == "small_cnn":
        return *small_cnn_size(channels, 2), 8
    if name in WIDE:
        kernels, normalised = wide_resnet_size(channels, 1, depth=10)
        biases = 16 + 2 * 16 + 3 * 32 + 3 * 64  # of the stem, then of each stage, with a shortcut where it widens
        return kernels + (biases if name == "dfa_wide_resnet" else 0), normalised, 64
    if name in BOTTLENECK:
        count = BOTTLENECK[name]
        return *bottleneck_size(channels, 2, blocks_per_stage=count), 8 * 2 ** (len(count) - 1)
    if name == "vgg19":
        return *vgg_size(channels, 2), 8 * 2
    stages = 4 if name.endswith("resnet18") else 3
    if name in DENOISING:
        return *denoising_size(channels, 2, stages=stages, blocks_per_stage=BLOCKS[DENOISING[name]]), 8 * 2
    embedding = 2 * 2 ** (stages - 1)
    return *resnet_size(channels, 2, stages=stages, blocks_per_stage=BLOCKS[name]), embedding


@pytest.mark.parametrize("name", BACKBONES)
def test_parameter_count_is_the_closed_form(name):
    model = narrow(name, (32, 32, 3))
    kernels, normalised, embedding = size(name, channels=3)
    trainable = kernels + 2 * normalised + (embedding + 1) * CLASSES
    assert trainable_parameters(model) == trainable
    assert model.count_params() == trainable + 2 * normalised


@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (functools.partial(cifar_resnet, depth=8), 78_042),
        (functools.partial(cifar_resnet, depth=20), 272_474),
        (resnet18, 11_173_962),
        (functools.partial(wide_resnet, depth=28, width=10), 36_479_194),
        (vgg19, 20_040_522),
        (functools.partial(bottleneck_resnet, blocks_per_stage=(3, 4, 6, 3)), 23_520_842),
        (functools.partial(bottleneck_resnet, blocks_per_stage=(3, 4, 6), width=16), 542_106),
    ],
)
def test_parameter_count_is_the_published_one(make, parameters):
    assert trainable_parameters(make((32, 32, 3), 10)) == parameters


@pytest.mark.parametrize(
    ("name", "image_shape"),
    [(name, (8, 8, 1)) for name in BACKBONES]
    + [(name, (32, 32, 3)) for name in BACKBONES]
    + [(name, (28, 28, 1)) for name in ("small_cnn", "resnet8", "resnet18", "wide_resnet")],
)
def test_backbone_has_the_named_outputs(name, image_shape):
    model = narrow(name, image_shape)
    side, width = image_shape[0], size(name, channels=1)[-1]
    side = -(-side // 2 ** HALVED.get(name, 2))
    assert model.input_shape == (None, *image_shape)
    assert model.inputs[0].name == "image"
    assert model.output_shape == {
        "feature_map": (None, side, side, size(DENOISING.get(name, name), channels=1)[-1]),
        "embedding": (None, width),
        "logits": (None, CLASSES),
    }


@pytest.mark.parametrize("name", BACKBONES)
def test_embedding_is_of_the_mean_of_the_feature_map_and_logits_its_affine_map(name):
    model = narrow(name, (8, 8, 1))
    logits = model.get_layer("logits")
    logits.bias.assign(np.arange(CLASSES, dtype="float32"))
    outputs = {key: value.numpy() for key, value in model(random_image((8, 8, 1))).items()}
    assert outputs["embedding"].std() > 0
    mean = outputs["feature_map"].mean(axis=(1, 2))
    if name in DENOISING:  # a dense layer, fresh batch normalisation, ReLU
        dense = model.get_layer("latent")
        mean = np.maximum((mean @ dense.kernel.numpy() + dense.bias.numpy()) / np.sqrt(1 + 1e-5), 0)
    np.testing.assert_allclose(outputs["embedding"], mean, rtol=1e-5, atol=1e-5)
    expected = outputs["embedding"] @ logits.kernel.numpy() + logits.bias.numpy()
    np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_convolutions_have_no_bias_but_those_of_dfa_and_vgg_and_batch_normalisation_is_fused(name):
    layers = narrow(name, (8, 8, 1)).layers
    biased = {layer.use_bias for layer in layers if isinstance(layer, keras.layers.Conv2D)}
    assert biased == {name in BIASED}
    batch_normalisations = [each for each in layers if isinstance(each, keras.layers.BatchNormalization)]
    assert batch_normalisations
    for layer in batch_normalisations:
        assert (layer.momentum, layer.epsilon) == (0.9, 1e-5)
        assert layer.fused or len(layer.input_shape) == 2  # the embedding of osdn_ ones is a vector
        assert not layer.synchronized


def test_batch_normalisation_is_synchronized_over_replicas():
    devices = [device.name for device in tf.config.list_logical_devices("CPU")]
    assert len(devices) == 2
    with mirrored(tuple(devices)).scope():
        model = small_cnn((8, 8, 1), CLASSES, width=1)
        copies = [with_precision(model, "mixed_bfloat16"), plain_copy(model, name="peer")]
    for each in (model, *copies):
        layers = [layer for layer in each.layers if isinstance(layer, keras.layers.BatchNormalization)]
        assert len(layers) == 5
        assert all(layer.synchronized and not layer.fused for layer in layers)


def test_kernels_are_he_normal():
    model = cifar_resnet((8, 8, 1), CLASSES, depth=8, width=16)
    kernel = model.get_layer("stage3_block1_2_conv").kernel.numpy()
    assert kernel.shape == (3, 3, 64, 64)
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 64)), rtol=0.03)


def test_normalisation_maps_images_by_fixed_constants():
    model = narrow("small_cnn", (32, 32, 3))
    normalise = keras.Model(model.input, model.get_layer("normalisation").output)
    image = random_image((32, 32, 3))
    np.testing.assert_allclose(normalise(image), (image - 0.5) / 0.25, atol=1e-6)


def test_normalisation_can_be_given():
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2471, 0.2435, 0.2616])
    layer = keras.layers.Normalization(mean=mean, variance=std**2)
    model = small_cnn((8, 8, 3), CLASSES, width=1, normalisation=layer)
    image = random_image((8, 8, 3))
    normalised = keras.Model(model.input, model.get_layer("block1_conv").input)(image)
    np.testing.assert_allclose(normalised, (image - mean) / std, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [7, 8])
def test_strided_convolution_is_centred_on_the_pixels_of_the_shortcut(side):
    image = keras.Input((side, side, 1))
    model = keras.Model(image, blocks.convolution(image, 1, 3, stride=2, name="conv"))
    kernel = np.zeros((3, 3, 1, 1), "float32")
    kernel[1, 1] = 1
    model.set_weights([kernel])
    pixels = random_image((side, side, 1))
    np.testing.assert_array_equal(model(pixels), pixels[:, ::2, ::2])


def test_logits_are_float32_under_mixed_precision():
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = small_cnn((8, 8, 1), CLASSES, width=1)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    outputs = model(random_image((8, 8, 1)))
    assert outputs["feature_map"].dtype == tf.bfloat16
    assert outputs["logits"].dtype == tf.float32


def test_build_takes_kind_and_places_of_denoising_blocks_from_the_configuration():
    def blocks_of(**settings):
        model = build(config.Backbone("osdn_resnet8", width=2, **settings), image_shape=(8, 8, 1), classes=CLASSES)
        return {layer.name: type(layer) for layer in model.layers if layer.name.startswith("denoise")}

    assert blocks_of() == {f"denoise_{place}": DualAttention for place in range(4)}
    assert blocks_of(denoise="nonlocal", places="0,2") == {"denoise_0": NonLocal, "denoise_2": NonLocal}
    assert blocks_of(denoise="none") == {}


@pytest.mark.parametrize("name", ["osdn_resnet8", "resnet8"])
def test_plain_copy_has_the_trunk_and_new_weights(name):
    model = build(config.Backbone(name, width=4), image_shape=(8, 8, 1), classes=CLASSES)
    copied, plain = plain_copy(model, name="peer"), cifar_resnet((8, 8, 1), CLASSES, depth=8, width=4)
    assert [each.shape for each in copied.weights] == [each.shape for each in plain.weights]
    assert not np.array_equal(copied.get_layer("stem_conv").kernel, model.get_layer("stem_conv").kernel)
    image = random_image((8, 8, 1))
    plain.set_weights(copied.get_weights())
    for key, output in plain(image).items():
        np.testing.assert_allclose(copied(image)[key], output, atol=1e-6)


def test_plain_copy_trains_every_layer_and_keeps_the_normalisation_of_the_data():
    image = keras.Input((8, 8, 1))
    normalisation = keras.layers.Normalization(axis=-1)
    normalisation.adapt(np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 8, 8, 1))
    feature_map = keras.layers.Conv2D(4, 3, trainable=False, name="frozen")(normalisation(image))
    copied = plain_copy(blocks.finish(image, feature_map, CLASSES, name="own"), name="peer")
    assert len(copied.trainable_variables) == 4
    copy_of = next(layer for layer in copied.layers if isinstance(layer, keras.layers.Normalization))
    np.testing.assert_allclose(copy_of(random_image((8, 8, 1))), normalisation(random_image((8, 8, 1))), atol=1e-6)


@pytest.mark.parametrize("name", ["resnet8", "resnet14", "resnet18"])
def test_places_of_denoising_blocks_are_where_their_encoder_has_them(name):
    def shapes(model):
        return {
            place: tuple(map(tuple, (before.shape, after.shape)))
            for place, (before, after) in denoising_places(model).items()
        }

    plain, encoder = narrow(name, (16, 16, 1)), narrow(f"osdn_{name}", (16, 16, 1))
    assert shapes(plain) == shapes(encoder) and list(shapes(plain)) == list(range(5 if name == "resnet18" else 4))
    last, after = denoising_places(plain)[max(denoising_places(plain))]
    assert last is after and last is plain.output["feature_map"]
    before, after = denoising_places(encoder)[1]
    assert before is not after and after is encoder.get_layer("denoise_1").output
    assert denoising_places(narrow("small_cnn", (16, 16, 1))) == {}


def test_build_takes_name_width_and_depth_from_the_configuration():
    backbone = config.Backbone(name="wide_resnet", width=2, depth=10)
    model = build(backbone, image_shape=(8, 8, 1), classes=CLASSES)
    assert model.name == "wide_resnet_10_2"
    model = build(config.Backbone(name="resnet8", width=3), image_shape=(8, 8, 1), classes=5)
    assert model.name == "resnet8"
    assert model.output_shape["embedding"] == (None, 12)
    assert model.output_shape["logits"] == (None, 5)


@pytest.mark.parametrize(
    ("backbone", "classes", "image_shape", "message"),
    [
        (
            config.Backbone(name="resnet9"),
            2,
            (8, 8, 1),
            "unknown backbone 'resnet9'; valid: .*resnet8.*wide_resnet",
        ),
        (config.Backbone(width=0), 2, (8, 8, 1), "width .* at least 1, not 0"),
        (config.Backbone(), 1, (8, 8, 1), "at least 2 classes, not 1"),
        (config.Backbone(), 2, (8, 8), r"image_shape must be \(height, width, channels\)"),
        (config.Backbone(), 2, (8, 0, 1), r"each at least 1, not \(8, 0, 1\)"),
        (config.Backbone(name="osdn_resnet8", places="1,x"), 2, (8, 8, 1), "--backbone_places='1,x' must be numbers"),
        (
            config.Backbone(name="osdn_resnet8", denoise="none", places="1"),
            2,
            (8, 8, 1),
            "none leaves nothing to place",
        ),
        (config.Backbone(denoise="nonlocal"), 2, (8, 8, 1), "--backbone_denoise needs --backbone_name=osdn_resnet18"),
        (config.Backbone(places="1"), 2, (8, 8, 1), "--backbone_places needs --backbone_name=osdn_resnet18"),
        (config.Backbone(name="osdn_resnet8", places="4"), 2, (8, 8, 1), r"from 0 \(stem\) to 3, not \(4,\)"),
        (config.Backbone(name="wide_resnet", depth=17), 2, (8, 8, 1), r"6n \+ 4 .*, not 17"),
        (config.Backbone(name="wide_resnet", depth=4), 2, (8, 8, 1), r"6n \+ 4 .*, not 4"),
    ],
)
def test_build_refuses(backbone, classes, image_shape, message):
    with pytest.raises(UsageError, match=message):
        build(backbone, image_shape=image_shape, classes=classes)


@pytest.mark.parametrize("depth", [2, 9])
def test_cifar_resnet_refuses_other_depths(depth):
    with pytest.raises(UsageError, match=rf"6n \+ 2 .*, not {depth}"):
        cifar_resnet((8, 8, 1), 2, depth=depth)
