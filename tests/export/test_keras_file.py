import functools
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import kerasdefense
from kerasdefense import CAFD, InputError, Standard, backbones, config, evaluation, export, training
from kerasdefense.attacks import PGD


def test_keras_file_restores_class_attack_and_optimizer_slots(defense, pixels, tmp_path):
    defense.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    image = pixels / np.float32(255)
    assert type(loaded) is type(defense)
    assert loaded.attack == defense.attack and loaded.validation_attack == defense.validation_attack
    np.testing.assert_allclose(loaded(image), defense(image), atol=1e-5)
    assert len(loaded.optimizer.variables) == len(defense.optimizer.variables) > 2 * len(defense.trainable_variables)
    for restored, original in zip(loaded.optimizer.variables, defense.optimizer.variables):
        np.testing.assert_array_equal(restored, original)
    assert max(np.abs(slot).max() for slot in defense.optimizer.variables[2:]) > 0


def test_keras_file_of_a_default_run_loads_after_importing_the_package(make, pixels, tmp_path):
    defense = make()
    defense.compile(training.make_optimizer(config.Train(), steps=4))
    image = pixels / np.float32(255)
    defense.fit(image, np.arange(6, dtype=np.int32) % 3, verbose=0)
    defense.save(tmp_path / "model.keras")
    np.save(tmp_path / "image.npy", image)
    script = """
import sys, keras, kerasdefense, numpy as np
model = keras.models.load_model(sys.argv[1] + "/model.keras")
np.save(sys.argv[1] + "/logits.npy", model(np.load(sys.argv[1] + "/image.npy")))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), defense(image), atol=1e-5)


def backbone_of(name, **settings):
    """Return a small backbone whose weights, those of batch normalisations too, are random."""
    keras.utils.set_random_seed(3)
    shape = (16, 16, 3)
    backbone = backbones.build(config.Backbone(name=name, width=4, **settings), image_shape=shape, classes=5)
    random = np.random.default_rng(4)
    for layer in backbone.submodules:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([random.uniform(0.5, 1.5, each.shape) for each in layer.get_weights()])
    return backbone


BACKBONES = {
    "small_cnn": {},
    "resnet14": {},
    "wide_resnet": {"depth": 10},
    "vgg19": {},
    "orthogonal": {"name": "resnet8", "head": "orthogonal"},
    "cbam": {"name": "osdn_resnet14", "denoise": "cbam"},
    "nonlocal": {"name": "osdn_resnet14", "denoise": "nonlocal"},
}


@pytest.mark.parametrize("name", BACKBONES)
def test_classifier_of_keras_layers_alone_answers_as_the_model(name, tmp_path):
    backbone = backbone_of(**{"name": name, **BACKBONES[name]})
    defense = Standard(backbone, attack=PGD())
    with export.classifier_file(defense, tmp_path) as keras_import:
        assert keras_import == {"file": "classifier.keras", "reason": None}
    plain = keras.models.load_model(tmp_path / "classifier.keras")
    assert all(type(layer).__module__.startswith("keras.") for layer in plain.layers)
    assert not plain.trainable_weights
    image = np.random.default_rng(5).random((6, 16, 16, 3), np.float32)
    for mode in (False, None, True):
        np.testing.assert_allclose(plain(image, training=mode), defense(image), atol=1e-5)


def test_classifier_of_a_purifying_defense_holds_the_purifier(make, pixels, tmp_path):
    defense = make(functools.partial(CAFD, denoiser_width=2, critic_width=2))
    kernel = defense.denoiser.get_layer("residual").kernel
    kernel.assign(tf.random.stateless_normal(kernel.shape, [0, 0]))  # it begins as zero
    with export.classifier_file(defense, tmp_path):
        pass
    image = pixels / np.float32(255)
    plain = keras.models.load_model(tmp_path / "classifier.keras")
    np.testing.assert_allclose(plain(image), defense(image), atol=1e-5)
    assert np.abs(plain(image) - defense.backbone(image)["logits"]).max() > 1e-3


def test_random_model_has_no_classifier_of_keras_layers_and_an_old_one_goes(noisy, tmp_path):
    (tmp_path / "classifier.keras").write_bytes(b"of the version before")
    with export.classifier_file(noisy, tmp_path) as keras_import:
        assert keras_import["file"] is None and "draws at random" in keras_import["reason"]
    assert not (tmp_path / "classifier.keras").exists()


@keras.saving.register_keras_serializable(package="kerasdefense_tests")
class Doubled(keras.layers.Layer):
    def call(self, inputs):
        return 2 * inputs


@pytest.mark.parametrize("layer", [Doubled(name="mine"), keras.layers.Lambda(lambda each: 2 * each, name="mine")])
def test_model_with_layers_of_others_says_which_has_no_classifier(layer, tmp_path):
    image = keras.Input((8, 8, 3))
    feature_map = layer(keras.layers.Conv2D(4, 3)(image))
    embedding = keras.layers.GlobalAveragePooling2D()(feature_map)
    outputs = {"feature_map": feature_map, "embedding": embedding, "logits": keras.layers.Dense(3)(embedding)}
    defense = Standard(keras.Model(image, outputs), attack=PGD())
    with export.classifier_file(defense, tmp_path) as keras_import:
        pass
    assert keras_import["file"] is None and f"'mine' is a {type(layer).__name__}" in keras_import["reason"]
    assert not list(tmp_path.iterdir())


def test_own_model_with_a_softmax_dropout_and_nested_model_has_a_classifier(tmp_path):
    image = keras.Input((8, 8, 3), name="image")
    features = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.Dropout(0.5)])(image)
    pooled = keras.layers.Dropout(0.5)(keras.layers.GlobalMaxPooling2D()(features))
    defense = Standard(
        backbones.as_backbone(keras.Model(image, keras.layers.Dense(3, "softmax")(pooled))), attack=PGD()
    )
    with export.classifier_file(defense, tmp_path):
        pass
    plain = keras.models.load_model(tmp_path / "classifier.keras")
    given = np.random.default_rng(5).random((6, 8, 8, 3), np.float32)
    np.testing.assert_allclose(plain(given, training=True), defense(given), atol=1e-5)


def test_defense_that_computes_logits_its_own_way_has_no_classifier_of_keras_layers(make, tmp_path):
    class Doubling(Standard):
        def call(self, image, training=False, seed=None):
            return 2 * super().call(image, training=training)

    with export.classifier_file(make(Doubling), tmp_path) as keras_import:
        assert keras_import["file"] is None and "Doubling computes logits in a way of its own" in keras_import["reason"]


def test_classifier_unlike_the_model_is_not_kept(make, tmp_path, monkeypatch):
    defense = make()
    other = make()
    other.backbone.set_weights([2 * each for each in other.backbone.get_weights()])
    doubled = keras.Model(other.backbone.inputs, other.backbone.output["logits"])
    monkeypatch.setattr("kerasdefense.export.keras_file.in_plain_layers", lambda model: doubled)
    with (
        pytest.raises(InputError, match=r"classifier\.keras differs from the model"),
        export.classifier_file(defense, tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_public_load_model_returns_the_defense(defense, pixels, tmp_path):
    defense.save(tmp_path / "model.keras")
    for path in (tmp_path, str(tmp_path / "model.keras")):
        loaded = kerasdefense.load_model(path)
        assert type(loaded) is type(defense)
        np.testing.assert_allclose(loaded(pixels / np.float32(255)), defense(pixels / np.float32(255)), atol=1e-5)
    with pytest.raises(InputError, match="no such file"):
        kerasdefense.load_model(tmp_path / "none.keras")


def test_stored_python_code_is_not_run(tmp_path):
    image = keras.Input((4, 4, 3))
    keras.Model(image, keras.layers.Lambda(lambda each: each + 1)(image)).save(tmp_path / "unsafe.keras")
    for load in (kerasdefense.load_model, evaluation.load_model):
        with pytest.raises(InputError, match="unsafe"):
            load(tmp_path / "unsafe.keras")
