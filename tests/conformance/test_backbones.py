"""One suite over every entry of BACKBONES: whatever is registered keeps the contract of a backbone."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import config
from kerasdefense.backbones import BACKBONES, build

SHAPE, CLASSES = (8, 8, 3), 4
DENOISING = "osdn_"
"""How the backbones are called whose embedding is not the mean of the feature map."""


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request):
    keras.utils.set_random_seed(1)
    settings = config.Backbone(name=request.param, width=2, depth=10)
    return build(settings, image_shape=SHAPE, classes=CLASSES)


@pytest.fixture
def image():
    return np.random.default_rng(0).uniform(size=(3, *SHAPE)).astype(np.float32)


def test_backbone_takes_image_and_names_its_outputs(backbone, image, request):
    outputs = backbone(image)
    assert backbone.input_names == ["image"] and set(outputs) == {"feature_map", "embedding", "logits"}
    assert outputs["feature_map"].shape.rank == 4 and outputs["logits"].shape == (3, CLASSES)
    if not request.node.callspec.params["backbone"].startswith(DENOISING):
        np.testing.assert_allclose(outputs["embedding"], np.mean(outputs["feature_map"], axis=(1, 2)), atol=1e-5)
    assert all(np.isfinite(output).all() for output in outputs.values())


def test_backbone_answers_an_image_alike_in_any_batch(backbone, image):
    together = backbone(image, training=False)["logits"]
    alone = tf.concat([backbone(image[row : row + 1], training=False)["logits"] for row in range(3)], axis=0)
    np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-5)


def test_backbone_gradient_reaches_every_image(backbone, image):
    image = tf.constant(image)
    with tf.GradientTape() as tape:
        tape.watch(image)
        logits = backbone(image, training=False)["logits"][:, 0]
    gradient = tape.gradient(logits, image).numpy()
    assert np.isfinite(gradient).all() and (np.abs(gradient).max(axis=(1, 2, 3)) > 0).all()


def test_backbone_moves_its_statistics_in_training_only(backbone, image):
    def statistics():
        return [variable.numpy() for variable in backbone.non_trainable_variables if "moving" in variable.name]

    before = statistics()
    backbone(image, training=False)
    assert all(np.array_equal(one, two) for one, two in zip(before, statistics()))
    backbone(image, training=True)
    assert before and not any(np.array_equal(one, two) for one, two in zip(before, statistics()))


def test_backbone_comes_back_from_its_file(backbone, image, tmp_path):
    backbone.save(tmp_path / "backbone.keras")
    loaded = keras.models.load_model(tmp_path / "backbone.keras")
    for name, output in backbone(image).items():
        np.testing.assert_array_equal(loaded(image)[name], output)
