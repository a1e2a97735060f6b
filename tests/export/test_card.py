import copy
import json

import pytest

from kerasdefense import InputError, config, export
from kerasdefense.defenses import DEFENSES
from kerasdefense.export.card import AUTOATTACK

ACCURACY = {"value": 0.5, "n": 10, "ci95": [0.2, 0.8]}
RESULTS = {
    "schema_version": 2,
    "threat_model": {"norm": "linf", "epsilon": 0.2},
    "clean_accuracy": {"value": 0.9, "n": 10, "ci95": [0.6, 0.98]},
    "robust_accuracy": ACCURACY,
    "rounded_accuracy": ACCURACY,
    "cascade": False,
    "complete": True,
    "trusted": True,
    "sanity": [{"id": "S1", "status": "pass"}, {"id": "S9", "status": "not_run"}],
    "model": {"name": "standard", "digest": "0" * 64},
    "attacks": [
        {
            "name": "pgd20",
            "path": "exact",
            "attacked": 9,
            "accuracy": 0.5,
            "cascaded_accuracy": 0.5,
            "ci95": [0.2, 0.8],
        }
    ],
    "attack_budget": 7,
    "suite": "standard",
    "note": "Preliminary.",
    "config": {},
    "versions": {"python": "3.10"},
    "seed": 3,
}


def make_card(results=RESULTS, **sections):
    run = config.Run(**sections)
    return export.card(run, results=results, labels=("0", "1"), image_shape=(8, 8, 1), versions={"python": "3.10"})


def complete(card):
    return {**card, "files": {"saved_model.pb": "0" * 64, "variables/variables.index": "f" * 64}}


@pytest.mark.parametrize("results", [RESULTS, None], ids=["evaluated", "not_evaluated"])
def test_card_follows_the_schema(results):
    card = complete(make_card(results))
    export.check_card(card)
    export.check_card(json.loads(json.dumps(card)))


def test_card_says_what_the_run_was():
    card = make_card(
        data=config.Data(name="cifar10", open_set_split="2"),
        attack=config.Attack(norm="l2", epsilon=0.5),
        defense=config.Defense(name="pgd_at"),
        backbone=config.Backbone(name="resnet14"),
        train=config.Train(seed=5),
    )
    assert card["name"] == "pgd_at on cifar10, open-set split 2"
    assert card["threat_model"] == {"norm": "l2", "epsilon": 0.5}
    assert card["data"] == {
        "name": "cifar10",
        "image_shape": [8, 8, 1],
        "classes": 2,
        "labels": ["0", "1"],
        "open_set_split": "2",
    }
    assert card["backbone"] == "resnet14" and card["seed"] == 5 and card["config"]["train"]["seed"] == 5
    assert card["versions"] == {"python": "3.10"}
    assert card["defense"]["deviations"].startswith("BatchNormalization is in inference mode while crafting (the")


def test_card_carries_what_fresh_draws_say():
    fresh = {"single_draw": {"value": 0.4, "n": 10, "draws": 20}, "majority_vote": ACCURACY, "any_of_10": ACCURACY}
    block = {"R1_fixed_noise": {**ACCURACY, "left": {"apgd_ce": ACCURACY}}, "R5_scaling": None, "R6_fresh_draws": fresh}
    card = complete(make_card({**RESULTS, "randomised": block}))
    export.check_card(card)
    assert card["figures"]["randomised"] == block
    card["figures"]["randomised"] = {"R6_fresh_draws": {}}
    with pytest.raises(InputError, match="R6_fresh_draws"):
        export.check_card(card)


def test_card_is_named_after_method_and_data():
    assert make_card()["name"] == "standard on digits"
    defense, data = config.Defense(name="trades", awp_gamma=0.005), config.Data(name="cifar10", open_set_split="0")
    name = make_card(defense=defense, data=data)["name"]
    assert name == "trades with weight perturbation on cifar10, open-set split 0"


def test_card_names_deviations_of_weight_perturbation_where_it_is_used():
    plain, perturbed = (
        make_card(defense=config.Defense(name="trades", awp_gamma=gamma))["defense"]["deviations"]
        for gamma in (0, 0.005)
    )
    assert plain.startswith("the search starts at a uniform random point")
    assert perturbed.startswith(f"{plain}; weight perturbation: as in the authors' code, a kernel's norm")


def test_card_carries_figures_with_their_own_threat_model():
    assert make_card()["figures"] == {
        "clean_accuracy": RESULTS["clean_accuracy"],
        "robust_accuracy": ACCURACY,
        "rounded_accuracy": ACCURACY,
        "attacks": [
            {
                "name": "pgd20",
                "path": "exact",
                "accuracy": 0.5,
                "cascaded_accuracy": 0.5,
                "ci95": [0.2, 0.8],
                "attacked": 9,
            }
        ],
        "cascade": False,
        "complete": True,
        "trusted": True,
        "open_set": None,
        "randomised": None,
        "sanity": {"S1": "pass", "S9": "not_run"},
        "model_digest": "0" * 64,
        "attack_budget": 7,
        "threat_model": {"norm": "linf", "epsilon": 0.2},
        "suite": "standard",
        "note": "Preliminary.",
        "seed": 3,
    }
    assert make_card(results=None)["figures"] is None


def test_card_begins_with_what_stands_under_attack():
    card = make_card()
    assert min(card) == "about"  # keys are written in order
    (line,) = card["about"]
    assert line.startswith("The suite standard leaves 50.0 % of 10 test images right in the linf ball of radius 51/255")
    assert line.endswith("(95 % interval 20.0 to 80.0 %); clean accuracy 90.0 %.")
    assert make_card(results=None)["about"] == ["Not evaluated: how far it holds up under attack is not known."]


def test_card_of_dfa_says_that_it_is_no_defense_unless_adaptive_attacks_leave_enough():
    broken = {"suite": "adaptive", "robust_accuracy": {"value": 0.01, "n": 1000, "ci95": [0.005, 0.02]}}
    dfa, standard = (config.Defense(name=name) for name in ("dfa", "standard"))

    def said(defense=dfa, **results):
        return make_card({**RESULTS, **results}, defense=defense)["about"][1:]

    for results in (broken, {"suite": "autoattack"}, {"suite": "adaptive", "trusted": False}):
        (caveat,) = said(**results)
        assert caveat.startswith("DFA alone is not a defense")
    assert said(suite="adaptive") == said(standard, **broken) == []
    assert make_card(results=None, defense=dfa)["about"][1].startswith("DFA alone is not a defense")


def gap_results(**changes):
    """Return results of AutoAttack with PGD-20 besides, which met all 9 of 10 images that are right clean."""
    left = {"pgd20": 0.7, "apgd_ce": 0.6, "apgd_t": 0.5, "fab_t": 0.5, "square": 0.5}
    (entry,) = RESULTS["attacks"]
    attacks = [
        {**entry, "name": name, "accuracy": accuracy, "attacked": 9 if name == "pgd20" else 7}
        for name, accuracy in left.items()
    ]
    return {**RESULTS, "suite": "gap", "attacks": attacks, "cascade": True, **changes}


@pytest.mark.parametrize("name", ["pgd_at", "agkd_bml"])
def test_card_says_by_how_much_pgd_flatters_where_it_met_all_images_beside_autoattack(name):
    _, gap, *caveat = make_card(gap_results(), defense=config.Defense(name=name))["about"]
    assert gap.startswith("PGD-20 alone leaves 70.0 %") and " 20.0 points" in gap
    assert caveat == [DEFENSES[name].caveat] * (name == "agkd_bml")
    export.check_card(complete(make_card(gap_results(), defense=config.Defense(name=name))))


def test_card_says_nothing_of_pgd_where_the_two_do_not_compare():
    complete_results = gap_results()
    attacks = complete_results["attacks"]
    others = [
        gap_results(attacks=[{**attacks[0], "attacked": 8}, *attacks[1:]]),  # in a cascade
        gap_results(attacks=[{**attacks[0], "path": "bpda_identity"}, *attacks[1:]]),
        gap_results(attacks=attacks[1:]),
        gap_results(complete=False),
        *(gap_results(attacks=[each for each in attacks if each["name"] != name]) for name in AUTOATTACK),
    ]
    for results in others:
        assert not any("PGD-20" in each for each in make_card(results)["about"])


def test_card_of_agkd_bml_says_that_pgd_is_no_measure_unless_adaptive_attacks_leave_enough():
    method = config.Defense(name="agkd_bml", preset="agkd_bml_7")
    for results in (RESULTS, gap_results(), {**RESULTS, "suite": "adaptive", "trusted": False}, None):
        assert make_card(results, defense=method)["about"][-1].endswith("is no measure of its robustness.")
    assert len(make_card({**RESULTS, "suite": "adaptive"}, defense=method)["about"]) == 1


def test_card_names_the_teacher_without_its_folder():
    defense = config.Defense(name="agkd_bml", teacher="some/where/teacher.keras")
    assert make_card(defense=defense)["config"]["defense"]["teacher"] == "teacher.keras"


def test_card_says_first_where_figures_are_a_bound_or_not_to_be_trusted():
    (line,) = make_card({**RESULTS, "complete": False, "trusted": False})["about"]
    assert "leaves at most 50.0 % of 10" in line and line.endswith("Not to be trusted: the sanity battery failed.")


def test_card_names_the_file_of_an_own_model_without_its_folder():
    assert make_card(backbone=config.Backbone(path="some/where/mine.keras"))["backbone"] == "mine.keras"


@pytest.mark.parametrize("name", DEFENSES)
def test_every_defense_states_its_deviations(name):
    deviations = make_card(defense=config.Defense(name=name))["defense"]["deviations"]
    assert deviations != "not stated" and "\n" not in deviations and "Source" not in deviations


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("files", {"saved_model.pb": "abc"}),
        ("files", {"../saved_model.pb": "0" * 64}),
        ("files", {"/saved_model.pb": "0" * 64}),
        ("files", {}),
        ("schema_version", 2),
        ("threat_model.norm", "l1"),
        ("threat_model.epsilon", -0.1),
        ("data.image_shape", [8, 8]),
        ("data.labels", []),
        ("figures.clean_accuracy.value", 1.5),
        ("figures.robust_accuracy.ci95", [0.5]),
        ("figures.robust_accuracy.n", 0),
        ("versions", {}),
        ("seed", None),
    ],
)
def test_schema_rejects_a_wrong_value(place, value):
    card = copy.deepcopy(complete(make_card()))
    *parents, last = place.split(".")
    part = card
    for key in parents:
        part = part[key]
    part[last] = value
    with pytest.raises(InputError, match=rf"card\.json does not follow its schema: \$\.{place.split('.')[0]}"):
        export.check_card(card)


# Cards of versions before there were these two lack them.
@pytest.mark.parametrize("key", sorted(set(complete(make_card())) - {"about", "rejection"}))
def test_schema_rejects_a_missing_part(key):
    card = complete(make_card())
    del card[key]
    with pytest.raises(InputError, match=f"'{key}' is a required property"):
        export.check_card(card)
