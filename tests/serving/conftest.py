"""A small model behind a server, over gRPC and REST, and defenses that are exported as a run exports them."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import NamedTuple, Optional

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from kerasdefense import backbones, config, export
from kerasdefense.attacks import PGD
from kerasdefense.defenses import Defense, Standard
from kerasdefense.detectors import DETECTORS
from kerasdefense.detectors.rejection import RejectOption

from . import contract
from .stub import serving


class Sample(NamedTuple):
    """A linear classifier of digits, unseen images float32 [n, 8, 8, 1] with labels, and its folder of versions."""

    module: contract.Digits
    image: np.ndarray
    label: np.ndarray
    folder: object


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    data = load_digits()
    image, label = (data.images[..., None] / 16).astype(np.float32), data.target.astype(np.int32)
    fitted = LogisticRegression(max_iter=200).fit(image[:1000].reshape(-1, 64), label[:1000])
    module = contract.Digits(fitted.coef_.T, fitted.intercept_)
    folder = tmp_path_factory.mktemp("served") / "digits"
    contract.save(folder / "1", module)
    contract.save(folder / "2", contract.Digits(-fitted.coef_.T, fitted.intercept_))
    return Sample(module, image[1000:], label[1000:], folder)


@pytest.fixture(scope="session")
def server(digits):
    """Versions 1 and 2, of which 1 is `stable`, at a stub: TensorFlow Serving needs a configuration for labels."""
    with serving(digits.folder, labels={"stable": 1}) as found:
        yield found


@pytest.fixture(params=["grpc", "rest"])
def address(server, request):
    return getattr(server, request.param)


class Exported(NamedTuple):
    """A defense of digits with a detector or none, the folder of its only version, and unseen images with labels."""

    defense: Defense
    reject: Optional[RejectOption]
    version: Path
    levels: np.ndarray
    label: np.ndarray

    @property
    def image(self):
        """The images float32 [n, 8, 8, 1], as the model sees the files."""
        return self.levels / np.float32(255)

    @property
    def files(self):
        return [png(each) for each in self.levels]

    @property
    def examples(self):
        return [example(*each) for each in zip(self.files, self.label)]

    def expected(self):
        """Return what the model itself says of the images, in process and without a signature."""
        logits = self.defense(self.image, training=False).numpy()
        probabilities = tf.nn.softmax(logits).numpy()
        if self.reject is None:
            score, accepted = 1 - probabilities.max(axis=1), np.ones(len(logits), bool)
        else:
            score = self.reject.detector.score_image(self.defense.activations, tf.constant(self.image)).numpy()
            accepted = score <= self.reject.threshold
        found = {"logits": logits, "probabilities": probabilities, "label": logits.argmax(axis=1)}
        names = np.array([f"digit {label}".encode() for label in found["label"]], object)
        valid = np.ones(len(logits), bool)
        return {**found, "class_name": names, "anomaly_score": score, "accepted": accepted, "valid": valid}

    def check(self, outputs, rows=slice(None), *, has_names=True):
        """Assert that outputs, arrays by name, are what the model itself says of these rows of the images."""
        expected = self.expected()
        if not has_names:
            del expected["class_name"]
        assert set(outputs) == set(expected)
        for name, each in expected.items():
            if each.dtype == np.float32:
                np.testing.assert_allclose(outputs[name], each[rows], rtol=1e-4, atol=1e-5, err_msg=name)
            else:
                np.testing.assert_array_equal(outputs[name], each[rows], err_msg=name)


def png(levels):
    stream = io.BytesIO()
    Image.fromarray(levels[..., 0]).save(stream, "PNG")
    return stream.getvalue()


def example(file, label):
    """Return a serialised example with an image file and its label."""
    feature = {
        "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[file])),
        "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
    }
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


@pytest.fixture(scope="session")
def exported_defenses(tmp_path_factory):
    """Return what exports a classifier of digits, without a detector or with one that accepts about half of the images.

    Of the unseen images every fourth is one that it gets wrong.
    """
    keras.utils.set_random_seed(1)
    data = load_digits()
    levels, label = np.rint(data.images[..., None] * 255 / 16).astype(np.uint8), data.target.astype(np.int32)
    backbone = backbones.build(config.Backbone(name="small_cnn", width=4), image_shape=(8, 8, 1), classes=10)
    defense = Standard(backbone, attack=PGD(epsilon=0.1, steps=1))
    defense.compile(keras.optimizers.Adam(0.02))
    image = levels / np.float32(255)
    defense.fit(image[:1000], label[:1000], batch_size=100, epochs=2, verbose=0)
    is_right = defense(image[1000:], training=False).numpy().argmax(axis=1) == label[1000:]
    chosen = 1000 + np.concatenate([np.flatnonzero(is_right)[:24], np.flatnonzero(~is_right)[:8]])
    chosen = chosen.reshape(4, 8).T.ravel()
    activations = {key: each.numpy() for key, each in defense.activations(image[:1000]).items()}
    head = tuple(each.numpy() for each in backbone.get_layer("logits").weights)

    @functools.cache
    def exported(detector):
        reject = None
        if detector:
            fitted = DETECTORS[detector]().fit(activations, label[:1000], head)
            threshold = float(np.median(fitted.score(activations)))
            reject = RejectOption(detector, fitted, threshold, 0.5, "clean", None, (1000, 1000))
        labels = [f"digit {number}" for number in range(10)]
        card = export.card(
            config.Run(), results=None, labels=labels, image_shape=(8, 8, 1), versions={"python": "3.10"}
        )
        card |= {"rejection": reject.described()} if reject else {}
        folder = tmp_path_factory.mktemp("exported") / "digits"
        version = export.save(defense, folder, labels=labels, version=0, card=card, reject=reject)
        export.write_bundle(folder)
        return Exported(defense, reject, version, levels[chosen], label[chosen])

    return exported


@pytest.fixture(scope="session", params=["", "mahalanobis"], ids=["alone", "with_detector"])
def exported_defense(exported_defenses, request):
    return exported_defenses(request.param)
