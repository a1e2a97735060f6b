"""Results of an evaluation under AutoAttack without running one, and a small classifier with unseen images."""

from __future__ import annotations

from typing import NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from kerasdefense.evaluation.report import note, wilson

RADII = (0, 1, 2, 4, 8, 16, 32, 64, 128, 255)
STANDING = (79, 75, 71, 63, 47, 20, 5, 1, 1, 1)
ATTACKS = (
    ("apgd_ce", "cross_entropy", 617, 377, 96.318, {"restarts": 1, "steps": 100, "targets": 0}),
    ("apgd_t", "targeted_dlr", 377, 344, 411.702, {"restarts": 1, "steps": 100, "targets": 9}),
    ("fab_t", "distance", 344, 344, 1102.944, {"restarts": 1, "steps": 100, "targets": 9}),
    ("square", "margin", 344, 344, 538.25, {"initial_share": 0.8, "queries": 5000}),
)
CHECKS = (
    ("S1", "accuracy at radius 0 is the clean accuracy", "pass", 0.0, 0.0, ""),
    ("S2", "accuracy does not rise with the radius", "pass", 0.0, 0.0078125, ""),
    (
        "S3",
        "accuracy at 128/255, where any image can be made grey, is chance",
        "pass",
        0.0078125,
        0.17954951288348658,
        "",
    ),
    ("S4", "nothing stands when any image may be swapped for any other", "fail", 0.0078125, 0.0, ""),
    (
        "S5",
        "a stronger attack leaves no higher accuracy",
        "pass",
        0.0,
        0.12246,
        "noise 60.9 %, FGSM 43.8 %, PGD-10 41.4 %",
    ),
    ("S6", "FGSM does not raise the accuracy (no label leaking)", "pass", -0.1796875, 0.1226, ""),
    (
        "S7",
        "100 steps of PGD for 50 break at most 0.5 points more",
        "pass",
        0.0,
        0.015625,
        "+0.00 points, loss +0.31 %",
    ),
    ("S8", "10 restarts of PGD for 5 break at most 0.5 points more", "pass", 0.0078125, 0.015625, ""),
    (
        "S9",
        "what sees no gradient breaks no image that gradients do not",
        "pass",
        0.0,
        0.002,
        "by the suite's own attacks",
    ),
    ("S10", "no input gradient is all zero or not finite", "pass", 0.0, 0.0, ""),
    ("S11", "no attack passed by an image that fools", "pass", 0.0, 0.0, ""),
    ("S12", "share of images whose loss still rises (reported)", "fail", 0.1139240506329114, 0.05, ""),
    ("S13", "the margin changes by at most 10 % under small noise", "pass", 0.04512, 0.1, ""),
    ("S14", "an unbounded gradient attack breaks every image", "pass", 0.0, 0.0, ""),
    ("S15", "images that only a blind search breaks (reported)", "pass", 0.0, 0.0, ""),
    ("S16", "planted goals", "not_run", None, None, "not part of the suite"),
    ("S17", "exact gradients are no weaker than the identity", "not_run", None, None, "the model names no path"),
)


def attack_entries(threat_model, count):
    entries = []
    broken = 0
    for name, objective, attacked, standing, seconds, settings in ATTACKS:
        broken = attacked - standing
        alone = wilson(617 - broken, count)
        entry = {"name": name, "path": "exact", "objective": objective, "draws": 1, "replaces": "", "unconfirmed": 0}
        entry |= {"threat_model": threat_model, "attacked": attacked, "accuracy": alone["value"], "ci95": alone["ci95"]}
        entry |= {"own_accuracy": alone}
        entry |= {"cascaded_accuracy": standing / count, "seconds": seconds, "settings": {**threat_model, **settings}}
        entries.append(entry)
    return entries


@pytest.fixture
def results():
    """Return the results of AutoAttack standard on 1,000 images, with a sanity item that failed."""
    threat_model = {"norm": "linf", "epsilon": 8 / 255}
    names = ("id", "asks", "status", "value", "threshold", "detail")
    sanity = [{**dict(zip(names, check)), "gates": check[0] not in ("S12", "S15")} for check in CHECKS]
    measured = {
        "threat_model": threat_model,
        "clean_accuracy": wilson(617, 1000),
        "robust_accuracy": wilson(344, 1000),
        "rounded_accuracy": wilson(345, 1000),
        "attacks": attack_entries(threat_model, 1000),
        "cascade": True,
        "complete": True,
        "curve": [{"epsilon": each / 255, **wilson(count, 128)} for each, count in zip(RADII, STANDING)],
        "sanity": sanity,
        "trusted": False,
        "randomised": None,
        "flags": {"differs": False, "keyed": True, "randomised": False, "classes": 10},
        "indices_sha256": "0f" * 32,
    }
    return {
        "schema_version": 2,
        **measured,
        "attack_budget": 1,
        "suite": "autoattack",
        "note": note(measured, "autoattack"),
        "config": {
            "mode": "evaluate",
            "strict": False,
            "data": {"name": "cifar10", "dir": "", "validation_fraction": 0.04},
            "attack": {"name": "fgsm_rs", "norm": "linf", "epsilon": 8 / 255, "steps": 0},
            "evaluate": {"suite": "autoattack", "examples": 1000, "seed": 7},
        },
        "versions": {"python": "3.10.13", "tensorflow": "2.15.1", "kerasdefense": "0.1.0"},
        "seed": 7,
        "model": {"name": "pgd_at_cifar10_mini", "digest": "a1" * 32},
        "adversarial_sha256": "b2" * 32,
    }


def separation(auroc):
    """Return what results.json says of scores that part known from unknown images so well."""
    figures = {"auroc": auroc, "auroc_ci95": [auroc - 0.0312, auroc + 0.0298], "aupr_in": 0.812, "aupr_out": 0.793}
    figures |= {"fpr_at_95_id_tpr": 0.4375, "fpr_at_95_ood_tpr": 0.3917, "detection_error": 0.171}
    return {**figures, "oscr": auroc * 0.7, "ccr_at_fpr_10": 0.288}


def detector_entry(sets, *, threshold, both_attacked, notes=(), reject=None):
    of_sets = {
        name: {**separation(0.83 - 0.01 * place), "accepted": wilson(97, 300), "f1_binary": 0.7421, "f1_macro": 0.6138}
        for place, name in enumerate(sets)
    }
    aurocs = {"clean": 0.8412, "known_attacked": 0.5533, "unknown_attacked": 0.4677, "both_attacked": both_attacked}
    known, unknown = wilson(171, 300), wilson(288, 300)
    cells = {
        key: {**separation(each), "known_accepted": known, "unknown_accepted": unknown} for key, each in aurocs.items()
    }
    means = {
        group: {key: each + 0.0007 for key, each in of_sets[name].items() if isinstance(each, float)}
        for name, group in sets.items()
        if group
    }
    entry = {"settings": {}, "notes": list(notes), "threshold": threshold, "sets": of_sets, "means": means}
    entry |= {"accepted": wilson(951, 1000), "accepted_and_right": wilson(602, 1000)}
    return {**entry, "grid": cells, "reject": reject}


@pytest.fixture
def open_set():
    """Return the block `open_set`: three sets, and three detectors of which one is worse than chance under attack.

    max_logit has no reject option measured, openmax a note of its fit and an AUROC of exactly a half.
    """
    sets = {"unknown classes": "", "tiny": "near", "svhn": "far"}
    reject = {"clean_accuracy_with_reject": wilson(181, 300), "robust_accuracy_with_reject": wilson(103, 300)}
    note_of_fit = "class 3: fewer than 3 different distances, so a step replaces the distribution"
    attack = {"norm": "linf", "epsilon": 8 / 255, "steps": 100, "restarts": 1}
    return {
        "retention": 0.95,
        "fit_on": "clean",
        "fit_images": 48000,
        "validation_images": 2000,
        "known": {"n": 1000, "accuracy": wilson(617, 1000)},
        "sets": {name: {"group": group, "n": 300} for name, group in sets.items()},
        "scoring_seconds": {"together": 1.25},
        "attack": {
            "threat_model": {"norm": "linf", "epsilon": 8 / 255},
            "known": 300,
            "unknown": 300,
            "set": "unknown classes",
            "seed": 7,
            "attacks": [{"name": "APGD", **attack}, {"name": "Square", "queries": 5000}],
            "joint_attacks": [{"name": "JointPGD", "orthogonal": each, **attack} for each in (True, False)],
            "candidates": 256,
        },
        "detectors": {
            "max_logit": detector_entry(sets, threshold=-3.457, both_attacked=0.5219),
            "mahalanobis": detector_entry(sets, threshold=187.25, both_attacked=0.3166, reject=reject),
            "openmax": detector_entry(sets, threshold=0.9991, both_attacked=0.5, notes=[note_of_fit], reject=reject),
        },
    }


class Trained(NamedTuple):
    """A plain convolutional classifier and images that it has not seen, most of them right."""

    model: keras.Model
    image: np.ndarray
    label: np.ndarray

    def path(self, image, seed):
        return self.model(image, training=False)

    def batches(self, *, batch_size=16, count=64, first_index=0):
        index = first_index + np.arange(count, dtype=np.int32)
        elements = {"image": self.image[:count], "label": self.label[:count], "index": index}
        return tf.data.Dataset.from_tensor_slices(elements).batch(batch_size)


@pytest.fixture(scope="session")
def digits_classifier():
    """Return a small undefended classifier of digits, and unseen images."""
    data = load_digits()
    image, label = (data.images[..., None] / 16).astype(np.float32), data.target.astype(np.int32)
    start = keras.initializers.GlorotUniform
    model = keras.Sequential(
        [
            keras.layers.Input([8, 8, 1]),
            keras.layers.Conv2D(8, 3, padding="same", activation="relu", kernel_initializer=start(0)),
            keras.layers.Flatten(),
            keras.layers.Dense(10, kernel_initializer=start(1)),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss=loss)
    model.fit(image[:1400], label[:1400], batch_size=100, epochs=6, shuffle=False, verbose=0)
    return Trained(model, image[1400:], label[1400:])


@pytest.fixture
def drawn(monkeypatch):
    """Return a list of the figures that are saved, of which no file is made: that takes seconds."""
    figures = []

    def save(figure, path, **settings):
        figures.append(figure)
        path.touch()

    monkeypatch.setattr(Figure, "savefig", save)
    return figures
