from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import tensorflow as tf

from kerasdefense.detectors import MSP, ODIN
from kerasdefense.types import UsageError

_random = np.random.default_rng(0)
IMAGE = _random.uniform(size=[5, 2, 3, 1]).astype(np.float32)
WEIGHTS = _random.normal(size=[6, 4]).astype(np.float32)


def classifier(image):
    return {"logits": tf.reshape(image, [-1, 6]) @ WEIGHTS}


def transcribed(image, temperature, step):
    """Return the score of the linear classifier in NumPy, whose gradient is known: (softmax - one-hot) W^T / T."""
    flat, weights = np.reshape(np.float64(image), [-1, 6]), np.float64(WEIGHTS)
    probability = scipy.special.softmax(flat @ weights / temperature, axis=1)
    gradient = (probability - np.eye(4)[np.argmax(flat @ weights, axis=1)]) @ weights.T / temperature
    stepped = np.clip(flat - step * np.where(gradient >= 0, 1, -1), 0, 1)
    return -scipy.special.softmax(stepped @ weights / temperature, axis=1).max(axis=1)


@pytest.mark.parametrize("temperature, step", [(1.0, 0.0), (1.0, 0.1), (3.0, 0.5), (1000.0, 0.0014)])
def test_odin_matches_numpy_on_a_linear_classifier(temperature, step):
    score = ODIN(temperature, step).score_image(classifier, IMAGE)
    np.testing.assert_allclose(score, transcribed(IMAGE, temperature, step), rtol=1e-5)


def test_odin_without_step_at_temperature_one_is_msp():
    # evaluation 13: ODIN nu=0, T=1 == MSP.
    score = ODIN(temperature=1, step=0).score_image(classifier, IMAGE)
    np.testing.assert_array_equal(score, MSP().score(classifier(IMAGE)))


def test_odin_step_raises_the_confidence():
    scores = [ODIN(temperature=1, step=step).score_image(classifier, IMAGE).numpy() for step in (0, 0.05, 0.1)]
    assert (scores[2] < scores[1]).all() and (scores[1] < scores[0]).all()


def test_odin_keeps_the_image_in_the_box_and_takes_the_sign_of_zero_as_one():
    seen = []

    def constant(image):
        seen.append(image.numpy())
        return {"logits": tf.zeros([2, 3])}

    image = np.float32([[0.0, 0.05, 1.0], [0.5, 0.1, 0.9]])
    ODIN(step=0.1).score_image(constant, image)
    np.testing.assert_array_equal(seen[0], image)
    np.testing.assert_allclose(seen[1], [[0, 0, 0.9], [0.4, 0, 0.8]], atol=1e-6)


def test_odin_gradient_takes_the_step_as_a_constant():
    # Against that of MSP at the stepped image, which is inside the box.
    image, temperature, step = tf.constant(0.2 + 0.6 * IMAGE), 2.0, 0.1
    stepped = []

    def watched(image):
        stepped.append(image)
        return classifier(image)

    with tf.GradientTape() as tape:
        tape.watch(image)
        score = ODIN(temperature, step).score_image(watched, image)
    gradient = tape.gradient(score, image)
    fixed = tf.constant(stepped[1].numpy())
    with tf.GradientTape() as tape:
        tape.watch(fixed)
        score = MSP().score({"logits": classifier(fixed)["logits"] / temperature})
    np.testing.assert_allclose(gradient, tape.gradient(score, fixed), rtol=1e-5)
    assert np.abs(gradient).max() > 1e-3


def test_odin_stand_in_leaves_the_step_out():
    score = ODIN(temperature=3.0, step=0.3).stand_ins()["unperturbed"](classifier(IMAGE))
    probability = -transcribed(IMAGE, 3.0, 0.0)
    np.testing.assert_allclose(score, np.log((1 - probability) / probability), rtol=1e-4)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": -1}, {"step": -0.1}, {"step": float("nan")}])
def test_odin_settings_are_checked(settings):
    (name,) = settings
    with pytest.raises(UsageError, match=f"{name}.* must be a finite number"):
        ODIN(**settings)
