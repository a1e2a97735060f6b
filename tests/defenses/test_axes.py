from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasdefense import backbones, evaluation
from kerasdefense.attacks import APGD, PGD
from kerasdefense.defenses import Standard
from kerasdefense.evaluation import Options, PlannedAttack, ThreatModel
from kerasdefense.evaluation.search import Search
from kerasdefense.types import UsageError

SEED = tf.zeros([6, 2], tf.int32)


@pytest.fixture(scope="module")
def defense():
    keras.utils.set_random_seed(1)
    backbone = backbones.small_cnn((8, 8, 1), 4, width=2)
    return Standard(backbones.with_orthogonal_head(backbone), attack=PGD(epsilon=0.3))


@pytest.fixture(scope="module")
def image():
    return tf.random.stateless_uniform([6, 8, 8, 1], [2, 3])


def test_property_25_signed_scores_are_logits_but_for_the_sign(defense, image):
    paths = defense.attack_paths()
    signed, exact = paths["signed"](image, SEED), paths["exact"](image, SEED)
    np.testing.assert_allclose(tf.abs(signed), exact, atol=1e-6)
    assert (signed.numpy() < 0).any()
    np.testing.assert_array_equal(exact, defense(image))


def test_property_25_smoothed_logits_are_logits_and_their_gradient_goes_to_that_of_the_logits(defense, image):
    paths = defense.attack_paths()
    upstream = tf.random.stateless_normal([6, 4], [4, 5])

    def gradient(name):
        with tf.GradientTape() as tape:
            tape.watch(image)
            logits = paths[name](image, SEED)
        np.testing.assert_allclose(logits, paths["exact"](image, SEED), atol=1e-6)
        return tape.gradient(logits, image, upstream)

    exact = gradient("exact")
    errors = [float(tf.norm(gradient(f"smoothed:{length}") - exact)) for length in ("0.1", "0.01", "0.001")]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01 * float(tf.norm(exact))


def test_other_heads_have_the_exact_path_only():
    keras.utils.set_random_seed(1)
    backbone = backbones.small_cnn((8, 8, 1), 4, width=2)
    signed = backbones.with_orthogonal_head(backbones.small_cnn((8, 8, 1), 4, width=2), use_abs=False)
    for each in (backbone, signed):
        assert list(Standard(each, attack=PGD(epsilon=0.3)).attack_paths()) == ["exact"]


def test_attacks_on_signed_and_smoothed_paths_and_features_break_images_in_the_ball(defense, image):
    label = tf.argmax(defense(image), axis=1).numpy()
    plan = [
        PlannedAttack("smoothed", APGD("linf", 0.3, steps=10), "margin", path="smoothed"),
        PlannedAttack("signed", APGD("linf", 0.3, steps=10, targets=6), "signed_target", path="signed"),
        PlannedAttack("features", APGD("linf", 0.3, steps=10), "feature_matching"),
    ]
    loaded = evaluation.as_paths(defense)

    def run(plan, features):
        settings = {
            "options": Options(chunk_size=8),
            "is_randomised": False,
            "sanity_examples": 0,
            "features": features,
        }
        data = (image.numpy(), label)
        return evaluation.evaluate(loaded.attack_paths, data, ThreatModel("linf", 0.3), plan, **settings)

    found = run(plan, loaded.features)["attacks"]
    assert [(each["name"], each["path"]) for each in found] == [
        ("smoothed", "smoothed:0.1"),
        ("smoothed", "smoothed:0.01"),
        ("smoothed", "smoothed:0.001"),
        ("signed", "signed"),
        ("features", "exact"),
    ]
    for each in found:
        assert each["accuracy"] < 1 and each["unconfirmed"] == 0, each["name"]
    plan = [*plan[2:], PlannedAttack("pgd1", PGD("linf", 0.3, steps=1))]
    without = run(plan, None)
    assert [each["name"] for each in without["attacks"]] == ["pgd1"] and without["flags"]["skipped"] == ["features"]


def test_plain_keras_model_with_axes_has_their_paths_too(defense, image):
    paths = evaluation.as_paths(defense.backbone).attack_paths
    assert set(paths) == set(defense.attack_paths())
    np.testing.assert_allclose(paths["signed"](image, SEED), defense.attack_paths()["signed"](image, SEED), atol=1e-6)


def test_attack_on_signed_scores_breaks_what_attacks_on_logits_turn_away_from():
    """The score of class 1 is 0.2 at a black image and -0.34 at one of grey 0.3; |score| falls first on the way."""

    def signed(image, seed):
        grey = tf.reduce_mean(image, axis=(1, 2, 3))
        return tf.stack([tf.fill(tf.shape(grey), 0.25), 0.2 - 6 * tf.square(grey)], axis=1)

    paths = {"exact": lambda image, seed: tf.abs(signed(image, seed)), "signed": signed}
    plan = [
        PlannedAttack("ce", APGD("linf", 0.3, steps=20)),
        PlannedAttack("margin", APGD("linf", 0.3, steps=20), "margin"),
        PlannedAttack("signed", APGD("linf", 0.3, steps=20, targets=2), "signed_target", path="signed"),
    ]
    data = np.zeros([2, 8, 8, 1], np.float32), np.zeros(2, np.int64)
    settings = {"options": Options(chunk_size=2), "is_randomised": False, "sanity_examples": 0}
    results = evaluation.evaluate(paths, data, ThreatModel("linf", 0.3), plan, **settings)
    assert [each["accuracy"] for each in results["attacks"]] == [1, 1, 0]


@pytest.mark.parametrize(("path", "targets"), [("exact", 2), ("signed", 3)])
def test_signed_targets_need_the_signed_path_and_both_ends(path, targets):
    planned = PlannedAttack("mine", APGD("linf", 0.3, targets=targets), "signed_target")
    with pytest.raises(UsageError, match=r"mine.* must maximise one of .*, not signed_target"):
        Search(planned, path, lambda image, seed: image, stream=0, seed=0, chunk_size=2)
