from __future__ import annotations

import json

import pytest

from kerasdefense.evaluation.report import wilson
from kerasdefense.evaluation.robustbench import About, entry
from kerasdefense.types import InputError

UPSTREAM = (
    "link",
    "name",
    "authors",
    "additional_data",
    "number_forward_passes",
    "dataset",
    "venue",
    "architecture",
    "eps",
    "clean_acc",
    "reported",
    "autoattack_acc",
    "external",
    "footnote",
    "unreliable",
)
OURS = (
    "claimed",
    "measured",
    "flags",
    "sanity",
    "attacks",
    "n",
    "indices_sha256",
    "ci95",
    "versions",
    "randomised",
)


def test_entry_has_the_fields_of_robustbench_and_our_blocks(results):
    about = About(authors="A, B", link="https://example.org", venue="arXiv, Jun 2024", external=0.3, footnote="Small.")
    found = entry(results, name="Model", claimed={"clean": 0.62, "robust": 0.35}, about=about)
    assert set(found) == {*UPSTREAM, *OURS}
    assert found == json.loads(json.dumps(found, allow_nan=False))
    percents = [found[name] for name in ("clean_acc", "autoattack_acc", "reported", "external")]
    assert percents == ["61.70", "34.40", "35.00", "30.00"]
    assert found["eps"] == "8/255" and found["dataset"] == "cifar10" and found["number_forward_passes"] == 1
    assert found["unreliable"] is True and found["sanity"]["S4"] == "fail" and found["sanity"]["S16"] == "not_run"
    assert found["footnote"] == "Small. Measured on 1000 of 10000 test images."
    assert found["measured"]["robust"] == 0.344 and found["ci95"] == results["robust_accuracy"]["ci95"]
    assert found["claimed"] == {"clean": 0.62, "robust": 0.35}


def test_entry_says_of_each_attack_what_it_left(results):
    attacks = entry(results, name="Model")["attacks"]
    assert [attack["ra_alone"] for attack in attacks] == [None] * 4
    assert attacks[0]["ra_cascade"] == 0.377 and attacks[1]["hp"]["targets"] == 9
    assert attacks[3]["hp"]["objective"] == "margin" and attacks[3]["seconds"] == 538.25
    results["attacks"][1]["alone"] = True
    alone = [attack["ra_alone"] for attack in entry(results, name="Model")["attacks"]]
    assert alone == [None, results["attacks"][1]["own_accuracy"]["value"], None, None]
    results["cascade"] = False
    assert entry(results, name="Model")["attacks"][0]["ra_alone"] == results["attacks"][0]["accuracy"]


def change(results, **changes):
    for path, value in changes.items():
        *outer, last = path.split("__")
        inner = results
        for name in outer:
            inner = inner[name]
        inner[last] = value
    return results


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"suite": "standard"}, "the suite was standard"),
        ({"complete": False}, "stopped early"),
        ({"threat_model__epsilon": 4 / 255}, "no such data set and threat model"),
        ({"threat_model__norm": "l2"}, "no such data set and threat model"),
        ({"config__data__name": "digits"}, "no such data set and threat model"),
        ({"flags__randomised": True}, "draws at random"),
    ],
)
def test_entry_claims_no_autoattack_accuracy_for_anything_else(results, changes, reason):
    found = entry(change(results, **changes), name="Model")
    assert "autoattack_acc" not in found and "reported" not in found and found["claimed"] is None
    assert found["footnote"].startswith("No AutoAttack accuracy: ") and reason in found["footnote"]
    assert found["measured"]["robust"] == 0.344


def test_entry_of_replaced_attacks_and_other_paths_says_so(results):
    results["attacks"][1].update(replaces="apgd_t: needs 4 classes", path="smoothed")
    found = entry(results, name="Model")
    assert "autoattack_acc" not in found and "replaced (apgd_t: needs 4 classes)" in found["footnote"]
    assert "Attacks also searched on smoothed." in found["footnote"]


@pytest.mark.parametrize(
    "norm, epsilon, words", [("l2", 0.5, "0.5"), ("l2", 1.0, "1"), ("linf", 4 / 255, "4/255"), ("linf", 0.1, "0.1")]
)
def test_eps_is_written_as_robustbench_does(results, norm, epsilon, words):
    results["threat_model"] = {"norm": norm, "epsilon": epsilon}
    assert entry(results, name="Model")["eps"] == words


def test_plus_on_cifar10_in_l2_is_an_autoattack_accuracy(results):
    results |= {"suite": "plus", "threat_model": {"norm": "l2", "epsilon": 0.5}, "trusted": True}
    results |= {"clean_accuracy": wilson(9000, 10_000), "robust_accuracy": wilson(10_000, 10_000)}
    found = entry(results, name="Model")
    assert found["autoattack_acc"] == "100.00" and found["footnote"] == "" and found["unreliable"] is False


def test_entry_without_a_sanity_battery_says_that_nothing_was_checked(results):
    found = entry({**results, "sanity": [], "trusted": True}, name="Model")
    assert found["sanity"] == {} and "not checked" in found["footnote"]


@pytest.mark.parametrize(
    "claimed, about, where",
    [
        ({"robust": 35.0}, About(), r"\$.reported"),
        ({"robust": 0.35, "seed": 1}, About(), r"\$.claimed"),
        (None, About(number_forward_passes=0), r"\$.number_forward_passes"),
        (None, About(external=-0.1), r"\$.external"),
    ],
)
def test_entry_that_breaks_the_schema_is_refused(results, claimed, about, where):
    with pytest.raises(InputError, match=f"the RobustBench entry does not follow its schema: {where}"):
        entry(results, name="Model", claimed=claimed, about=about)
