"""The evaluation tests itself: models that mask their gradients trip the right items, a plain classifier none."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from kerasdefense.attacks import APGD, PGD
from kerasdefense.attacks.wrappers import bpda
from kerasdefense.evaluation import Options, PlannedAttack, ThreatModel, evaluate
from kerasdefense.evaluation.probes import Radii, Subject
from kerasdefense.evaluation.robustness import measure
from kerasdefense.evaluation.sanity import Battery, battery, security_curve
from kerasdefense.evaluation.search import Chunk
from kerasdefense.types import InputError

THREAT = ThreatModel("linf", 0.12)
SUITE = [PlannedAttack("pgd", PGD(*THREAT, steps=20)), PlannedAttack("margin", PGD(*THREAT, steps=20), "margin")]
EVERY = tuple(f"S{number}" for number in range(1, 18))
COUNT = 48


def subject_of(paths, trained, *, features=None, **options):
    index = np.arange(COUNT, dtype=np.int32)
    chunk = Chunk(trained.image[:COUNT], trained.label[:COUNT], index)
    return Subject(paths, chunk, THREAT, 10, Options(**options), features)


def failed(paths, trained, checks, *, suite=SUITE, **options):
    """Return the items that fail, with their values."""
    radii = Radii(subject_of(paths, trained, **options), draws=1)
    measured = measure(paths, trained.batches(count=COUNT), suite, Options(**options))
    items = battery(radii, checks, measured)
    assert [item["id"] for item in items] == list(EVERY)
    assert {item["id"] for item in items if item["status"] != "not_run"} <= set(checks)
    return {item["id"]: item["value"] for item in items if item["status"] == "fail"}


def test_plain_classifier_trips_no_item_and_falls(digits_classifier):
    paths = {"exact": digits_classifier.path}
    assert failed(paths, digits_classifier, EVERY) == {}
    measured = measure(paths, digits_classifier.batches(count=COUNT), SUITE, Options())
    assert measured.outcomes.clean.mean() > 0.8 and measured.outcomes.robust.mean() < 0.5


def test_security_curve_falls_from_clean_to_nothing(digits_classifier):
    subject = subject_of({"exact": digits_classifier.path}, digits_classifier)
    curve = security_curve(Radii(subject, draws=1))
    values = [point["value"] for point in curve]
    assert [point["epsilon"] for point in curve] == sorted(point["epsilon"] for point in curve)
    assert values[0] == subject.exact.is_right(subject.chunk).mean() and values[-1] == 0
    assert any(np.isclose(point["epsilon"], THREAT.epsilon) for point in curve)


def test_silent_success_is_not_asked_of_a_random_model(digits_classifier):
    subject = subject_of({"exact": digits_classifier.path}, digits_classifier, is_randomised=True)
    measured = measure(subject.attack_paths, digits_classifier.batches(count=COUNT), SUITE[:1], Options())
    item = Battery(Radii(subject, draws=1), measured).s11()
    assert item.status == "not_run" and "may answer otherwise each time" in item.detail


def quantised(trained, levels=4):
    def path(image, seed):
        return trained.path(tf.round(image * levels) / levels, seed)

    return path


def test_quantised_input_trips_dead_gradients_and_blind_search(digits_classifier):
    found = failed({"exact": quantised(digits_classifier)}, digits_classifier, ("S9", "S10"))
    assert found["S10"] == 1 and found["S9"] > 0.1


def test_quantised_input_trips_exact_gradients_where_bpda_is_named(digits_classifier):
    def bpda_identity(image, seed):
        return digits_classifier.path(bpda(lambda each: tf.round(each * 4) / 4)(image), seed)

    paths = {"exact": quantised(digits_classifier), "bpda_identity": bpda_identity}
    assert set(failed(paths, digits_classifier, ("S17",))) == {"S17"}


def test_saturated_logits_trip_dead_gradients_but_dlr_breaks_them(digits_classifier):
    def path(image, seed):
        return 1e4 * digits_classifier.path(image, seed)

    assert failed({"exact": path}, digits_classifier, ("S10",))["S10"] > 0.5
    suite = [PlannedAttack("ce", PGD(*THREAT, steps=20)), PlannedAttack("dlr", APGD(*THREAT, steps=20), "dlr")]
    survived = measure({"exact": path}, digits_classifier.batches(count=COUNT), suite, Options()).outcomes.survived
    plain = measure({"exact": digits_classifier.path}, digits_classifier.batches(count=COUNT), suite, Options())
    assert survived[:, 0].mean() > survived[:, 1].mean() + 0.3
    assert survived[:, 1].mean() == pytest.approx(plain.outcomes.survived[:, 1].mean(), abs=0.05)


def test_zero_gradients_trip_dead_gradients_and_the_unbounded_attack(digits_classifier):
    def path(image, seed):
        return digits_classifier.path(tf.stop_gradient(image), seed)

    assert {"S10", "S14"} <= set(failed({"exact": path}, digits_classifier, ("S10", "S14")))


def test_label_leaking_is_seen(digits_classifier):
    """A classifier that answers rightly where it is pushed away from the answer."""
    clean = tf.constant(digits_classifier.image[:COUNT])

    def path(image, seed):
        moved = tf.reduce_max(tf.abs(image - clean[: tf.shape(image)[0]]), axis=(1, 2, 3))[:, None]
        label = tf.one_hot(digits_classifier.label[:COUNT], 10)[: tf.shape(image)[0]]
        return label * (moved - 0.01) + 1e-3 * digits_classifier.path(image, seed)

    assert "S6" in failed({"exact": path}, digits_classifier, ("S6",))


def test_probabilities_are_refused(digits_classifier):
    def path(image, seed):
        return tf.nn.softmax(digits_classifier.path(image, seed))

    with pytest.raises(InputError, match="probabilities"):
        evaluate({"exact": path}, digits_classifier.batches(), THREAT, SUITE)


def test_planted_goals_are_looked_for_in_the_features(digits_classifier):
    def features(image):
        return tf.reshape(image, [tf.shape(image)[0], -1])  # linear in the image: every goal can be reached

    subject = subject_of({"exact": digits_classifier.path}, digits_classifier, features=features)
    measured = measure(subject.attack_paths, digits_classifier.batches(count=COUNT), SUITE, Options())
    items = {item["id"]: item for item in battery(Radii(subject, draws=1), ("S16",), measured)}
    assert items["S16"]["status"] == "pass" and items["S16"]["value"] >= 0.95


def test_failed_item_makes_the_result_not_to_be_trusted(digits_classifier):
    def path(image, seed):
        return digits_classifier.path(tf.stop_gradient(image), seed)

    results = evaluate({"exact": path}, digits_classifier.batches(), THREAT, SUITE, sanity_examples=16)
    assert not results["trusted"]
    assert "S10" in [item["id"] for item in results["sanity"] if item["status"] == "fail"]
