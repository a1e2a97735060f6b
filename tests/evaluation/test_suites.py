from __future__ import annotations

import dataclasses

import pytest

from kerasdefense.attacks import APGD, ATTACKS, CAFA, OBJECTIVES, PGD, norms
from kerasdefense.evaluation import SUITES, Options, PlannedAttack, ThreatModel, evaluate
from kerasdefense.evaluation.search import Search
from kerasdefense.types import UsageError


@pytest.mark.parametrize("classes", [2, 3, 4, 10])
@pytest.mark.parametrize("norm", norms.NORMS)
@pytest.mark.parametrize("name", SUITES)
def test_suite_has_one_threat_model_and_known_parts(name, norm, classes):
    plan = SUITES[name].plan(norm, 0.07, classes)
    assert plan and len({(planned.name, planned.path) for planned in plan}) == len(plan)
    for planned in plan:
        assert type(planned.attack) in ATTACKS.values()
        assert planned.objective in OBJECTIVES or planned.attack.takes == "logits"
        assert (planned.attack.norm, planned.attack.epsilon) == (norm, 0.07)
        ends = 2 if planned.objective == "signed_target" else 1
        assert getattr(planned.attack, "targets", 0) <= ends * (classes - 1)


def by_name(suite, classes=10):
    return {planned.name: planned for planned in SUITES[suite].plan("linf", 0.1, classes)}


def test_standard_suite_holds_pgd50_with_five_restarts_and_a_second_loss():
    suite = by_name("standard")
    attack = suite["pgd50x5"].attack
    assert (attack.steps, attack.restarts, attack.random_start, attack.keep) == (50, 5, True, "best")
    assert {planned.objective for planned in suite.values()} == {"cross_entropy", "margin"}
    assert set(by_name("quick")) <= set(suite)


def test_autoattack_has_the_four_members_and_settings_of_the_reference():
    suite = by_name("autoattack")
    assert list(suite) == ["apgd_ce", "apgd_t", "fab_t", "square"] and SUITES["autoattack"].cascade
    assert suite["apgd_ce"].attack == APGD("linf", 0.1, steps=100, rho=0.75, restarts=1)
    assert (suite["apgd_t"].objective, suite["apgd_t"].attack.targets) == ("targeted_dlr", 9)
    fab = suite["fab_t"].attack
    assert (fab.steps, fab.targets, fab.alpha_max, fab.eta, fab.beta, fab.restarts) == (100, 9, 0.1, 1.05, 0.9, 1)
    square = suite["square"].attack
    assert (square.queries, square.p_init, square.rescale, square.restarts) == (5000, 0.8, False, 1)


def test_other_versions_of_autoattack_have_their_restarts_and_draws():
    plus = by_name("plus")
    assert list(plus) == ["apgd_ce", "apgd_dlr", "fab", "square", "apgd_t", "fab_t"]
    assert [plus[name].attack.restarts for name in plus] == [5, 5, 5, 1, 1, 1]
    rand = by_name("rand")
    assert list(rand) == ["apgd_ce", "apgd_dlr"] and {planned.draws for planned in rand.values()} == {20}


def test_adaptive_suite_looks_for_what_bounded_logits_hide():
    suite = by_name("adaptive")
    assert {"apgd_ce", "apgd_ce_x10", "apgd_ce_x50", "feature_matching", "transfer_apgd_ce"} <= set(suite)
    assert suite["apgd_signed"].attack.targets == 18 and suite["apgd_signed"].objective == "signed_target"
    assert by_name("adaptive", 3)["apgd_signed"].attack.targets == 4


def test_gap_runs_autoattack_besides_attacks_that_each_stand_alone():
    gap = by_name("gap")
    alone = {name: planned for name, planned in gap.items() if planned.alone}
    assert list(alone) == ["pgd20", "pgd100", "pgd100_margin", "feature_matching", "transfer_apgd_margin"]
    assert list(gap)[: len(alone)] == list(alone) and SUITES["gap"].cascade
    assert [(planned.attack.steps, planned.attack.restarts) for planned in list(alone.values())[:3]] == [
        (20, 1),
        (100, 1),
        (100, 1),
    ]
    assert [planned.objective for planned in alone.values()] == [
        "cross_entropy",
        "cross_entropy",
        "margin",
        "feature_matching",
        "margin",
    ]
    assert [planned.transfer for planned in alone.values()] == [False] * 4 + [True]
    others = set(SUITES) - {"ablation", "gap", "purified"}
    assert not any(planned.alone for name in others for planned in by_name(name).values())


@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_gap_holds_all_that_autoattack_runs_on_so_many_classes(classes):
    gap, autoattack = by_name("gap", classes), by_name("autoattack", classes)
    assert {name: planned for name, planned in gap.items() if not planned.alone} == autoattack
    assert set(SUITES["gap"].checks) == set(SUITES["autoattack"].checks)


def test_purified_runs_autoattack_through_the_purifier_and_past_it():
    suite = by_name("purified")
    assert list(suite) == ["pgd20", "apgd_ce", "apgd_t", "cafa", "fab_t", "square"] and SUITES["purified"].cascade
    assert [planned.alone for planned in suite.values()] == [True] * 4 + [False] * 2
    autoattack = by_name("autoattack")
    assert all(suite[name].attack == planned.attack for name, planned in autoattack.items())
    paths = ("exact", "bpda_identity", "oblivious", "signed", "surrogate:twin")
    met = {name: [path for path in paths if planned.is_for(path)] for name, planned in suite.items()}
    assert met["pgd20"] == met["apgd_ce"] == met["apgd_t"] == met["fab_t"] == list(paths[:3])
    assert met["cafa"] == met["square"] == ["exact"]
    cafa = suite["cafa"]
    assert cafa.objective == "class_activation" and (cafa.attack.steps, cafa.attack.random_start) == (40, True)
    assert cafa.attack.length == pytest.approx(0.01 * 0.1 / (8 / 255))
    assert list(by_name("purified", 2))[:3] == ["pgd20", "apgd_ce", "apgd_margin"]


def test_ablation_is_few_attacks_for_the_rows_of_an_ablation():
    suite = SUITES["ablation"]
    plan = [(planned.name, planned.path) for planned in suite.plan("linf", 0.1, 10)]
    assert plan == [("pgd20", "exact"), ("apgd_ce", "exact"), ("apgd_t", "exact"), ("apgd_ce", "oblivious")]
    assert all(planned.alone for planned in suite.plan("linf", 0.1, 10))
    assert suite.cascade and suite.checks == SUITES["quick"].checks and "not an AutoAttack result" in suite.words


def test_ablation_meets_all_images_on_each_path_of_a_deterministic_model(digits_classifier, monkeypatch):
    """Its rows are like those of a random model, whose attacks do not spare what has fallen before."""
    plan = tuple(
        each._replace(attack=PGD("linf", 0.1, steps=2), objective="cross_entropy")
        for each in SUITES["ablation"].plan("linf", 0.1, 10)
    )
    monkeypatch.setitem(SUITES, "ablation", dataclasses.replace(SUITES["ablation"], plan=lambda *_: plan))
    paths = {"exact": digits_classifier.path, "oblivious": digits_classifier.path}
    given = (paths, digits_classifier.batches(), ThreatModel("linf", 0.1), "ablation")
    results = evaluate(*given, options=Options(examples=12, chunk_size=16), sanity_examples=0)
    clean, robust = results["clean_accuracy"], results["robust_accuracy"]
    assert robust["value"] < clean["value"]
    assert {each["attacked"] for each in results["attacks"]} == {round(clean["value"] * clean["n"])}
    assert results["attacks"][-1]["path"] == "oblivious"


def test_attack_meets_the_paths_that_it_is_made_for():
    paths = ("exact", "bpda_identity", "signed", "smoothed:0.1", "surrogate:twin")
    suite = by_name("adaptive")

    def met(name):
        return [path for path in paths if suite[name].is_for(path)]

    assert met("apgd_ce") == met("feature_matching") == ["exact", "bpda_identity"]
    assert met("apgd_signed") == ["signed"] and met("apgd_smoothed") == ["smoothed:0.1"]
    assert met("transfer_apgd_ce") == ["surrogate:twin"]
    assert not any(planned.is_for("signed") for planned in by_name("autoattack").values())


@pytest.mark.parametrize(
    "suite, classes, name, objective, words",
    [
        ("autoattack", 3, "apgd_t_ce", "targeted_cross_entropy", "apgd_t: the targeted DLR loss needs 4 classes"),
        ("autoattack", 2, "apgd_margin", "margin", "apgd_t: the targeted DLR loss needs 4 classes, there are 2"),
        ("rand", 2, "apgd_margin", "margin", "apgd_dlr: the DLR loss needs 3 classes, there are 2"),
    ],
)
def test_too_few_classes_name_the_attack_that_is_replaced(suite, classes, name, objective, words):
    planned = by_name(suite, classes)[name]
    assert planned.objective == objective and words in planned.replaces
    assert not any(each.replaces for each in by_name(suite).values())


def test_search_on_class_activation_features_is_of_the_exact_path_alone():
    planned = PlannedAttack("cafa", CAFA(epsilon=0.1), "class_activation")
    settings = {"stream": 0, "seed": 0, "chunk_size": 4, "class_activation": lambda image: image}
    assert Search(planned, "exact", lambda image, seed: image, **settings).keeps_its_own
    with pytest.raises(UsageError, match="attack cafa:oblivious must maximise one of"):
        Search(planned, "oblivious", lambda image, seed: image, **settings)


@pytest.mark.parametrize("objective", ["kl_divergence", "targeted_cross_entropy", "class_activation"])
def test_search_refuses_an_objective_that_needs_more_than_a_label(objective):
    planned = PlannedAttack("mine", PGD(epsilon=0.1), objective)
    with pytest.raises(UsageError, match=r"must maximise one of cross_entropy, .*margin, logit_matching, not"):
        Search(planned, "exact", lambda image, seed: image, stream=0, seed=0, chunk_size=4)
