"""The closed form: one adversarial SGD step of a linear classifier, worked out with NumPy, on one and two replicas."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense.attacks import FGSM
from kerasdefense.defenses import PGDAT
from kerasdefense.training import mirrored

EPSILON, RATE, BATCH, SIDE, CLASSES = 0.1, 0.5, 8, 3, 2
REPLICAS = ("/device:CPU:0", "/device:CPU:1")


def linear_backbone():
    image = keras.Input((SIDE, SIDE, 1), name="image")
    embedding = keras.layers.Flatten()(image)
    logits = keras.layers.Dense(CLASSES, name="logits")(embedding)
    return keras.Model(image, {"feature_map": image, "embedding": embedding, "logits": logits})


def softmax(logits):
    exponent = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponent / exponent.sum(axis=1, keepdims=True)


def expected_step(kernel, bias, image, label):
    """With two classes the cross-entropy rises along w_other - w_label, so FGSM's step is known in closed form."""
    flat = image.reshape(BATCH, -1)
    rise = kernel[:, 1 - label] - kernel[:, label]
    flat_adv = np.clip(flat + EPSILON * np.sign(rise).T, 0, 1)
    error = (softmax(flat_adv @ kernel + bias) - np.eye(CLASSES)[label]) / BATCH
    return kernel - RATE * flat_adv.T @ error, bias - RATE * error.sum(axis=0)


@pytest.mark.parametrize("replicas", [1, 2])
def test_pgd_at_step_equals_closed_form(replicas):
    random = np.random.default_rng(7)
    image = random.uniform(size=(BATCH, SIDE, SIDE, 1)).astype(np.float32)
    label = random.integers(CLASSES, size=BATCH).astype(np.int32)
    kernel = random.normal(size=(SIDE * SIDE, CLASSES)).astype(np.float32)
    bias = random.normal(size=CLASSES).astype(np.float32)
    with mirrored(REPLICAS[:replicas]).scope():
        defense = PGDAT(linear_backbone(), attack=FGSM(epsilon=EPSILON))
        defense.compile(keras.optimizers.SGD(RATE))
    defense.backbone.get_layer("logits").set_weights([kernel, bias])
    data = tf.data.Dataset.from_tensors({"image": image, "label": label, "index": np.arange(BATCH)})
    defense.fit(data.unbatch().batch(BATCH), verbose=0)
    found = defense.backbone.get_layer("logits").get_weights()
    for value, expected in zip(found, expected_step(kernel, bias, image, label)):
        np.testing.assert_allclose(value, expected, atol=1e-6)
    assert defense.step.numpy() == 1
