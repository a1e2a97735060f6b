"""Preprocessors in front of a model: those of a file and of another library, and everything that is none."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense.evaluation import Loaded, as_paths, check_fits, preprocessing, randomised
from kerasdefense.evaluation.search import Chunk
from kerasdefense.layers import RandomTransform
from kerasdefense.types import InputError, UsageError

IMAGE = np.random.default_rng(0).integers(0, 256, [6, 8, 8, 1]).astype(np.float32) / 255
SEED = tf.zeros([len(IMAGE), 2], tf.int32)


def classifier():
    image = keras.Input([8, 8, 1])
    tensor = keras.layers.Conv2D(4, 3, activation="relu")(image)
    tensor = keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(tensor))
    return keras.Model(image, tensor, name="mine")


def saved(path, *layers, shape=(8, 8, 1)):
    keras.Sequential([keras.Input(shape), *layers]).save(path)
    return str(path)


@pytest.fixture
def denoiser(tmp_path):
    return saved(tmp_path / "smooth.keras", keras.layers.AveragePooling2D(3, 1, "same"))


def gradient(path, image):
    image = tf.constant(image)
    with tf.GradientTape() as tape:
        tape.watch(image)
        score = tf.reduce_sum(path(image, SEED)[:, 0])
    return tape.gradient(score, image).numpy()


def test_model_behind_a_file_has_its_paths_and_both_activations(denoiser):
    keras.utils.set_random_seed(0)
    model, given = as_paths(classifier()), preprocessing.preprocessor(denoiser)
    preprocessing.check_preprocessor(given, IMAGE)
    behind = preprocessing.preprocessed(model, given)
    assert set(behind.attack_paths) == {"exact", "bpda_identity", "oblivious"}
    assert behind.name == "smooth+mine" and len(behind.digest) == 64
    assert behind.digest not in (model.digest, given.digest, preprocessing.preprocessed(behind, given).digest)
    smooth = keras.models.load_model(denoiser)(IMAGE)
    plain = model.attack_paths["exact"]
    for name, image in {"exact": smooth, "bpda_identity": smooth, "oblivious": IMAGE}.items():
        np.testing.assert_allclose(behind.attack_paths[name](tf.constant(IMAGE), SEED), plain(image, SEED), atol=1e-5)
    np.testing.assert_allclose(behind.activations(IMAGE)["logits"], plain(smooth, SEED), atol=1e-5)
    np.testing.assert_allclose(behind.bare(IMAGE)["embedding"], model.activations(IMAGE)["embedding"], atol=1e-6)
    np.testing.assert_allclose(behind.class_activation(IMAGE), model.class_activation(smooth), atol=1e-5)
    np.testing.assert_allclose(behind.bare_class_activation(IMAGE), model.class_activation(IMAGE), atol=1e-6)
    through, past = (gradient(behind.attack_paths[name], IMAGE) for name in ("exact", "bpda_identity"))
    assert np.abs(through).max() > 0 and not np.allclose(through, past)
    np.testing.assert_allclose(past, gradient(plain, smooth), atol=1e-6)
    check_fits(behind, (8, 8, 1), 3, "digits")


@pytest.mark.parametrize("name", ["jpeg", "total_variance"])
def test_transform_of_a_library_is_repeatable_and_followed_by_a_stand_in(name):
    pytest.importorskip("art")
    given = preprocessing.preprocessor(name)
    preprocessing.check_preprocessor(given, IMAGE)
    made = given.purify(tf.constant(IMAGE), SEED).numpy()
    assert made.dtype == np.float32 and not np.allclose(made, IMAGE, atol=1e-3)
    state = np.random.get_state()[1].copy()
    np.testing.assert_array_equal(given.purify(tf.constant(IMAGE[2:4]), SEED), made[2:4])
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # nobody else's draws are touched
    model = as_paths(classifier())
    behind = preprocessing.preprocessed(model, given)
    assert set(behind.attack_paths) == {"exact", "oblivious"} and behind.name == f"{name}+mine"
    compiled = tf.function(behind.attack_paths["exact"])
    np.testing.assert_allclose(compiled(tf.constant(IMAGE), SEED), model.attack_paths["exact"](made, SEED), atol=1e-5)
    expected = gradient(model.attack_paths["exact"], made)
    np.testing.assert_allclose(gradient(behind.attack_paths["exact"], IMAGE), expected, atol=1e-6)
    told = gradient(lambda image, _: behind.activations(image)["logits"], IMAGE)
    np.testing.assert_allclose(told, expected, atol=1e-6)


def test_jpeg_leaves_grey_images_as_they_are():
    pytest.importorskip("art")
    grey = np.repeat(np.arange(256, dtype=np.float32) / 255, 64).reshape(256, 8, 8, 1)
    made = preprocessing.preprocessor("jpeg").purify(tf.constant(grey), None).numpy()
    assert np.abs(made - grey).max() <= 1.5 / 255
    assert abs((made - grey).mean()) < 0.1 / 255  # rounded, not cut off


def test_library_that_is_missing_is_named_with_how_to_install_it(monkeypatch):
    monkeypatch.setattr(preprocessing, "has_art", lambda: False)
    with pytest.raises(UsageError, match=r"need adversarial-robustness-toolbox, which is not installed; .*\[bench\]"):
        preprocessing.preprocessor("jpeg")


@pytest.mark.parametrize(
    "layers, shape, message",
    [
        (
            [keras.layers.AveragePooling2D(2)],
            (8, 8, 1),
            r"makes \(6, 4, 4, 1\) of \(6, 8, 8, 1\), not images of the same",
        ),
        ([keras.layers.Rescaling(2.0)], (8, 8, 1), r"makes pixels from .* to 2, not in \[0, 1\]; end it by clipping"),
        ([keras.layers.Rescaling(float("nan"))], (8, 8, 1), "pixels that are NaN or infinite"),
        ([keras.layers.ReLU()], (32, 32, 3), r"takes images \(32, 32, 3\), but those of the data are \(8, 8, 1\)"),
    ],
)
def test_what_makes_no_images_is_refused_in_one_line(layers, shape, message, tmp_path):
    given = preprocessing.preprocessor(saved(tmp_path / "bad.keras", *layers, shape=shape))
    with pytest.raises(InputError, match=message) as raised:
        preprocessing.check_preprocessor(given, IMAGE)
    assert "\n" not in str(raised.value) and "preprocessor bad" in str(raised.value)


@keras.saving.register_keras_serializable(package="kerasdefense_tests")
class Hides(keras.Model):
    """Leaves out blocks at random, and blurs what is left."""

    is_randomized = True

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.transform = RandomTransform(1, missing_rate=0.5, block_size=2)
        self.blur = keras.layers.AveragePooling2D(3, 1, "same")

    def call(self, image, training=False, seed=None):
        return self.blur(self.transform(image, seed)[0])

    def get_config(self):
        return {"name": self.name}


def test_model_behind_a_file_that_draws_at_random_draws_by_seeds(tmp_path):
    hides = Hides()
    hides(IMAGE, seed=SEED)
    hides.save(tmp_path / "hides.keras")
    given = preprocessing.preprocessor(str(tmp_path / "hides.keras"))
    assert given.is_randomised
    preprocessing.check_preprocessor(given, IMAGE)
    model = as_paths(classifier())
    behind = preprocessing.preprocessed(model, given)
    assert behind.is_randomised and behind.activations is None and behind.features is None
    assert set(behind.attack_paths) == {"exact", "bpda_identity", "oblivious", "fixed_noise"}
    seed = tf.constant(np.arange(2 * len(IMAGE)).reshape(-1, 2), tf.int32)
    image, plain = tf.constant(IMAGE), model.attack_paths["exact"]
    for name in ("exact", "bpda_identity"):
        expected = plain(hides(image, seed=seed), seed)
        np.testing.assert_allclose(tf.function(behind.attack_paths[name])(image, seed), expected, atol=1e-5)
    still = plain(hides(image, seed=tf.ones_like(seed)), seed)
    np.testing.assert_allclose(behind.attack_paths["fixed_noise"](image, seed), still, atol=1e-5)
    np.testing.assert_allclose(behind.attack_paths["oblivious"](image, seed), plain(image, seed), atol=1e-6)
    chunk = Chunk(IMAGE, np.zeros(len(IMAGE), np.int32), np.arange(len(IMAGE), dtype=np.int32))
    assert randomised.look(behind.attack_paths["exact"], chunk, seed=0) == {"differs": True, "keyed": True}
    with pytest.raises(UsageError, match="needs a model that draws nothing at random"):
        preprocessing.preprocessed(behind, given)


def test_model_behind_what_declares_nothing_declares_nothing(denoiser):
    """It may draw at random all the same, and is looked at."""
    model = as_paths(classifier())._replace(is_randomised=False)
    given = preprocessing.preprocessor(denoiser)
    assert not given.is_randomised and preprocessing.preprocessed(model, given).is_randomised is None


def test_file_that_is_not_there_and_model_that_draws_are_refused(tmp_path, denoiser):
    with pytest.raises(InputError, match=r"--evaluate_preprocessor=.*none.keras: no such file or folder"):
        preprocessing.preprocessor(str(tmp_path / "none.keras"))
    with pytest.raises(UsageError, match="needs a model that draws nothing at random"):
        preprocessing.preprocessed(Loaded({}, is_randomised=True), preprocessing.preprocessor(denoiser))
