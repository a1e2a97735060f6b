"""Accuracy under attacks at common defaults: against NumPy on a linear model, and where it says nothing."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from rich.console import Console

from kerasdefense.attacks import OBJECTIVES, PGD, CarliniWagner, misclassified, norms
from kerasdefense.evaluation import ThreatModel, as_paths, check_results, nonadaptive
from kerasdefense.evaluation.batches import as_batches
from kerasdefense.evaluation.figures import ARRAYS
from kerasdefense.layers import OrthogonalHead
from kerasdefense.types import InputError

COUNT, SEED, EPSILON = 12, 3, 0.05
ATTACKS = ("fgsm", "bim", "pgd40", "cw_l2", "deepfool")
WRONG = 4
"""The image of the linear model whose label is not what the model says."""


@pytest.fixture(scope="module")
def linear():
    """Return a linear classifier of two classes, its slope, images, and what share of the radius takes each over."""
    random = np.random.default_rng(0)
    slope = random.uniform(0.5, 1.5, 16) * random.choice([-1, 1], 16)
    share = np.linspace(0.5, 1.5, COUNT)  # 10 steps of 1/255 go 0.78 of the way to the edge
    share[[2, 5]] = 0.72, 0.9
    image = 0.5 + EPSILON * share[:, None] * np.sign(slope)
    label = np.zeros(COUNT, np.int32)
    label[WRONG] = 1
    kernel = tf.constant(np.stack([slope, -slope], axis=1), tf.float32)
    return (lambda each: tf.reshape(each - 0.5, [-1, 16]) @ kernel), image.reshape(-1, 4, 4, 1), label, slope, share


@pytest.fixture(scope="module")
def measured(linear):
    """Measure in batches of eight, so that there are several."""
    logits_fn, image, label, *_ = linear
    batches = as_batches((image.astype(np.float32), label))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nonadaptive, "_BATCH", 8)
        return nonadaptive.measure_nonadaptive(
            as_paths(logits_fn), batches, ThreatModel("linf", EPSILON), examples=0, seed=SEED
        )


def test_images_count_where_they_are_right_clean_and_after_the_attack(measured, linear):
    *_, share = linear
    right = np.arange(COUNT) != WRONG
    reach = {"fgsm": 1.0, "bim": 10 / 255 / EPSILON, "pgd40": 1.0, "deepfool": np.inf}
    for name, reached in reach.items():
        np.testing.assert_array_equal(measured.arrays[name], right & (share > reached), err_msg=name)
    assert measured.arrays["bim"].sum() > measured.arrays["pgd40"].sum() > 0
    np.testing.assert_array_equal(measured.arrays["index"], np.arange(COUNT))


def test_lengths_are_those_of_what_fooled(measured, linear):
    *_, slope, share = linear
    distance = EPSILON * share * np.abs(slope).sum() / np.linalg.norm(slope)
    right = np.arange(COUNT) != WRONG
    entries = {entry["name"]: entry for entry in measured.results["attacks"]}
    assert [entry["name"] for entry in measured.results["attacks"]] == list(ATTACKS)
    assert [name for name in ATTACKS if "median_l2" in entries[name]] == ["cw_l2", "deepfool"]
    assert entries["deepfool"]["median_l2"] == pytest.approx(1.02 * np.median(distance[right]), rel=0.01)
    # The constant of CW is too small for more than the momentum of its first steps.
    assert measured.arrays["cw_l2"].sum() == right.sum() and entries["cw_l2"]["median_l2"] is None


def test_mean_is_over_attacks_of_each_image_and_has_an_interval(measured):
    mean = np.mean([measured.arrays[name] for name in ATTACKS], axis=0)
    np.testing.assert_allclose(measured.arrays["mean"], mean)
    found = measured.results["mean"]
    assert found["value"] == pytest.approx(mean.mean()) and found["ci95"][0] < mean.mean() < found["ci95"][1]
    for entry in measured.results["attacks"]:
        right = measured.arrays[entry["name"]]
        assert right.dtype == bool and (entry["accuracy"]["value"], entry["accuracy"]["n"]) == (right.mean(), COUNT)
    assert measured.results["clean_accuracy"]["value"] == pytest.approx((COUNT - 1) / COUNT)


def test_images_that_are_wrong_clean_are_not_attacked_and_count_for_nothing(linear):
    logits_fn, image, *_ = linear
    batches = as_batches((image[:3].astype(np.float32), np.ones(3, np.int32)))
    found = nonadaptive.measure_nonadaptive(as_paths(logits_fn), batches, ThreatModel("linf", 0.1), examples=2)
    assert found.results["n"] == 2 and found.results["mean"]["value"] == 0
    assert [entry.get("median_l2", "") for entry in found.results["attacks"]] == ["", "", "", None, None]


@pytest.mark.parametrize("norm, lengths", [("linf", (0.5, 1 / 255, 2 / 255)), ("l2", (0.5, 0.05, 2.5 * 0.5 / 40))])
def test_attacks_are_those_of_common_defaults(norm, lengths):
    attacks = nonadaptive.nonadaptive_attacks(ThreatModel(norm, 0.5), (4, 4, 1))
    assert tuple(attacks) == ATTACKS
    bounded, unbounded = list(attacks.values())[:3], list(attacks.values())[3:]
    assert tuple(attack.length for attack in bounded) == pytest.approx(lengths)
    assert [(attack.norm, attack.epsilon, attack.keep) for attack in bounded] == [(norm, 0.5, "last")] * 3
    assert [(attack.norm, attack.epsilon) for attack in unbounded] == [("l2", 4.0)] * 2
    assert (attacks["cw_l2"].constant, attacks["cw_l2"].searches, attacks["cw_l2"].steps) == (1e-4, 1, 1000)


@pytest.fixture(scope="module")
def masked():
    """Return a classifier whose scores are absolute cosines times 1e-3, and the images of which it is surest."""
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 1))
    embedding = keras.layers.Dense(8)(keras.layers.Flatten()(keras.layers.Rescaling(2.0, -1.0)(image)))
    model = keras.Model(image, OrthogonalHead(4, gain=1e-3, seed=0)(embedding))
    drawn = np.random.default_rng(0).uniform(0.2, 0.8, [60, 8, 8, 1]).astype(np.float32)
    logits = np.sort(model(drawn).numpy())
    surest = drawn[np.argsort(logits[:, -2] - logits[:, -1])[:8]]
    return model, tf.constant(surest), tf.argmax(model(surest), axis=1, output_type=tf.int32)


def test_property_26_margins_and_ratios_break_what_the_default_of_cw_leaves(masked):
    model, image, label = masked
    seed = tf.zeros([len(label), 2], tf.int32)
    assert float(tf.reduce_max(model(image))) <= 1e-3

    def fooled(result):
        return np.argmax(model(result.image), axis=1) != label.numpy()

    default = CarliniWagner(epsilon=8.0, steps=150, searches=1, constant=1e-4)
    assert not fooled(tf.function(lambda: default(model, image, label, seed))()).any()
    for objective in ("margin", "dlr"):
        attack = PGD("linf", 0.2, steps=10)
        result = attack(OBJECTIVES[objective](model), image, {"label": label}, seed, misclassified(model))
        assert fooled(result).all(), objective
        assert (norms.length(result.image - image, "linf").numpy() <= 0.2 + 1e-6).all()


def write(folder, results, measured, **arrays):
    """Write what an evaluation leaves of this."""
    (folder / "evaluation").mkdir(parents=True)
    np.savez(folder / ARRAYS.format("nonadaptive"), **{**measured.arrays, **arrays})
    (folder / "evaluation/results.json").write_text(json.dumps({**results, "nonadaptive": measured.results}))
    return folder


def printed(table):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return " ".join(capture.get().split())


def test_comparison_has_paired_differences_in_points(measured, results, tmp_path):
    one = write(tmp_path / "one", results, measured)
    two = write(tmp_path / "two", results, measured, deepfool=~measured.arrays["deepfool"])
    text = printed(nonadaptive.compare_nonadaptive({"first": one, "second": two}))
    assert "know nothing of the defense; robust accuracy is the worst case" in text and "percentage points" in text
    assert "+100.0 (+100.0 to +100.0)*" in text and "+0.0 (+0.0 to +0.0)" in text
    assert nonadaptive.compare_nonadaptive({"one": one, "none": tmp_path / "none"}) is None


def test_comparison_refuses_another_ball_and_other_images(measured, results, tmp_path):
    one = write(tmp_path / "one", results, measured)
    settings = {**measured.results["settings"], "fgsm": {"norm": "linf", "epsilon": 0.3}}
    ball = write(tmp_path / "ball", results, measured._replace(results={**measured.results, "settings": settings}))
    images = write(tmp_path / "images", results, measured, index=measured.arrays["index"] + 1)
    for other in (ball, images):
        with pytest.raises(InputError, match="one and two do not compare under non-adaptive attacks: other images or"):
            nonadaptive.compare_nonadaptive({"one": one, "two": other})


def test_table_says_that_this_is_no_robustness(measured, results):
    results["nonadaptive"] = measured.results
    check_results(results)
    text = printed(nonadaptive.nonadaptive_table(results))
    assert "An average over attacks that know nothing of the defense; robust accuracy is the worst case." in text
    assert "none fooled" in text and "mean over attacks" in text
    assert nonadaptive.nonadaptive_table({"nonadaptive": None}) is None
