"""Models that draw at random: they are recognised, and get their protocol without being asked."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from kerasdefense.attacks import APGD, norms
from kerasdefense.evaluation import Options, PlannedAttack, ThreatModel, evaluate, randomised
from kerasdefense.evaluation.search import Chunk, ExactPath

THREAT = ThreatModel("linf", 0.12)


def noisy(trained, radius=0.3):
    def path(image, seed):
        return trained.path(norms.random_point(image, epsilon=radius, norm="linf", seed=seed), seed)

    return path


def chunk_of(trained, count=32):
    return Chunk(trained.image[:count], trained.label[:count], np.arange(count, dtype=np.int32))


def test_random_models_are_told_from_others(digits_classifier):
    chunk = chunk_of(digits_classifier)
    assert randomised.look(digits_classifier.path, chunk, seed=0) == {"differs": False, "keyed": True}
    assert randomised.look(noisy(digits_classifier), chunk, seed=0) == {"differs": True, "keyed": True}

    def unkeyed(image, seed):
        return digits_classifier.path(image + tf.random.normal(tf.shape(image), stddev=0.1), seed)

    assert randomised.look(unkeyed, chunk, seed=0) == {"differs": True, "keyed": False}


def test_answer_of_a_random_model_is_the_mean_of_fresh_draws(digits_classifier):
    chunk = chunk_of(digits_classifier)
    logits = ExactPath(noisy(digits_classifier), seed=0, chunk_size=64, draws=10).logits(chunk)
    np.testing.assert_allclose(np.exp(logits).sum(axis=1), 1, rtol=1e-4)
    other = ExactPath(noisy(digits_classifier), seed=0, chunk_size=40, draws=10).logits(chunk)
    np.testing.assert_allclose(other, logits, atol=1e-5)
    one = ExactPath(digits_classifier.path, seed=0, chunk_size=64, draws=10).logits(chunk)
    np.testing.assert_allclose(one, tf.nn.log_softmax(digits_classifier.model(chunk.image)), atol=1e-5)


def test_equal_draws_change_nothing(digits_classifier):
    """13 EOT: a deterministic model gives identical results for any number of draws."""
    found = []
    for draws in (1, 4):
        suite = [PlannedAttack("apgd", APGD(*THREAT, steps=10), draws=draws)]
        options = Options(chunk_size=16 * draws)
        results = evaluate(
            {"exact": digits_classifier.path},
            digits_classifier.batches(),
            THREAT,
            suite,
            options=options,
            sanity_examples=0,
        )
        found.append(results["robust_accuracy"])
    assert found[0] == found[1]


def test_random_model_gets_its_protocol_and_its_noise_is_no_defense(digits_classifier, monkeypatch):
    monkeypatch.setattr(randomised, "SCALING", (1, 4))
    monkeypatch.setattr(randomised, "plan", small_plan)
    small = dataclasses.replace(randomised.SUITES["autoattack"], plan=lambda *threat: small_plan(*threat, draws=1)[:1])
    monkeypatch.setattr(randomised, "SUITES", {"autoattack": small})
    results = evaluate(
        {"exact": noisy(digits_classifier, 0.15)},
        digits_classifier.batches(),
        THREAT,
        "autoattack",
        options=Options(examples=24, chunk_size=240),
        sanity_examples=8,
    )
    found = results["randomised"]
    assert results["flags"]["randomised"] and found["keyed"]
    assert set(found) == {"keyed", *(name for name in found if name[0] == "R")} and len(found) == 7
    assert found["R1_fixed_noise"]["value"] <= 0.5  # with the draw held fixed, AutoAttack breaks it
    assert found["R3_pgd200_eot"]["n"] == 12 and found["R4_square"]["n"] == 24
    assert found["R6_fresh_draws"]["any_of_10"]["value"] <= found["R6_fresh_draws"]["majority_vote"]["value"]
    assert [point["draws"] for point in found["R5_scaling"]] == [1, 4]
    assert found["R2_autoattack_rand"]["apgd_ce"]["value"] >= results["robust_accuracy"]["value"]
    by_id = {item["id"]: item["status"] for item in results["sanity"]}
    assert by_id["S11"] == "not_run"  # a random model may answer otherwise each time


def small_plan(norm, epsilon, classes, draws=4):
    return (
        PlannedAttack("apgd_ce", APGD(norm, epsilon, steps=8), draws=draws),
        PlannedAttack("pgd200_eot", APGD(norm, epsilon, steps=4), draws=draws, examples=12),
        PlannedAttack("square", APGD(norm, epsilon, steps=4), "margin", draws),
    )


def test_protocol_plan_follows_the_mean_of_twenty_draws():
    plan = randomised.plan("linf", 8 / 255, 10)
    assert [planned.name for planned in plan] == ["apgd_ce", "apgd_dlr", "pgd200_eot", "square"]
    assert {planned.draws for planned in plan} == {20}
    long = plan[2].attack
    assert (long.steps, long.random_start, long.restarts) == (200, False, 1)
    assert long.step_size == pytest.approx(0.007) and plan[3].attack.queries == 1000
