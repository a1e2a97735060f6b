"""Attacks on the classifier alone: the same as on the whole where nothing stands in front, and blind to what does."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from rich.console import Console
from sklearn.datasets import load_digits

from kerasdefense.attacks import FGSM, Iterative, has_foolbox
from kerasdefense.defenses.purifying import purified_paths
from kerasdefense.evaluation import SUITES, PlannedAttack, ThreatModel, as_paths, check_results, oblivious
from kerasdefense.evaluation.batches import as_batches
from kerasdefense.evaluation.figures import ARRAYS
from kerasdefense.types import InputError, UsageError

COUNT, THREAT = 24, ThreatModel("linf", 0.1)
FAST = "pgd40,pgd40_targeted,cafa"


@pytest.fixture(scope="module")
def trained():
    """Return a small classifier of digits and images that it has not seen."""
    digits = load_digits()
    image, label = (digits.images[..., None] / 16).astype(np.float32), digits.target.astype(np.int32)
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input([8, 8, 1]),
        keras.layers.Conv2D(8, 3, activation="relu"),
        keras.layers.Conv2D(16, 3, activation="relu"),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(10),
    ]
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.Adam(0.02), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(image[:1200], label[:1200], batch_size=100, epochs=8, shuffle=False, verbose=0)
    return model, as_batches((image[1200 : 1200 + COUNT], label[1200 : 1200 + COUNT])), label[1200 : 1200 + COUNT]


def behind(model, purify):
    """Return a classifier with something in front of it."""
    plain = as_paths(model)
    paths = purified_paths(lambda image: model(image, training=False), lambda image, seed: purify(image))
    return plain._replace(
        attack_paths=paths, activations=lambda image: plain.activations(purify(image)), bare=plain.activations
    )


def measure(model, batches, attacks=FAST, **settings):
    return oblivious.measure_oblivious(model, batches, THREAT, examples=0, attacks=attacks, **settings)


@pytest.fixture(scope="module")
def measured(trained):
    """Measure the classifier behind the identity, in batches of 16, so that there are several."""
    model, batches, _ = trained
    names = "pgd40,pgd40_targeted,cw_l2,ddn,st_adv,ti_dim,cafa"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oblivious, "_BATCH", 16)
        return measure(behind(model, tf.identity), batches, names)


def test_identity_in_front_changes_nothing(measured, trained):
    model, batches, _ = trained
    names = [entry["name"] for entry in measured.results["attacks"]]
    assert names == [name for name in oblivious.NAMES[:-1] if name != "ddn" or has_foolbox()]
    for name in names:
        np.testing.assert_array_equal(measured.arrays[name], measured.arrays[f"bare_{name}"], err_msg=name)
    np.testing.assert_array_equal(measured.arrays["clean"], measured.arrays["bare_clean"])
    plain = measure(as_paths(model), batches)
    assert measured.results["has_purifier"] and not plain.results["has_purifier"]
    for name in FAST.split(","):
        assert plain.arrays[name].dtype == bool
        np.testing.assert_allclose(plain.arrays[name].mean(), measured.arrays[name].mean(), atol=1.5 / COUNT)


def test_attacks_fool_the_classifier_and_the_unbounded_ones_say_how_far_they_went(measured):
    entries = {entry["name"]: entry for entry in measured.results["attacks"]}
    clean = measured.results["bare_clean_accuracy"]["value"]
    assert clean > 0.7 and entries["pgd40"]["bare_accuracy"]["value"] < clean / 2
    assert entries["cw_l2"]["bare_accuracy"]["value"] < clean / 4 and 0 < entries["cw_l2"]["median_l2"] < 3
    assert {name for name, entry in entries.items() if "median_l2" in entry} == set(oblivious.ANYWHERE) & set(entries)
    if has_foolbox():
        assert 0 < entries["ddn"]["median_l2"] < 1.5 * entries["cw_l2"]["median_l2"]
    for name, entry in entries.items():
        assert entry["accuracy"]["n"] == COUNT and entry["accuracy"]["value"] == measured.arrays[name].mean()


def test_what_stands_in_front_is_scored_and_not_attacked(trained):
    model, batches, label = trained
    found = measure(behind(model, lambda image: 0 * image), batches)  # every answer is the one of black
    answer = int(np.argmax(model(np.zeros([1, 8, 8, 1], np.float32))))
    for name in FAST.split(","):
        np.testing.assert_array_equal(found.arrays[name], label == answer)
    plain = measure(as_paths(model), batches)
    for name in FAST.split(","):
        np.testing.assert_array_equal(found.arrays[f"bare_{name}"], plain.arrays[name])


def test_autoattack_keeps_what_any_member_finds(trained, monkeypatch):
    model, batches, _ = trained

    def plan(norm, epsilon, classes):
        return PlannedAttack("first", FGSM(norm, epsilon / 4)), PlannedAttack("second", FGSM(norm, epsilon))

    monkeypatch.setitem(SUITES, "autoattack", SUITES["autoattack"].__class__(plan, True, (), "two"))
    found = measure(behind(model, tf.identity), batches, "autoattack")
    assert list(found.results["settings"]["autoattack"]) == ["first", "second"]
    np.testing.assert_array_equal(found.arrays["autoattack"], found.arrays["bare_autoattack"])
    assert found.arrays["autoattack"].mean() < found.arrays["clean"].mean()


def test_settings_are_those_of_the_release(measured):
    settings = measured.results["settings"]
    for name in ("pgd40", "pgd40_targeted", "ti_dim", "cafa"):
        assert (settings[name]["steps"], settings[name]["keep"], settings[name]["epsilon"]) == (40, "last", 0.1)
        assert settings[name]["step_size"] == pytest.approx(0.01 * 0.1 / (8 / 255))
    assert settings["ti_dim"]["probability"] == 0.5 and settings["cw_l2"]["kappa"] == settings["cw_l2"]["constant"] == 1
    assert (settings["cw_l2"]["searches"], settings["cw_l2"]["steps"], settings["cw_l2"]["epsilon"]) == (4, 100, 8)


@pytest.mark.parametrize("classes", range(2, 6))
def test_target_is_never_the_label(classes):
    label = np.arange(classes)
    target = oblivious.released_target(classes)(label)
    assert (target != label).all() and ((target >= 0) & (target < classes)).all()
    if classes > 3:
        np.testing.assert_array_equal(target, np.where(label == 3, 1, 3))


def test_names_are_checked_and_put_in_order():
    assert oblivious.chosen("") == oblivious.NAMES and oblivious.chosen("cafa, pgd40") == ("pgd40", "cafa")
    with pytest.raises(
        UsageError, match="unknown attack of --evaluate_oblivious_attacks 'pgd'; valid: autoattack, cafa"
    ):
        oblivious.chosen("pgd")


def test_attacks_that_cannot_run_are_named(trained, monkeypatch, results):
    model, batches, _ = trained
    monkeypatch.setattr(oblivious, "has_foolbox", lambda: False)
    for loaded in (
        as_paths(lambda image: model(image)),
        behind(model, tf.identity)._replace(bare=None),
        behind(model, tf.identity)._replace(head=None),
    ):
        found = measure(loaded, batches, "ddn,cafa")
        assert found.results["attacks"] == [] and set(found.arrays) == {"index", "clean", "bare_clean"}
        assert "foolbox" in found.results["left_out"]["ddn"] and "last layer" in found.results["left_out"]["cafa"]
    results["oblivious"] = found.results
    check_results(results)
    assert "Without ddn: foolbox is not installed: pip install '.[bench]'." in printed(
        oblivious.oblivious_table(results)
    )


def printed(table):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return " ".join(capture.get().split())


def test_table_says_that_this_is_no_robustness(measured, results):
    results["oblivious"] = measured.results
    check_results(results)
    text = printed(oblivious.oblivious_table(results))
    assert "an attacker who does not know of what stands in front; no measure of robustness." in text
    assert "Nothing stands in front" not in text and "pgd40_targeted" in text
    results["oblivious"] = {**measured.results, "has_purifier": False}
    assert "Nothing stands in front of this model." in printed(oblivious.oblivious_table(results))
    assert oblivious.oblivious_table({"oblivious": None}) is None
    del results["oblivious"]["left_out"]
    with pytest.raises(InputError, match="left_out"):
        check_results(results)


def test_comparison_has_paired_differences_in_points(measured, results, tmp_path):
    changed = measured._replace(arrays={**measured.arrays, "cafa": ~measured.arrays["cafa"]})
    folders = {}
    for name, each in {"one": measured, "two": changed}.items():
        folders[name] = tmp_path / name
        (folders[name] / "evaluation").mkdir(parents=True)
        np.savez(folders[name] / ARRAYS.format("oblivious"), **each.arrays)
        described = json.dumps({**results, "oblivious": each.results})
        (folders[name] / "evaluation/results.json").write_text(described)
    text = printed(oblivious.compare_oblivious(folders))
    assert "bare pgd40" in text and "percentage points" in text and "+0.0 (+0.0 to +0.0)" in text
    assert "no measure of robustness" in text
    assert oblivious.compare_oblivious({"one": folders["one"], "none": tmp_path / "none"}) is None


def test_attacks_in_steps_are_iterative():
    crafter = object.__new__(oblivious._Crafter)
    crafter._threat_model, crafter._chunk = ThreatModel("l2", 0.5), type("Chunk", (), {"image": np.zeros([1, 4, 4, 1])})
    iterative = [name for name in oblivious.NAMES[:-1] if isinstance(crafter._attack(name), Iterative)]
    assert iterative == ["pgd40", "pgd40_targeted", "cw_l2", "ti_dim", "cafa"]
