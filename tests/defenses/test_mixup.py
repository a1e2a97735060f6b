"""Mixup: its loss by hand, and what is left of it where nothing is mixed."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import scipy.special
import tensorflow as tf

from kerasdefense import UsageError, backbones, config
from kerasdefense.attacks import PGD
from kerasdefense.defenses import Mixup, Standard, mixing

SHAPE, CLASSES, BATCH = (8, 8, 1), 4, 8
ATTACK = PGD(epsilon=0.1, steps=1, keep="last")


def make(kind=Mixup, **kwargs):
    keras.utils.set_random_seed(3)
    architecture = config.Backbone(name="small_cnn", width=2)
    defense = kind(backbones.build(architecture, image_shape=SHAPE, classes=CLASSES), attack=ATTACK, **kwargs)
    defense.compile(keras.optimizers.SGD(0.2))
    return defense


def make_data():
    random = np.random.default_rng(7)
    return {
        "image": random.uniform(size=(BATCH, *SHAPE)).astype(np.float32),
        "label": random.integers(CLASSES, size=BATCH).astype(np.int32),
        "index": np.arange(BATCH, dtype=np.int32),
    }


@pytest.mark.parametrize("settings", [{}, {"mix_alpha": 0.3, "mix_per": "sample", "label_smoothing": 0.1}], ids=str)
def test_loss_is_the_cross_entropy_of_mixed_images_and_labels(settings):
    defense, batch = make(seed=5, **settings), make_data()
    alpha, per = settings.get("mix_alpha", 1.0), settings.get("mix_per", "batch")
    mixture = mixing.draw(batch["index"], 5, defense.step, alpha=alpha, per=per)
    partner, share = mixture.partner.numpy(), mixture.share.numpy()[:, None]
    image = share[..., None, None] * batch["image"] + (1 - share[..., None, None]) * batch["image"][partner]
    smoothing, target = settings.get("label_smoothing", 0.0), np.eye(CLASSES)[batch["label"]]
    target = (1 - smoothing) * (share * target + (1 - share) * target[partner]) + smoothing / CLASSES
    logits = defense.backbone(image, training=True)["logits"].numpy().astype(float)
    expected = -np.sum(target * scipy.special.log_softmax(logits, axis=1), axis=1).mean()
    found = defense.train_step(batch)
    assert list(found) == ["cross_entropy_loss"]
    assert float(found["cross_entropy_loss"]) == pytest.approx(expected, rel=1e-5)


def test_images_that_are_not_mixed_are_trained_on_as_they_are(monkeypatch):
    partner = tf.range(BATCH)[::-1]
    mixture = mixing.Mixture(tf.range(BATCH), partner, tf.ones([BATCH]), tf.constant([0, 0]))
    monkeypatch.setattr(mixing, "draw", lambda *given, **settings: mixture)
    mixup, standard = make(), make(Standard)
    found, expected = (each.train_step(make_data()) for each in (mixup, standard))
    assert float(found["cross_entropy_loss"]) == float(expected["cross_entropy_loss"])
    for one, two in zip(mixup.backbone.get_weights(), standard.backbone.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-7)


def test_shares_are_drawn_anew_in_each_step():
    defense = make()
    defense.compile(keras.optimizers.SGD(0.0))
    one, two = (float(defense.train_step(make_data())["cross_entropy_loss"]) for _ in range(2))
    assert abs(2 * two - 2 * one) > 1e-4 and int(defense.step) == 2  # the second is the mean of both


def test_mixup_crafts_nothing():
    assert make().attack_budget == 0 and Mixup.monitor == "clean_accuracy"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mix_alpha": -0.5}, "mix_alpha, .* must be finite and at least 0.05, not -0.5"),
        ({"mix_per": "image"}, "mix_per must be one of batch, sample, not 'image'"),
    ],
)
def test_mixup_refuses(settings, message):
    with pytest.raises(UsageError, match=f"{message}$"):
        make(**settings)
