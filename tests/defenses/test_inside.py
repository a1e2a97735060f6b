"""Cosines of the embedding with frozen axes, which every defense of such a backbone tells."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import PGD, backbones
from kerasdefense.defenses import DFA, Standard
from kerasdefense.defenses.batch import Batch

ATTACK = PGD(epsilon=0.1, steps=1, keep="last")


@pytest.fixture(scope="module")
def backbone():
    keras.utils.set_random_seed(2)
    return backbones.small_cnn((8, 8, 1), 3, width=2)


@pytest.fixture(scope="module")
def batch():
    image = np.random.default_rng(0).random((5, 8, 8, 1), np.float32)
    return Batch(tf.constant(image), tf.constant([0, 2, 1, 1, 0]), tf.range(5))


@pytest.mark.parametrize("method", [DFA, Standard])
def test_cosines_with_axes_are_those_of_the_logits(method, backbone, batch):
    defense = method(backbones.with_orthogonal_head(backbone, seed=1), attack=ATTACK)
    image_adv = tf.clip_by_value(batch.image + 0.1, 0, 1)
    found = defense.internals(batch, image_adv, ATTACK, 0)
    rows, label = np.arange(5), batch.label.numpy()
    for prefix, image in (("", batch.image), ("adversarial_", image_adv)):
        logits = defense(image).numpy()
        np.testing.assert_allclose(found[f"{prefix}cosine_to_own_axis"], logits[rows, label], atol=1e-6)
        others = [np.delete(row, number).mean() for row, number in zip(logits, label)]
        np.testing.assert_allclose(found[f"{prefix}cosine_to_other_axes"], others, atol=1e-6)
    assert len(found) == 4 and not np.allclose(found["cosine_to_own_axis"], found["adversarial_cosine_to_own_axis"])


def test_gain_and_sign_of_the_logits_are_not_in_the_cosine(backbone, batch):
    signed = backbones.with_orthogonal_head(backbone, use_abs=False, seed=1)
    head = backbones.orthogonal_head(signed)
    expected = Standard(signed, attack=ATTACK).internals(batch, batch.image, ATTACK, 0)
    head.gain = 3.0
    head.kernel.assign(3 * head.kernel)
    found = Standard(signed, attack=ATTACK).internals(batch, batch.image, ATTACK, 0)
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], atol=1e-6)
        assert np.min(values) >= 0


def test_trained_heads_have_no_axes(backbone, batch):
    assert Standard(backbone, attack=ATTACK).internals(batch, batch.image, ATTACK, 0) == {}
