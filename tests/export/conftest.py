"""A small trained defense, its export, and image files to feed it."""

import functools
import io

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from kerasdefense import backbones, config, export
from kerasdefense.attacks import PGD
from kerasdefense.defenses import PGDAT, Standard
from kerasdefense.detectors import DETECTORS
from kerasdefense.detectors.rejection import RejectOption
from kerasdefense.layers import RandomTransform

SHAPE = (8, 8, 3)
LABELS = ("cat", "dög", "bird")


def make_defense(kind=PGDAT, image_shape=SHAPE):
    keras.utils.set_random_seed(1)
    backbone = backbones.build(config.Backbone(name="small_cnn", width=4), image_shape=image_shape, classes=len(LABELS))
    defense = kind(backbone, attack=PGD(epsilon=0.1, steps=2, keep="last"))
    defense.compile(keras.optimizers.Adam(0.01))
    return defense


@keras.saving.register_keras_serializable(package="kerasdefense_tests")
class NoisyPurifier(keras.Model):
    """Images with noise and blocks left out, mixed from channel to channel."""

    is_randomized = True

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.transform = RandomTransform(2, sigma=0.2, block_size=2)
        self.mix = keras.layers.Conv2D(SHAPE[2], 1, activation="sigmoid")
        self(keras.Input(SHAPE))

    def call(self, image, training=False, seed=None):
        return self.mix(self.transform(image, seed)[0])

    def get_config(self):
        return {"name": self.name}


class Noisy(Standard):
    """Draws at random before it classifies."""

    is_randomized = True

    def __init__(self, backbone, **kwargs):
        super().__init__(backbone, **kwargs)
        self.front = NoisyPurifier()

    def call(self, image, training=False, seed=None):
        return self.backbone(self.front(image, seed=seed), training=training)["logits"]

    def purification(self):
        return self.front


@pytest.fixture(scope="session")
def make():
    return make_defense


@pytest.fixture(scope="session")
def noisy():
    return make_defense(Noisy)


@pytest.fixture(scope="session")
def noisy_versions(noisy, card, tmp_path_factory):
    """Return the export of a defense that draws at random, without and with what diagnoses it."""
    folder = tmp_path_factory.mktemp("noisy")
    return [
        export.save(noisy, folder, labels=LABELS, version=0, card=card, diagnostics=diagnostics)
        for diagnostics in (False, True)
    ]


@pytest.fixture(scope="session")
def labels():
    return LABELS


@pytest.fixture(scope="session")
def pixels():
    """Six images of random grey levels, uint8 [6, 8, 8, 3]."""
    return np.random.default_rng(2).integers(0, 256, (6, *SHAPE), np.uint8)


@pytest.fixture(scope="session")
def defense(pixels):
    defense = make_defense()
    label = np.arange(6, dtype=np.int32) % 3
    defense.fit(pixels / np.float32(255), label, batch_size=3, epochs=2, verbose=0)
    return defense


@pytest.fixture(scope="session")
def reject_option(defense):
    """Return a function that fits a detector to random images and sets its threshold at their median score."""

    @functools.cache
    def reject_option(name):
        random = np.random.default_rng(7)
        image = random.random((90, *SHAPE)).astype(np.float32)
        activations = {key: each.numpy() for key, each in defense.activations(image).items()}
        settings = {"knn": {"k": 5}}.get(name, {})
        head = [each.numpy() for each in defense.backbone.get_layer("logits").weights]
        detector = DETECTORS[name](**settings).fit(activations, activations["logits"].argmax(axis=1), tuple(head))
        threshold = float(np.median(detector.score_image(defense.activations, tf.constant(image))))
        return RejectOption(name, detector, threshold, 0.5, "clean", None, (90, 90))

    return reject_option


@pytest.fixture(scope="session")
def card():
    return export.card(config.Run(), results=None, labels=LABELS, image_shape=SHAPE, versions={"python": "3.10"})


@pytest.fixture(scope="session")
def version(defense, card, tmp_path_factory):
    return export.save(defense, tmp_path_factory.mktemp("saved_model"), labels=LABELS, version=0, card=card)


@pytest.fixture(scope="session")
def signatures(version):
    return tf.saved_model.load(str(version)).signatures


@pytest.fixture(scope="session")
def encode():
    """Return the bytes of an image file with these pixels."""

    def encode(pixels, kind="PNG", mode=None, **options):
        image = Image.fromarray(np.squeeze(pixels))
        file = io.BytesIO()
        (image.convert(mode) if mode else image).save(file, kind, **options)
        return file.getvalue()

    return encode


@pytest.fixture(scope="session")
def read():
    """Return a function from image files to the pixels that a model of a given input gets to see."""

    @functools.cache
    def reader(image_shape):
        image = keras.Input(image_shape, name="image")
        flat = keras.layers.Flatten()(image)
        backbone = keras.Model(image, {"feature_map": image, "embedding": flat, "logits": flat})
        labels = [str(number) for number in range(flat.shape[-1])]
        return export.serving_module(Standard(backbone, attack=PGD()), labels).image_bytes

    def read(files, image_shape):
        return reader(image_shape)(tf.constant(files))["logits"].numpy().reshape(-1, *image_shape)

    return read
