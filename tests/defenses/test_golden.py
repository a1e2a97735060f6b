"""One SGD step of a linear classifier, worked out with NumPy alone, on one and two replicas."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense.attacks import FGSM, PGD
from kerasdefense.defenses import MART, PGDAT, TRADES
from kerasdefense.training import mirrored

EPSILON, RATE, BATCH, SIDE, CLASSES = 0.1, 0.5, 8, 3, 2
REPLICAS = ("/device:CPU:0", "/device:CPU:1")


def linear_backbone(classes=CLASSES):
    image = keras.Input((SIDE, SIDE, 1), name="image")
    embedding = keras.layers.Flatten()(image)
    logits = keras.layers.Dense(classes, name="logits")(embedding)
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


def log_softmax(logits):
    return logits - logits.max(axis=1, keepdims=True) - np.log(softmax_sum(logits))


def softmax_sum(logits):
    return np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True)


def kl(logits, logits_adv):
    return (softmax(logits) * (log_softmax(logits) - log_softmax(logits_adv))).sum(axis=1)


def pgd_at_loss(logits, logits_adv, label):
    return -log_softmax(logits_adv)[np.arange(len(label)), label]


def trades_loss(logits, logits_adv, label):
    """Equation 5 of TRADES, with beta 6."""
    return pgd_at_loss(None, logits, label) + 6 * kl(logits, logits_adv)


def mart_loss(logits, logits_adv, label):
    """The loss of MART's authors: the runner-up is found by sorting, as they do; beta 5."""
    rows = np.arange(len(label))
    order = np.argsort(logits_adv, axis=1)
    runner_up = np.where(order[:, -1] == label, order[:, -2], order[:, -1])
    boosted = pgd_at_loss(None, logits_adv, label) - np.log(1.0001 - softmax(logits_adv)[rows, runner_up])
    return boosted + 5 * kl(logits, logits_adv) * (1 - softmax(logits)[rows, label])


def slope(function, weights, step=1e-5):
    """Return the gradient of a function of some arrays by central differences, in float64."""
    gradients = []
    for array in weights:
        gradient = np.zeros_like(array)
        for place in np.ndindex(array.shape):
            kept = array[place]
            array[place] = kept + step
            above = function()
            array[place] = kept - step
            gradient[place] = (above - function()) / (2 * step)
            array[place] = kept
        gradients.append(gradient)
    return gradients


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("awp_gamma", [0.0, 0.1])
@pytest.mark.parametrize(
    ("kind", "loss"), [(PGDAT, pgd_at_loss), (TRADES, trades_loss), (MART, mart_loss)], ids=["pgd_at", "trades", "mart"]
)
def test_step_equals_numpy_transcription(kind, loss, awp_gamma, replicas):
    classes = 4
    random = np.random.default_rng(11)
    data = {
        "image": random.uniform(size=(BATCH, SIDE, SIDE, 1)).astype(np.float32),
        "label": random.integers(classes, size=BATCH).astype(np.int32),
        "index": np.arange(BATCH, dtype=np.int32),
    }
    weights = [random.normal(size=(SIDE * SIDE, classes)), random.normal(size=classes)]
    with mirrored(REPLICAS[:replicas]).scope():
        defense = kind(linear_backbone(classes), attack=PGD(epsilon=EPSILON, steps=2, keep="last"), awp_gamma=awp_gamma)
        defense.compile(keras.optimizers.SGD(RATE))
    defense.backbone.get_layer("logits").set_weights(weights)
    image_adv = defense.craft(defense.unpack(data), defense.attack).numpy()

    def mean_loss():
        kernel, bias = weights
        clean, adversarial = (each.reshape(BATCH, -1).astype(float) for each in (data["image"], image_adv))
        logits, logits_adv = clean @ kernel + bias, adversarial @ kernel + bias
        return loss(logits, logits_adv, data["label"]).mean()

    expected_loss, gradients = mean_loss(), slope(mean_loss, weights)
    if awp_gamma:  # the bias is no kernel
        kernel, ascent = weights[0].copy(), gradients[0]
        weights[0] += awp_gamma * np.linalg.norm(kernel) / np.linalg.norm(ascent) * ascent
        expected_loss, gradients = mean_loss(), slope(mean_loss, weights)
        weights[0][:] = kernel
    history = defense.fit(tf.data.Dataset.from_tensor_slices(data).batch(BATCH), verbose=0).history
    assert sum(history[term][0] for term in defense.terms) == pytest.approx(expected_loss, rel=1e-5)
    for value, start, gradient in zip(defense.backbone.get_layer("logits").get_weights(), weights, gradients):
        np.testing.assert_allclose(value, start - RATE * gradient, atol=2e-5)
