from __future__ import annotations

import copy
import hashlib
import io
import json
import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kerasdefense.attacks import FGSM
from kerasdefense.evaluation import (
    PlannedAttack,
    ThreatModel,
    accuracy_interval,
    check_results,
    evaluate,
    radius,
    randomised_table,
    sanity_lines,
    table,
    versions,
)
from kerasdefense.evaluation.report import note
from kerasdefense.types import InputError


@pytest.fixture(scope="module")
def results():
    """Return the results of a small evaluation, as run.py completes them."""
    random = np.random.default_rng(0)
    image = random.uniform(size=[8, 4, 4, 1]).astype(np.float32)
    weights = random.normal(size=[16, 3]).astype(np.float32)
    label = np.argmax(image.reshape(8, 16) @ weights, axis=1).astype(np.int32)
    elements = {"image": image, "label": label, "index": np.arange(8, dtype=np.int32)}
    measured = evaluate(
        {
            "exact": lambda image, seed: tf.reshape(image, [-1, 16]) @ weights,
            "bpda_identity": lambda image, seed: -image[:, 0, :3, 0],
        },
        tf.data.Dataset.from_tensor_slices(elements).batch(8),
        ThreatModel("linf", 32 / 255),
        [PlannedAttack("fgsm", FGSM("linf", 32 / 255))],
        sanity_examples=0,
    )
    digest = hashlib.sha256(b"").hexdigest()
    rest = {"suite": "quick", "note": note(measured, "quick"), "config": {}, "versions": versions(), "seed": 0}
    rest |= {"model": {"name": "linear", "digest": digest}, "adversarial_sha256": digest}
    return {"schema_version": 2, **measured, "attack_budget": 1, **rest}


@given(st.integers(1, 500), st.floats(0, 1))
def test_accuracy_interval_is_wilsons(total, share):
    count = round(share * total)
    right = np.arange(total) < count
    z = 1.959963984540054
    center = (count + z**2 / 2) / (total + z**2)
    half = z / (total + z**2) * math.sqrt(count * (total - count) / total + z**2 / 4)
    interval = accuracy_interval(right)
    assert interval["value"] == count / total and interval["n"] == total
    np.testing.assert_allclose(interval["ci95"], [max(center - half, 0), min(center + half, 1)], atol=1e-9)


def test_accuracy_interval_of_a_published_example():
    """Wilson 1927 on 81 of 263, as in Brown, Cai and DasGupta's and Newcombe's tables: 0.2553 to 0.3662."""
    interval = accuracy_interval(np.arange(263) < 81)["ci95"]
    assert [round(bound, 4) for bound in interval] == [0.2553, 0.3662]


def test_results_follow_the_schema_and_survive_json(results):
    check_results(results)
    check_results(json.loads(json.dumps(results)))


def broken(results, path, value):
    changed = copy.deepcopy(results)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    "path, value, where",
    [
        (["robust_accuracy"], None, "robust_accuracy"),
        (["robust_accuracy", "value"], 1.2, r"\$.robust_accuracy.value"),
        (["clean_accuracy", "n"], 0, r"\$.clean_accuracy.n"),
        (["clean_accuracy", "ci95"], [0.1], r"\$.clean_accuracy.ci95"),
        (["clean_accuracy", "ci95"], [0.1, 2], r"\$.clean_accuracy.ci95\[1\]"),
        (["attacks"], [], r"\$.attacks"),
        (["attacks", 0, "cascaded_accuracy"], None, "cascaded_accuracy"),
        (["attacks", 1, "threat_model", "norm"], "l7", r"\$.attacks\[1\].threat_model.norm"),
        (["attacks", 0, "seconds"], -1, r"\$.attacks\[0\].seconds"),
        (["schema_version"], 1, r"\$.schema_version"),
        (["seed"], "zero", r"\$.seed"),
        (["versions", "keras"], 2, r"\$.versions.keras"),
        (["config"], None, "config"),
    ],
)
def test_results_that_break_the_schema_are_refused(results, path, value, where):
    with pytest.raises(InputError, match=f"results.json does not follow its schema: .*{where}"):
        check_results(broken(results, path, value))


def test_table_says_which_attacks_of_a_cascade_stand_alone_and_what_each_leaves(results):
    half, none = ({"value": value, "n": 8, "ci95": [0.1, 0.9]} for value in (0.5, 0.0))
    attacks = [
        {**results["attacks"][0], "name": name, "own_accuracy": half, "cascaded_accuracy": 0.25, "alone": alone}
        for name, alone in (("first", False), ("second", True))
    ]
    found = table({**results, "cascade": True, "attacks": attacks, "robust_accuracy": none}, "gap")
    names, accuracies = ([*column.cells] for column in found.columns[:2])
    assert names[1:3] == ["and after first", "after second alone"] and accuracies[1:3] == ["25.0 %", "50.0 %"]


def test_table_shows_every_attack_the_worst_case_and_how_many_images(results):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(results, "standard on digits"))
    text = " ".join(console.export_text().split())
    clean, robust = results["clean_accuracy"]["value"], results["robust_accuracy"]["value"]
    assert clean == 1 and 0 < robust < 1
    for words in (
        "standard on digits",
        "clean",
        "100.0 %",
        "after fgsm ",
        "after fgsm via bpda_identity",
        "robust: worst of all",
        f"{100 * robust:.1f} %",
        "linf ball of radius 32/255, n = 8, seed 0",
        "Preliminary, fewer than 1000 images. Suite quick: not an AutoAttack result",
    ):
        assert words in text


@pytest.mark.parametrize(
    "epsilon, words", [(8 / 255, "8/255"), (1.0, "255/255"), (0.5, "0.5"), (0.15, "0.15"), (0.0, "0/255")]
)
def test_radius_is_written_as_people_do(epsilon, words):
    assert radius(epsilon) == words


def with_images(results, n):
    return broken(results, ["clean_accuracy", "n"], n)


def test_note_calls_few_images_preliminary(results):
    assert note(with_images(results, 999), "quick").startswith("Preliminary")
    assert not note(with_images(results, 1000), "quick").startswith("Preliminary")


def test_note_says_what_stands_in_for_what_and_that_the_time_was_up(results):
    changed = broken(with_images(results, 1000), ["attacks", 0, "replaces"], "apgd_t: too few classes")
    assert (
        note(changed, "autoattack")
        == "Suite autoattack: AutoAttack standard. fgsm stands in for apgd_t: too few classes."
    )
    assert note({**changed, "complete": False}, "autoattack").startswith("Upper bound: the time was up")


def test_note_says_what_becomes_of_a_suite_on_a_model_that_draws_at_random(results):
    random = broken(with_images(results, 1000), ["flags", "randomised"], True)
    assert note(random, "autoattack").startswith("Suite autoattack: the model draws at random, so AutoAttack rand, PGD")
    assert note(random, "quick") == (
        "Suite quick: not an AutoAttack result, true robustness is at most this; the model draws at random, so "
        "those of its attacks that go step by step follow the mean over 20 draws, the others one draw. Accuracies are "
        "by the mean probabilities of 10 draws."
    )
    assert "stand in for it, few attacks for ablations: not an AutoAttack result" in note(random, "ablation")
    assert "few attacks, for ablations: not an AutoAttack result" in note(with_images(results, 1000), "ablation")
    text = printed(table({**random, "note": note(random, "autoattack")}, "mine"))
    assert "the model draws at random, so AutoAttack rand" in text


def printed(what):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(what)
    return " ".join(console.export_text().split())


def test_figures_of_a_model_that_draws_at_random_are_printed(results):
    assert randomised_table(results) is None
    share = accuracy_interval(np.arange(8) < 2)
    block = {
        "R1_fixed_noise": {**share, "clean": accuracy_interval(np.ones(8)), "left": {"apgd_ce": share}},
        "R2_autoattack_rand": None,
        "R3_pgd200_eot": None,
        "R4_square": None,
        "R5_scaling": [{"draws": 5, **share}],
        "R6_fresh_draws": {
            "single_draw": {"value": 0.375, "n": 8, "draws": 20},
            "majority_vote": share,
            "any_of_10": accuracy_interval(np.zeros(8)),
        },
        "keyed": True,
    }
    check_results({**results, "randomised": block})
    text = printed(randomised_table({**results, "randomised": block}))
    for words in (
        "R1 AutoAttack on the model with its draw held fixed │ 25.0 %",
        "held fixed: clean │ 100.0 %",
        "held fixed: left by apgd ce │ 25.0 %",
        "R3 a long PGD on the mean over draws │ not measured",
        "draws: 5 │ 25.0 %",
        "single draw │ 37.5 % │ │ 8",
        "majority vote │ 25.0 %",
        "any of 10 │ 0.0 %",
    ):
        assert words in text, words
    block["R5_scaling"][0]["value"] = 1.5
    with pytest.raises(InputError, match="R5_scaling"):
        check_results({**results, "randomised": block})


def sanity_item(name, status, *, gates=True):
    return {
        "id": name,
        "asks": "is it",
        "status": status,
        "value": 0.5,
        "threshold": 0.25,
        "detail": "",
        "gates": gates,
    }


def test_failed_sanity_items_are_printed_beside_the_headline(results):
    items = [sanity_item("S1", "pass"), sanity_item("S9", "fail"), sanity_item("S12", "fail", gates=False)]
    items.append(sanity_item("S16", "not_run"))
    failed = {**results, "sanity": items, "trusted": False}
    lines = sanity_lines(failed)
    assert lines[0] == "sanity battery: 1 passed, 2 failed, not run: S16 - NOT TO BE TRUSTED"
    assert lines[1].split() == ["S9", "failed:", "is", "it:", "0.5,", "must", "be", "at", "most", "0.25."]
    assert "S12 failed (reported only)" in lines[2] and len(lines) == 3
    assert note(failed, "quick").startswith("Not to be trusted: S9 of the sanity battery failed.")
    assert sanity_lines(results) == ["sanity battery: not run"]


def test_versions_name_what_the_figures_depend_on():
    found = versions()
    assert found["tensorflow"] == tf.__version__ and found["numpy"] == np.__version__
    assert {"kerasdefense", "keras", "cleverhans", "python"} <= set(found)
