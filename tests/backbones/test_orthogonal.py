"""Backbones with frozen orthonormal axes in place of their dense layer: what is left out, what stays."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import config
from kerasdefense.backbones import (
    BACKBONES,
    as_backbone,
    build,
    cifar_resnet,
    denoising_places,
    orthogonal_head,
    plain_copy,
    with_orthogonal_head,
    with_precision,
)
from kerasdefense.types import UsageError

SHAPE, CLASSES = (8, 8, 1), 4
IMAGE = np.random.default_rng(0).uniform(size=(6, *SHAPE)).astype("float32")
NEW = {"feature_map", "embedding", "logits"}
"""Layers that are made anew, where the head needs it."""

layers = keras.layers


@functools.cache
def pair(name):
    """Return a narrow backbone with its dense layer, and the same with axes; batch statistics are those of IMAGE."""
    keras.utils.set_random_seed(2)
    model = build(config.Backbone(name, width=2, depth=10), image_shape=SHAPE, classes=CLASSES)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0
    model(IMAGE, training=True)
    return model, with_orthogonal_head(model, seed=0)


def assert_axes(outputs, head):
    """Assert that logits are the absolute cosines of the embedding with the axes."""
    embedding = outputs["embedding"].numpy()
    cosines = embedding @ head.kernel.numpy() / np.linalg.norm(embedding, axis=1, keepdims=True)
    np.testing.assert_allclose(outputs["logits"], np.abs(cosines), atol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
class TestEveryBackbone:
    # dfa 19: no ReLU at the end, nor the batch normalisation of a sum before it
    def test_embedding_may_be_negative(self, name):
        model, headed = pair(name)
        outputs = headed(IMAGE)
        assert np.min(model(IMAGE)["embedding"]) >= 0 > np.min(outputs["embedding"])
        if name.startswith("osdn_"):  # the embedding is a dense layer of the feature map, which stays
            np.testing.assert_array_equal(outputs["feature_map"], model(IMAGE)["feature_map"])
        else:
            assert np.min(outputs["feature_map"]) < 0
            np.testing.assert_allclose(outputs["embedding"], np.mean(outputs["feature_map"], axis=(1, 2)), atol=1e-5)
        assert_axes(outputs, orthogonal_head(headed))

    def test_layers_that_stay_are_the_same_ones(self, name):
        model, headed = pair(name)
        kept = [layer for layer in headed.layers if layer.name not in NEW]
        assert all(layer is model.get_layer(layer.name) for layer in kept)
        left_out = {layer.name for layer in model.layers} - {layer.name for layer in headed.layers}
        assert left_out == ({"final_bn"} if "wide_resnet" in name else {"embedding"} if "osdn_" in name else set())
        rectifiers = sum(isinstance(layer, layers.ReLU) for layer in model.layers)
        assert sum(isinstance(layer, layers.ReLU) for layer in headed.layers) == rectifiers - 1
        assert headed.name == model.name and headed.input_names == ["image"]

    def test_head_is_found_and_not_trained(self, name):
        model, headed = pair(name)
        head = orthogonal_head(headed)
        assert head is headed.get_layer("logits") and orthogonal_head(model) is None
        assert not any(variable is head.kernel for variable in headed.trainable_variables)
        assert head.kernel.shape == (headed.output_shape["embedding"][-1], CLASSES)


# dfa 19: parameter counts
@pytest.mark.parametrize(
    ("depth", "width", "trained", "frozen"), [(28, 10, 36_481_600, 6_400), (16, 4, 2_748_064, 2_560)]
)
def test_parameter_counts_are_those_of_dfa(depth, width, trained, frozen):
    architecture = config.Backbone("dfa_wide_resnet", width=width, depth=depth, head="orthogonal")
    model = build(architecture, image_shape=(32, 32, 3), classes=10)
    assert sum(variable.shape.num_elements() for variable in model.trainable_variables) == trained
    assert orthogonal_head(model).kernel.shape.num_elements() == frozen


def test_blocks_of_dfa_halve_the_side_in_their_second_convolution_and_shortcuts_take_what_enters():
    model, headed = pair("dfa_wide_resnet")
    strides = {layer.name: layer.strides[0] for layer in model.layers if isinstance(layer, layers.Conv2D)}
    halving = {f"stage{stage}_block1_{place}_conv" for stage in (2, 3) for place in ("2", "shortcut")}
    assert {name for name, stride in strides.items() if stride == 2} == halving and set(strides.values()) == {1, 2}
    shortcut = model.get_layer("stage2_block1_shortcut_conv")
    assert shortcut.input is model.get_layer("stage1_block1_sum").output  # neither normalised nor rectified
    assert headed.output["feature_map"].node.keras_inputs[0] is headed.get_layer("stage3_block1_sum").output
    assert all(model.get_layer(name).use_bias for name in strides)
    other, _ = pair("wide_resnet")
    assert other.get_layer("stage2_block1_1_conv").strides == (2, 2)
    assert not any(layer.use_bias for layer in other.layers if isinstance(layer, layers.Conv2D))


def test_kernels_of_dfa_are_drawn_by_the_number_of_outputs():
    keras.utils.set_random_seed(0)
    model = build(config.Backbone("dfa_wide_resnet", width=4, depth=10), image_shape=SHAPE, classes=CLASSES)
    for name, deviation in (("stage2_block1_1_conv", np.sqrt(2 / (9 * 128))), ("stage2_block1_shortcut_conv", 0.125)):
        kernel = model.get_layer(name).kernel.numpy()
        assert kernel.shape[-2:] == (64, 128)
        np.testing.assert_allclose(kernel.std(), deviation, rtol=0.03)


@pytest.mark.parametrize("name", ["small_cnn", "osdn_resnet8"])
def test_axes_stay_in_float32_and_as_they_are_in_mixed_precision(name):
    _, headed = pair(name)
    mixed = with_precision(headed, "mixed_bfloat16")
    outputs, head = mixed(IMAGE), orthogonal_head(mixed)
    assert outputs["embedding"].dtype == tf.bfloat16 and outputs["logits"].dtype == tf.float32
    assert head.compute_dtype == "float32"
    np.testing.assert_array_equal(head.kernel, orthogonal_head(headed).kernel)
    np.testing.assert_allclose(outputs["logits"], headed(IMAGE)["logits"], atol=0.05)


@pytest.mark.parametrize("name", ["resnet8", "osdn_resnet8", "resnet18"])
def test_places_of_denoising_blocks_are_still_found(name):
    def shapes(of):
        return {place: [tensor.shape for tensor in around] for place, around in denoising_places(of).items()}

    model, headed = pair(name)
    assert shapes(headed) == shapes(model) and len(shapes(headed)) == (5 if name == "resnet18" else 4)
    last = denoising_places(headed)[max(shapes(headed))][-1]
    assert last is headed.output["feature_map"]


def test_plain_copy_has_a_dense_layer():
    _, headed = pair("osdn_resnet8")
    copied, plain = plain_copy(headed, name="peer"), cifar_resnet(SHAPE, CLASSES, depth=8, width=2)
    assert orthogonal_head(copied) is None
    assert [each.shape for each in copied.weights] == [each.shape for each in plain.weights]


def test_it_comes_back_from_its_file(tmp_path):
    _, headed = pair("small_cnn")
    headed.save(tmp_path / "backbone.keras")
    loaded = keras.models.load_model(tmp_path / "backbone.keras")
    assert orthogonal_head(loaded) is not None
    for name, output in headed(IMAGE).items():
        np.testing.assert_array_equal(loaded(IMAGE)[name], output)


def by_hand(before, pooling, after):
    """Return a backbone that ends in layers of one's own."""
    image = keras.Input(SHAPE, name="image")
    feature_map = layers.Conv2D(6, 3)(image)
    for layer in before:
        feature_map = layer()(feature_map)
    embedding = pooling()(feature_map)
    for layer in after:
        embedding = layer()(embedding)
    logits = layers.Dense(CLASSES)(embedding)
    return keras.Model(image, {"feature_map": feature_map, "embedding": embedding, "logits": logits})


@pytest.mark.parametrize(
    ("before", "pooling", "after", "rectified"),
    [
        ([layers.ReLU], layers.GlobalAveragePooling2D, [], False),
        ([], layers.GlobalAveragePooling2D, [layers.ReLU], False),
        ([layers.ReLU], layers.GlobalMaxPooling2D, [], True),
        ([layers.ReLU], layers.GlobalAveragePooling2D, [layers.Dropout], True),
    ],
    ids=["feature_map", "embedding", "maximum", "dropout"],
)
def test_relu_is_left_out_that_gives_the_embedding_or_the_map_of_which_it_is_the_mean(
    before, pooling, after, rectified
):
    after = [functools.partial(layer, 0.5) if layer is layers.Dropout else layer for layer in after]
    model = by_hand(before, pooling, after)
    headed = with_orthogonal_head(model)
    outputs = headed(IMAGE)
    assert (np.min(outputs["embedding"]) >= 0) == rectified
    assert_axes(outputs, orthogonal_head(headed))
    if rectified:
        np.testing.assert_array_equal(outputs["embedding"], model(IMAGE)["embedding"])


@pytest.mark.parametrize("rectifier", [layers.ReLU(), layers.Activation("relu")], ids=["layer", "activation"])
def test_relu_of_an_own_model_is_left_out_and_its_weights_are_kept(rectifier):
    image = keras.Input(SHAPE)
    rectified = rectifier(layers.Conv2D(6, 3)(image))
    dense = layers.Dense(CLASSES, activation="softmax")
    model = as_backbone(keras.Model(image, dense(layers.GlobalAveragePooling2D()(rectified))))
    outputs = with_orthogonal_head(model)(IMAGE)
    assert np.min(outputs["embedding"]) < 0
    np.testing.assert_allclose(tf.nn.relu(outputs["feature_map"]), model(IMAGE)["feature_map"], atol=1e-6)


def test_convolution_of_an_own_model_that_rectifies_stays_as_it_is():
    image = keras.Input(SHAPE)
    pooled = layers.GlobalAveragePooling2D()(layers.Conv2D(6, 3, activation="relu")(image))
    model = as_backbone(keras.Model(image, layers.Dense(CLASSES)(pooled)))
    np.testing.assert_array_equal(with_orthogonal_head(model)(IMAGE)["embedding"], model(IMAGE)["embedding"])


def test_axes_are_drawn_by_the_seed_of_the_run():
    def axes(seed):
        keras.utils.set_random_seed(seed)
        architecture = config.Backbone("small_cnn", width=2, head="orthogonal")
        return orthogonal_head(build(architecture, image_shape=SHAPE, classes=CLASSES)).kernel.numpy()

    np.testing.assert_array_equal(axes(1), axes(1))
    assert np.abs(axes(1) - axes(2)).max() > 0.1


def test_own_model_with_axes_keeps_them(tmp_path):
    _, headed = pair("small_cnn")
    headed.save(tmp_path / "own.keras")
    own = config.Backbone(path=str(tmp_path / "own.keras"), head="orthogonal")
    built = build(own, image_shape=SHAPE, classes=CLASSES)
    np.testing.assert_array_equal(built(IMAGE)["logits"], headed(IMAGE)["logits"])
    with pytest.raises(UsageError, match=r"own\.keras are frozen axes: pass --backbone_head=orthogonal"):
        build(config.Backbone(path=own.path), image_shape=SHAPE, classes=CLASSES)


def test_more_classes_than_dimensions_are_refused():
    with pytest.raises(UsageError, match="each of 10 classes, but the embedding has only 8 dimensions; use a wider"):
        build(config.Backbone("small_cnn", width=2, head="orthogonal"), image_shape=SHAPE, classes=10)
