"""Models that draw at random: they are recognised, and get their protocol without being asked."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from kerasdefense.attacks import APGD, FGSM, Square, norms
from kerasdefense.attacks.wrappers import fixed_noise
from kerasdefense.evaluation import SUITES, Options, PlannedAttack, ThreatModel, evaluate, randomised
from kerasdefense.evaluation.block import Block
from kerasdefense.evaluation.report import note
from kerasdefense.evaluation.search import Chunk, ExactPath
from kerasdefense.types import UsageError

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


def test_model_that_denies_its_draws_is_treated_as_random(digits_classifier):
    plan = [PlannedAttack("fgsm", FGSM(*THREAT))]
    settings = {"options": Options(examples=4, chunk_size=80), "sanity_examples": 0, "is_randomised": False}
    for path, expected in ((noisy(digits_classifier), True), (digits_classifier.path, False)):
        flags = evaluate({"exact": path}, digits_classifier.batches(), THREAT, plan, **settings)["flags"]
        assert flags["randomised"] is flags["differs"] is expected


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


def small_protocol(monkeypatch, **changed):
    """Replace the attacks of the protocol by short ones."""
    monkeypatch.setattr(randomised, "SCALING", (1, 4))
    small = dataclasses.replace(randomised.SUITES["autoattack"], plan=small_autoattack)
    monkeypatch.setattr(randomised, "SUITES", {"autoattack": small})
    for name, value in changed.items():
        monkeypatch.setattr(randomised, name, value)


def small_plan(norm, epsilon, classes, *, paths, long_examples, few, draws=4):
    assert paths == ("exact",) and not few
    return (
        PlannedAttack("apgd_ce", APGD(norm, epsilon, steps=8), draws=draws),
        PlannedAttack("pgd200_eot", APGD(norm, epsilon, steps=4), draws=draws, examples=long_examples),
        PlannedAttack("square", APGD(norm, epsilon, steps=4), "margin", draws, examples=long_examples),
    )


def small_autoattack(norm, epsilon, classes):
    return (
        PlannedAttack("apgd_ce", APGD(norm, epsilon, steps=8)),
        PlannedAttack("apgd_t", APGD(norm, epsilon, steps=4, targets=1), "targeted_dlr"),
        PlannedAttack("square", Square(norm, epsilon, queries=5), "margin"),
    )


def test_random_model_gets_its_protocol_and_its_noise_is_no_defense(digits_classifier, monkeypatch):
    """R1 to R6 are there without the sanity battery, on the images that they are meant for."""
    small_protocol(monkeypatch, plan=small_plan)
    results = evaluate(
        {"exact": noisy(digits_classifier, 0.15)},
        digits_classifier.batches(),
        THREAT,
        "autoattack",
        options=Options(examples=24, chunk_size=240),
        sanity_examples=0,
        long_examples=12,
    )
    found = results["randomised"]
    assert results["flags"]["randomised"] and found["keyed"] and results["sanity"] == []
    assert set(found) == {"keyed", *(name for name in found if name[0] == "R")} and len(found) == 7
    still = found["R1_fixed_noise"]
    assert still["n"] == still["clean"]["n"] == 24
    assert still["value"] < still["clean"]["value"] - 0.1  # with the draw held fixed, AutoAttack breaks it
    left = [each["value"] for each in still["left"].values()]
    assert list(still["left"]) == ["apgd_ce", "apgd_t", "square"]
    assert still["clean"]["value"] >= left[0] >= left[1] >= left[2] == still["value"]
    assert found["R3_pgd200_eot"]["n"] == found["R4_square"]["n"] == 12
    assert found["R6_fresh_draws"]["any_of_10"]["value"] <= found["R6_fresh_draws"]["majority_vote"]["value"]
    worst = found["R6_fresh_draws"]
    for kind in ("single_draw", "clean_single_draw"):
        low, high = worst[kind]["ci95"]
        assert worst[kind]["n"] == 24 and worst[kind]["draws"] == 20 and 0 <= low <= worst[kind]["value"] <= high <= 1
    assert worst["clean_single_draw"]["value"] > worst["single_draw"]["value"] + 0.1
    assert abs(worst["clean_majority_vote"]["value"] - results["clean_accuracy"]["value"]) < 0.15
    assert "Accuracies are by the mean probabilities of 10 draws." in note(results, "autoattack")
    assert [point["draws"] for point in found["R5_scaling"]][:2] == [1, 4]
    assert {point["n"] for point in found["R5_scaling"]} == {12}
    assert found["R2_autoattack_rand"]["apgd_ce"]["value"] >= results["robust_accuracy"]["value"]


def model_of(trained, path, **changed):
    settings = {"options": Options(examples=8, chunk_size=64), "long_examples": 4, **changed}
    return randomised.RandomModel(path, trained.batches(), THREAT, 10, **settings)


def test_more_draws_are_looked_at_only_while_they_break_more(digits_classifier, monkeypatch):
    """R5 stops where the last step to more draws changed accuracy by less than a point."""

    class Found:
        def __init__(self, standing):
            self.outcomes = self
            self.robust = np.arange(100) < standing

    def curve(*standing):
        asked = iter(standing)
        monkeypatch.setattr(randomised.RandomModel, "measured", lambda *_, **__: Found(next(asked)))
        found = randomised.scaling(model_of(digits_classifier, digits_classifier.path))
        return [(each["draws"], each["value"]) for each in found]

    assert curve(60, 50, 45, 45) == [(1, 0.6), (5, 0.5), (20, 0.45), (64, 0.45)]
    assert curve(60, 50, 45, 44, 43)[3:] == [(64, 0.44), (128, 0.43)]
    assert len(curve(60, 50, 45, 46)) == 4


@pytest.mark.parametrize("standing, verdict", [(49, True), (50, True), (51, True), (52, True), (60, False)])
def test_scaling_says_whether_more_draws_leave_more_standing(standing, verdict):
    """One image more may be chance, as may be two where the difference is as little sure."""
    before, after = (np.arange(100) < count for count in (50, standing))
    assert randomised._is_non_increasing(before, after) is verdict


def test_random_model_keeps_of_each_image_what_fools_it_by_most(digits_classifier):
    """One candidate that fools by little must not hide another; a deterministic model keeps its first."""
    image = np.zeros([2, 1, 1, 1], np.float32)
    chunk = Chunk(image, np.zeros(2, np.int32), np.arange(2, dtype=np.int32))

    def path(image, seed):
        score = image[:, 0, 0]
        return tf.concat([0.05 - score, score - 0.05], axis=1)

    candidates = ([0.1, 0.0], [0.9, 0.02], [0.5, 0.01])
    for draws, kept in ((1, [0.1, 0.02]), (10, [0.9, 0.02])):
        exact = ExactPath(path, seed=0, chunk_size=20, draws=draws)
        block = Block(chunk, exact, [None] * 3, first=0, cascade=False)
        for number, values in enumerate(candidates):
            tried = np.array(values, np.float32).reshape(2, 1, 1, 1)
            block.number = number
            block._record(np.arange(2), tried[:, 0, 0, 0] > 0.05, tried)
        assert block.standing.tolist() == [False, True] and block.survived.tolist() == [[False] * 3, [True] * 3]
        np.testing.assert_allclose(block.image_adv[:, 0, 0, 0], kept)


def test_final_scoring_looks_beyond_images_that_fool_by_little(digits_classifier):
    """Of the first images PGD goes on to its end; what it finds stands in where it is worse, and no one else's."""
    exact = noisy(digits_classifier, 0.15)
    model = model_of(digits_classifier, exact, options=Options(8, 160, is_randomised=True), few=True)
    clean = digits_classifier.image[:8]
    ((block),) = randomised.worst_images(model, [{"image_adv": clean}])
    distance = np.abs(block["image_adv"] - clean).reshape(8, -1).max(axis=1)
    assert (distance[:4] > 0).all() and (distance[:4] <= THREAT.epsilon + 1e-6).all() and not distance[4:].any()
    np.testing.assert_array_equal(block["image"], clean)
    found = [
        randomised.final_scoring(exact, [{**block, "image_adv": each}], seed=0, chunk_size=160)["single_draw"]["value"]
        for each in (block["image_adv"], clean)
    ]
    assert found[0] < found[1] - 0.1
    (again,) = randomised.worst_images(model, [block])
    assert np.array_equal(again["image_adv"], block["image_adv"])


def test_figures_go_on_from_the_journal(digits_classifier, monkeypatch, tmp_path):
    small_protocol(monkeypatch)
    calls = []

    def path(image, seed):
        calls.append(image.shape)
        return digits_classifier.path(image, seed)

    model = model_of(digits_classifier, path, options=Options(8, 64, journal=tmp_path), few=True)
    found, traced = randomised.fixed(model), len(calls)
    assert (tmp_path / "R1" / "block-00000.npz").is_file()
    assert randomised.fixed(model) == found and len(calls) == traced


def test_ablation_suite_leaves_a_random_model_few_attacks_and_two_figures(digits_classifier, monkeypatch):
    small_protocol(monkeypatch)
    exact = noisy(digits_classifier, 0.15)
    results = evaluate(
        {"exact": exact, "oblivious": digits_classifier.path, "fixed_noise": fixed_noise(exact)},
        digits_classifier.batches(),
        THREAT,
        "ablation",
        options=Options(examples=6, chunk_size=240),
        sanity_examples=0,
    )
    ran = [(each["name"], each["path"], each["draws"]) for each in results["attacks"]]
    one_step, longer = [("fgsm", "exact", 1), ("fgsm", "oblivious", 1)], [("pgd20", "exact", 10)]
    assert ran == [*one_step, *longer, ("apgd_ce", "oblivious", 1), ("apgd_ce", "fixed_noise", 1)]
    found = results["randomised"]
    assert [found[name] for name in ("R2_autoattack_rand", "R3_pgd200_eot", "R4_square", "R5_scaling")] == [None] * 4
    assert list(found["R1_fixed_noise"]["left"]) == ["apgd_ce", "apgd_t"] and found["R6_fresh_draws"]["majority_vote"]


def test_quick_suite_keeps_its_attacks_on_a_random_model_and_averages(digits_classifier, monkeypatch):
    monkeypatch.setitem(SUITES, "quick", dataclasses.replace(SUITES["quick"], plan=quick))
    results = evaluate(
        {"exact": noisy(digits_classifier, 0.15)},
        digits_classifier.batches(),
        THREAT,
        "quick",
        options=Options(examples=6, chunk_size=240),
        sanity_examples=0,
    )
    assert [(each["name"], each["draws"]) for each in results["attacks"]] == [("fgsm", 20)]
    assert results["flags"]["randomised"] and results["randomised"] is None
    assert "that go step by step follow the mean over 20 draws, the others one draw" in note(results, "quick")


def quick(norm, epsilon, classes):
    return (PlannedAttack("fgsm", FGSM(norm, epsilon)),)


def paths_of(plan, *names):
    return {
        (planned.name, name, planned.draws, planned.examples)
        for planned in plan
        for name in names
        if planned.is_for(name)
    }


def test_protocol_plan_follows_the_mean_of_twenty_draws_each_attack_on_its_path():
    """R2, R3 and R4 on the whole path, and what costs less on the others."""
    names = ("exact", "oblivious", "bpda_identity", "fixed_noise", "signed", "surrogate:twin")
    plan = randomised.plan("linf", 8 / 255, 10, paths=names, long_examples=64)
    assert paths_of(plan, *names) == {
        ("fgsm", "exact", 1, 0),
        ("apgd_ce", "exact", 20, 0),
        ("apgd_dlr", "exact", 20, 0),
        ("pgd200_eot", "exact", 20, 64),
        ("square", "exact", 20, 64),
        ("fgsm", "oblivious", 1, 0),
        ("apgd_ce", "oblivious", 1, 0),
        ("pgd20", "bpda_identity", 20, 0),
        ("apgd_ce", "fixed_noise", 1, 0),
    }
    by_name = {planned.name: planned.attack for planned in plan}
    long = by_name["pgd200_eot"]
    assert (long.steps, long.random_start, long.restarts) == (200, False, 1)
    assert long.step_size == pytest.approx(0.007) and by_name["square"].queries == 1000
    assert by_name["pgd20"].steps == 20


@pytest.mark.parametrize("few", [False, True])
def test_path_that_the_protocol_does_not_know_is_attacked_over_mean_losses(few):
    names = ("exact", "mine:1", "mine:2")
    plan = randomised.plan("linf", 0.1, 10, paths=names, few=few)
    assert paths_of(plan, *names[1:]) == {("apgd_ce", "mine:1", 20, 0), ("apgd_ce", "mine:2", 20, 0)}


def test_negative_number_of_images_for_long_attacks_is_refused(digits_classifier):
    with pytest.raises(UsageError, match="long_examples must be at least 0, not -1"):
        evaluate({"exact": digits_classifier.path}, digits_classifier.batches(), THREAT, long_examples=-1)
