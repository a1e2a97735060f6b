"""ResNets with denoising blocks: counts, places, outputs, errors."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense.backbones import cifar_resnet, denoising_resnet, resnet18, with_precision
from kerasdefense.layers import DENOISERS, DualAttention, NonLocal
from kerasdefense.types import UsageError

SHAPE, CLASSES = (8, 8, 3), 6
IMAGE = np.random.default_rng(0).uniform(size=(4, *SHAPE)).astype("float32")


@functools.cache
def thin(depth=8, denoise="cbam"):
    return denoising_resnet(SHAPE, CLASSES, depth=depth, width=4, denoise=denoise)


def parameters(*layers):
    return sum(variable.shape.num_elements() for layer in layers for variable in layer.trainable_variables)


def blocks_of(model):
    return {layer.name: parameters(layer) for layer in model.layers if isinstance(layer, tuple(DENOISERS.values()))}


# osdn_caml 2: the counts of section 2.4
@pytest.mark.parametrize(
    ("denoise", "block_counts", "encoder"),
    [
        ("cbam", [4_904, 4_904, 18_924, 74_612, 296_580], 11_832_436),
        ("nonlocal", [8_480, 8_480, 33_344, 132_224, 526_592], 12_141_632),
    ],
)
def test_parameter_counts_are_those_of_the_paper(denoise, block_counts, encoder):
    model = denoising_resnet((32, 32, 3), 6, denoise=denoise)
    logits, head = model.get_layer("logits"), [model.get_layer(name) for name in ("latent", "latent_bn")]
    assert blocks_of(model) == {f"denoise_{place}": count for place, count in enumerate(block_counts)}
    assert parameters(logits) == 3_078
    assert parameters(*head) == 263_680
    assert parameters(model) - parameters(logits) == encoder == 11_168_832 + sum(block_counts) + 263_680
    assert model.output_shape == {"feature_map": (None, 4, 4, 512), "embedding": (None, 512), "logits": (None, 6)}


# osdn_caml 5: without blocks, the plain trunk and the head
@pytest.mark.parametrize(
    ("depth", "make"),
    [(18, resnet18), (14, functools.partial(cifar_resnet, depth=14))],
)
def test_without_blocks_it_is_the_plain_trunk_and_the_head(depth, make):
    model = denoising_resnet(SHAPE, CLASSES, depth=depth, width=4, places=())
    plain = make(SHAPE, CLASSES, width=4)
    trunk = keras.Model(model.input, model.output["feature_map"])
    assert blocks_of(model) == {}
    trunk.set_weights(plain.get_weights()[:-2])
    np.testing.assert_array_equal(trunk(IMAGE), plain(IMAGE)["feature_map"])


# osdn_caml 1: shapes and signs
@pytest.mark.parametrize(("depth", "width", "side"), [(8, 16, 2), (18, 32, 1), (20, 16, 2)])
def test_outputs_are_named_and_the_embedding_is_not_negative(depth, width, side):
    model = thin(depth)
    outputs = model(IMAGE)
    assert model.inputs[0].name == "image" and model.name == f"denoising_resnet{depth}"
    assert {name: output.shape for name, output in outputs.items()} == {
        "feature_map": (4, side, side, width),
        "embedding": (4, 32),
        "logits": (4, CLASSES),
    }
    assert all(np.isfinite(output).all() for output in outputs.values())
    assert tf.reduce_min(outputs["embedding"]) >= 0


def test_blocks_stand_after_the_stem_and_after_each_stage():
    expected = {"denoise_0": "stem_relu"} | {f"denoise_{s}": f"stage{s}_block1_relu" for s in (1, 2, 3)}
    assert {name: thin().get_layer(name).input.node.layer.name for name in blocks_of(thin())} == expected
    assert thin().output["feature_map"].node.layer.name == "denoise_3"
    assert list(blocks_of(thin(18))) == [f"denoise_{place}" for place in range(5)]


def test_blocks_are_of_the_kind_and_at_the_places_asked_for():
    model = denoising_resnet(SHAPE, CLASSES, depth=8, width=4, denoise="nonlocal", places=(3, 1), latent=7)
    assert [(layer.name, type(layer)) for layer in model.layers if layer.name.startswith("denoise")] == [
        ("denoise_1", NonLocal),
        ("denoise_3", NonLocal),
    ]
    assert isinstance(thin().get_layer("denoise_1"), DualAttention)
    assert model.output_shape["embedding"] == (None, 7)


def test_embedding_is_the_rectified_head_of_the_pooled_feature_map_and_logits_its_affine_map():
    model = thin()
    outputs = {name: output.numpy() for name, output in model(IMAGE).items()}
    dense = model.get_layer("latent")
    latent = outputs["feature_map"].mean(axis=(1, 2)) @ dense.kernel.numpy() + dense.bias.numpy()
    latent = latent / np.sqrt(1 + 1e-5)  # fresh batch normalisation
    np.testing.assert_allclose(outputs["embedding"], np.maximum(latent, 0), atol=1e-5)
    logits = model.get_layer("logits")
    expected = outputs["embedding"] @ logits.kernel.numpy() + logits.bias.numpy()
    np.testing.assert_allclose(outputs["logits"], expected, atol=1e-5)


@pytest.mark.parametrize("denoise", DENOISERS)
def test_an_image_is_answered_alike_in_any_batch_and_its_gradient_reaches_every_row(denoise):
    model, image = thin(denoise=denoise), tf.constant(IMAGE)
    alone = tf.concat([model(image[row : row + 1])["logits"] for row in range(len(IMAGE))], axis=0)
    with tf.GradientTape() as tape:
        tape.watch(image)
        logits = model(image, training=False)["logits"]
        first = logits[:, 0]
    gradient = tape.gradient(first, image).numpy()
    np.testing.assert_allclose(alone, logits, atol=1e-5)
    assert np.isfinite(gradient).all() and (np.abs(gradient).max(axis=(2, 3)) > 0).all()


@pytest.mark.parametrize("denoise", DENOISERS)
def test_one_step_in_mixed_precision_is_finite_and_the_model_comes_back_from_its_file(denoise, tmp_path):
    model = with_precision(thin(denoise=denoise), "mixed_bfloat16")
    with tf.GradientTape() as tape:
        outputs = model(IMAGE, training=True)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(np.arange(4), outputs["logits"]))
    gradients = tape.gradient(loss, model.trainable_variables)
    keras.optimizers.Adam(1e-3).apply_gradients(zip(gradients, model.trainable_variables))
    assert outputs["feature_map"].dtype == tf.bfloat16 and outputs["logits"].dtype == tf.float32
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert all(np.isfinite(variable).all() for variable in model.variables)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for name, output in model(IMAGE).items():
        np.testing.assert_array_equal(loaded(IMAGE)[name], output)


def test_statistics_move_in_training_only():
    model = denoising_resnet(SHAPE, CLASSES, depth=8, width=2)

    def statistics():
        return [variable.numpy() for variable in model.non_trainable_variables if "moving" in variable.name]

    before = statistics()
    model(IMAGE, training=False)
    assert all(np.array_equal(one, two) for one, two in zip(before, statistics()))
    model(IMAGE, training=True)
    moved = [not np.array_equal(one, two) for one, two in zip(before, statistics())]
    assert len(moved) == 2 * (10 + 4 * 2) and all(moved)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 9}, "the depth of denoising_resnet must be one of 8, 14, 18, 20, not 9"),
        ({"width": 0}, "the width of a backbone must be at least 1, not 0"),
        ({"classes": 1}, "a classifier needs at least 2 classes, not 1"),
        ({"latent": 0}, "latent must be at least 1, not 0"),
        ({"denoise": "mean"}, "unknown denoising block 'mean'; valid: cbam, nonlocal"),
        ({"depth": 8, "places": (0, 4)}, r"the places of denoising blocks must be from 0 \(stem\) to 3, not \(0, 4\)"),
        ({"places": (-1,)}, r"the places of denoising blocks must be from 0 \(stem\) to 4, not \(-1,\)"),
    ],
)
def test_denoising_resnet_refuses(settings, message):
    with pytest.raises(UsageError, match=f"^{message}$"):
        denoising_resnet(SHAPE, **{"classes": CLASSES, "width": 4, **settings})
