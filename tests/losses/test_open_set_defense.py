"""The losses of an open-set defense network and its peer, against NumPy and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from scipy import special, stats

from kerasdefense import losses

BATCH, CLASSES = 5, 4


@pytest.fixture(scope="module")
def inputs():
    random = np.random.default_rng(0)
    logits, peer_logits, rotation_logits = random.normal(size=(3, BATCH, CLASSES)).astype(np.float32)
    return {
        "logits": logits,
        "label": random.integers(CLASSES, size=BATCH),
        "rotation_logits": rotation_logits,
        "rotation": random.integers(4, size=BATCH),
        "reconstruction": random.uniform(-1, 1, size=(BATCH, 2, 2, 3)).astype(np.float32),
        "image": random.uniform(size=(BATCH, 2, 2, 3)).astype(np.float32),
        "peer_logits": peer_logits,
    }


def cross_entropy(logits, label):
    return -special.log_softmax(logits, axis=1)[np.arange(BATCH), label]


def divergence(logits, of):
    return stats.entropy(special.softmax(logits, axis=1), special.softmax(of, axis=1), axis=1)


# osdn_caml 6, 9: the four terms of the defense, each with its weight
def test_terms_of_the_defense_are_those_of_the_figure(inputs):
    terms = losses.open_set_defense_terms(**inputs, w_cls=0.5, w_rot=2.0, w_rec=3.0, w_kl=4.0)
    expected = {
        "cross_entropy_loss": 0.5 * cross_entropy(inputs["logits"], inputs["label"]),
        "rotation_loss": 2 * cross_entropy(inputs["rotation_logits"], inputs["rotation"]),
        "reconstruction_loss": 3 * np.mean((inputs["reconstruction"] - (2 * inputs["image"] - 1)) ** 2, axis=(1, 2, 3)),
        "kl_divergence_loss": 4 * divergence(inputs["peer_logits"], inputs["logits"]),
    }
    assert list(terms) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(terms[name], values, rtol=1e-4)
    alone = losses.open_set_defense_terms(**{**inputs, "peer_logits": None})
    assert list(alone) == list(expected)[:3]


def test_terms_of_the_peer_are_its_cross_entropy_and_the_other_divergence(inputs):
    peer_logits, label, logits = (inputs[name] for name in ("peer_logits", "label", "logits"))
    terms = losses.peer_terms(peer_logits, label, logits, w_cls=0.5, w_kl=4.0)
    np.testing.assert_allclose(terms["peer_cross_entropy_loss"], 0.5 * cross_entropy(peer_logits, label), rtol=1e-4)
    np.testing.assert_allclose(terms["peer_kl_divergence_loss"], 4 * divergence(logits, peer_logits), rtol=1e-4)


# osdn_caml 7: each descends by its own logits alone
def test_no_gradient_flows_into_the_other_network(inputs):
    given = {name: tf.constant(each) for name, each in inputs.items()}
    logits, peer_logits = given["logits"], given["peer_logits"]
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([logits, peer_logits])
        of_defense = tf.add_n(list(losses.open_set_defense_terms(**given).values()))
        of_peer = tf.add_n(list(losses.peer_terms(peer_logits, given["label"], logits).values()))
    assert tape.gradient(of_defense, peer_logits) is None and tape.gradient(of_peer, logits) is None
    assert np.abs(tape.gradient(of_defense, logits)).min() > 0 and np.abs(tape.gradient(of_peer, peer_logits)).min() > 0
