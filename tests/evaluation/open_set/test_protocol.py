"""The protocol: thresholds from validation images alone, four cells, the reject option, and going on after a stop."""

import dataclasses
import io
import json
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf
from rich.console import Console

from kerasdefense.detectors import DETECTORS, Detector, rejection
from kerasdefense.detectors.rejection import RejectOption
from kerasdefense.evaluation import ThreatModel
from kerasdefense.evaluation.open_set import (
    Images,
    OpenSetOptions,
    Unknown,
    fit_detectors,
    measure_open_set,
    metrics,
    open_set_tables,
    write_pictures,
)
from kerasdefense.evaluation.open_set import attacked as attacked_module
from kerasdefense.types import InputError, UsageError

NAMES = ("max_logit", "mahalanobis")
THREAT = ThreatModel("linf", 0.1)
OPTIONS = OpenSetOptions(examples=16, steps=5, chunk_size=16)
CELLS = attacked_module.CELLS


def images_of(digits, as_dataset, **changes):
    half = len(digits.unknown.label) // 2
    unknown = [
        Unknown("unknown classes", "near", as_dataset(digits.unknown.rows(np.arange(half)))),
        Unknown("others", "near", as_dataset(digits.unknown.rows(np.arange(half, 2 * half)))),
        Unknown("grey", "far", as_dataset(dataclasses.replace(digits.unknown, image=digits.unknown.image * 0 + 0.5))),
    ]
    parts = {name: as_dataset(getattr(digits, name)) for name in ("train", "validation", "known")}
    return Images(**{**parts, "unknown": unknown, **changes})


class Measured(NamedTuple):
    options: list
    results: dict
    arrays: dict


def measure(digits, as_dataset, names=NAMES, options=OPTIONS, loaded=None, **changes):
    loaded, images = loaded or digits.loaded, images_of(digits, as_dataset, **changes)
    fitted = fit_detectors(loaded, {name: DETECTORS[name]() for name in names}, images, THREAT, options)
    return Measured(fitted, *measure_open_set(loaded, fitted, images, THREAT, options))


@pytest.fixture(scope="module")
def found(open_digits, as_dataset):
    return measure(open_digits, as_dataset)


def test_threshold_keeps_the_retention_on_validation_and_comes_near_it_on_test(found, open_digits):
    for option in found.options:
        validation = found.arrays[f"{option.name}/validation"]
        assert np.mean(validation <= option.threshold) >= 0.95
        assert np.mean(validation < option.threshold) < 0.95  # the smallest that does
        accepted = found.results["detectors"][option.name]["accepted"]
        assert accepted["n"] == len(open_digits.known.label)
        assert accepted["value"] == np.mean(found.arrays[f"{option.name}/known"] <= option.threshold)
        assert accepted["ci95"][0] < 0.97 and accepted["ci95"][1] > 0.93


def test_property_24_thresholds_and_so_f1_are_set_without_unknown_and_test_images(found, open_digits, as_dataset):
    def images():
        raise AssertionError("images were read that have no say in a threshold")
        yield

    spec = as_dataset(open_digits.known).element_spec
    closed = tf.data.Dataset.from_generator(images, output_signature=spec)
    unknown = [Unknown("unknown classes", "near", closed)]
    given = images_of(open_digits, as_dataset, known=closed, unknown=unknown)
    detectors = {name: DETECTORS[name]() for name in NAMES}
    fitted = fit_detectors(open_digits.loaded, detectors, given, THREAT, OPTIONS)
    assert [each.threshold for each in fitted] == [each.threshold for each in found.options]
    for option in fitted:
        known, others = (found.arrays[f"{option.name}/{name}"] for name in ("known", "sets/others"))
        figure = found.results["detectors"][option.name]["sets"]["others"]["f1_binary"]
        assert figure == metrics.f1_binary(known, others, option.threshold)


def test_unknown_images_are_recognised(found):
    assert found.results["detectors"]["mahalanobis"]["sets"]["unknown classes"]["auroc"] > 0.8
    for entry in found.results["detectors"].values():
        assert entry["sets"]["unknown classes"]["accepted"]["value"] < entry["accepted"]["value"]


def test_near_and_far_means_are_kept_apart(found):
    for entry in found.results["detectors"].values():
        near = [entry["sets"][name]["auroc"] for name in ("unknown classes", "others")]
        assert entry["means"]["near"]["auroc"] == pytest.approx(np.mean(near))
        assert entry["means"]["far"]["auroc"] == entry["sets"]["grey"]["auroc"]


def test_figures_are_those_of_the_scores_that_are_stored(found, open_digits):
    right = (
        open_digits.loaded.activations(open_digits.known.image)["logits"].numpy().argmax(1) == open_digits.known.label
    )
    for name, entry in found.results["detectors"].items():
        known, unknown = found.arrays[f"{name}/known"], found.arrays[f"{name}/sets/others"]
        for key, value in metrics.summary(known, right, unknown).items():
            assert entry["sets"]["others"][key] == pytest.approx(value, abs=1e-12)


def test_four_cells_only_fall(found):
    """evaluation 13: AUROC(both) <= AUROC(one) <= AUROC(clean); at the threshold, attacked rates are no better."""
    for name, entry in found.results["detectors"].items():
        auroc = {cell: entry["grid"][cell]["auroc"] for cell in CELLS}
        one = auroc["known_attacked"], auroc["unknown_attacked"]
        assert auroc["both_attacked"] <= min(one) <= max(one) <= auroc["clean"]
        assert auroc["both_attacked"] < auroc["clean"]
        clean, both = entry["grid"]["clean"], entry["grid"]["both_attacked"]
        assert both["known_accepted"]["value"] <= clean["known_accepted"]["value"]
        assert both["unknown_accepted"]["value"] >= clean["unknown_accepted"]["value"]
        arrays = {key.split("/")[1]: array for key, array in found.arrays.items() if key.startswith(f"{name}/")}
        assert auroc["both_attacked"] == metrics.auroc(arrays["known_attacked"], arrays["unknown_attacked"])
        assert auroc["known_attacked"] == metrics.auroc(arrays["known_attacked"], arrays["unknown_clean"])
        assert auroc["unknown_attacked"] == metrics.auroc(arrays["known_clean"], arrays["unknown_attacked"])


def test_robust_accuracy_with_reject_counts_refused_clean_images_as_errors(found, open_digits):
    first = open_digits.known.rows(np.arange(16))
    right = open_digits.loaded.activations(first.image)["logits"].numpy().argmax(axis=1) == first.label
    for name, entry in found.results["detectors"].items():
        reject, threshold = entry["reject"], entry["threshold"]
        clean, robust = reject["clean_accuracy_with_reject"], reject["robust_accuracy_with_reject"]
        assert robust["value"] < clean["value"] <= entry["grid"]["clean"]["known_accepted"]["value"]
        lowest = found.arrays[f"{name}/known_lowest_wrong"]
        accepted = right & (found.arrays[f"{name}/known_clean"] <= threshold)
        assert clean["value"] == np.mean(accepted)
        assert robust["value"] == np.mean(accepted & (lowest > threshold))
        assert reject["fooled_and_accepted"]["value"] == np.mean(right & (lowest <= threshold))
        assert reject["fooled_and_accepted_at_half"]["value"] <= reject["fooled_and_accepted"]["value"]


def test_images_that_others_found_count_as_well(open_digits, as_dataset):
    """An image that is wrong and accepted breaks the reject option, whoever found it."""
    names, options = ("max_logit",), OPTIONS._replace(steps=1)
    # Of each known image one of another class, which is right as that class and so wrong and accepted as this one.
    known = open_digits.known.rows(np.arange(16))
    others = [np.flatnonzero(known.label != label)[0] for label in known.label]
    found = measure(open_digits, as_dataset, names, options, candidates=known.image[others])
    assert found.results["attack"]["candidates"] == 16
    entry = found.results["detectors"]["max_logit"]
    assert entry["reject"]["robust_accuracy_with_reject"]["value"] == 0


@pytest.mark.parametrize("what", ["steps", "starts", "joint", "seed", "epsilon", "model", "fit", "images", "labels"])
def test_attack_is_remembered_only_where_all_is_the_same(what, open_digits, as_dataset):
    def key(changed=""):
        changes = {"steps": {"steps": 3}, "starts": {"starts": 2}, "joint": {"joint": False}, "seed": {"seed": 1}}
        options = OPTIONS._replace(**changes.get(changed, {}))
        threat = ThreatModel("linf", 0.2 if changed == "epsilon" else 0.1)
        loaded = open_digits.loaded._replace(digest="another" if changed == "model" else "one")
        known = {
            "images": open_digits.validation,
            "labels": dataclasses.replace(open_digits.known, label=np.roll(open_digits.known.label, 1)),
        }.get(changed, open_digits.known)
        detector = open_digits.fitted("mahalanobis" if changed != "fit" else "relative_mahalanobis")
        images = images_of(open_digits, as_dataset, known=as_dataset(known))
        return attacked_module.Attacked(loaded, images, threat, options)._key(detector)

    assert key() == key() != key(what)


def test_evaluation_that_was_stopped_attacks_no_detector_twice(open_digits, as_dataset, tmp_path, monkeypatch):
    calls, attack = [], attacked_module.move_scores
    monkeypatch.setattr(attacked_module, "move_scores", lambda *given: calls.append(given[0].name) or attack(*given))
    options = OPTIONS._replace(folder=tmp_path, steps=2, joint=False)
    first = measure(open_digits, as_dataset, ("energy",), options)
    for expected in (1, 2):
        again = measure(open_digits, as_dataset, ("energy",), options)
        for key, array in first.arrays.items():
            np.testing.assert_array_equal(again.arrays[key], array)
        assert len(calls) == expected
        (tmp_path / "energy.npz").write_bytes(b"torn")  # and so made again
    measure(open_digits, as_dataset, ("msp",), options, loaded=open_digits.loaded._replace(digest=""))
    assert not (tmp_path / "msp.npz").exists()  # nothing tells one such model from another


def test_fit_on_adversarial_images_sees_what_fools_the_model(open_digits, as_dataset, monkeypatch):
    seen = {}

    class Spy(Detector):
        def _fit(self, training, notes):
            seen["accuracy"] = np.mean(training.logits.argmax(axis=1) == training.label)
            seen["count"] = len(training.label)
            return {}

        def _score(self, activations):
            return -tf.reduce_max(activations["logits"], axis=-1)

    options = OPTIONS._replace(examples=0, fit_examples=200)
    accuracy = {}
    for fit_on, count in (("clean", 200), ("adv", 200), ("both", 400)):
        images = images_of(open_digits, as_dataset)
        fitted = fit_detectors(open_digits.loaded, {"spy": Spy()}, images, THREAT, options._replace(fit_on=fit_on))
        assert (seen["count"], fitted[0].images[0]) == (count, 200)
        assert (fitted[0].fit_attack or {}).get("epsilon") == (None if fit_on == "clean" else THREAT.epsilon)
        accuracy[fit_on] = seen["accuracy"]
    assert accuracy["adv"] < accuracy["clean"] - 0.2
    assert accuracy["both"] == pytest.approx((accuracy["clean"] + accuracy["adv"]) / 2)
    found = measure(open_digits, as_dataset, ("energy",), options)
    assert found.results["attack"] is None and found.results["detectors"]["energy"]["grid"] is None


def test_tables_and_pictures_show_every_detector(found, tmp_path):
    console = Console(width=80, record=True, file=io.StringIO())
    for table in open_set_tables({"open_set": found.results}):
        console.print(table)
    text = console.export_text()
    assert all(text.count(name) >= 6 for name in NAMES)  # sets, means, thresholds and the grid, none cut short
    assert "mean over the far sets" in text and "…" not in text
    words = " ".join(text.split())
    assert "F1 at the threshold: bin. of refusing the unknown, macro over the known classes and one for" in words
    write_pictures(tmp_path / "scores.png", tmp_path / "roc.png", found)
    assert min((tmp_path / name).stat().st_size for name in ("scores.png", "roc.png")) > 10_000


@pytest.mark.parametrize(
    "changes, kind, words",
    [
        ({"retention": 1.0}, UsageError, "retention must be above 0 and below 1"),
        ({"fit_on": "noise"}, UsageError, "fit_on must be one of clean, adv, both"),
        ({"steps": 0}, UsageError, "steps and starts at least 1"),
    ],
)
def test_options_are_checked(open_digits, as_dataset, changes, kind, words):
    with pytest.raises(kind, match=words):
        measure(open_digits, as_dataset, options=OPTIONS._replace(**changes))


def test_bad_data_ends_in_one_line(open_digits, as_dataset):
    none = as_dataset(open_digits.unknown.rows(np.arange(0)))
    with pytest.raises(InputError, match="no images to score"):
        measure(open_digits, as_dataset, unknown=[Unknown("empty", "", none)])
    with pytest.raises(InputError, match="no training images"):
        measure(open_digits, as_dataset, train=none)
    for fit_on in ("clean", "adv"):  # unknown images have no place in a fit
        with pytest.raises(InputError, match="known classes"):
            options = OPTIONS._replace(fit_on=fit_on)
            measure(open_digits, as_dataset, options=options, train=as_dataset(open_digits.unknown))
    broken = open_digits.loaded._replace(
        activations=lambda image: {"logits": tf.fill([tf.shape(image)[0], 6], float("nan"))}
    )
    with pytest.raises(InputError, match="NaN"):
        measure(open_digits, as_dataset, ("msp",), loaded=broken)


def test_detector_that_needs_more_than_the_model_tells_is_refused(open_digits, as_dataset):
    bare = open_digits.loaded._replace(activations=lambda image: {"logits": tf.zeros([tf.shape(image)[0], 6])})
    with pytest.raises(UsageError, match="embedding"):
        measure(open_digits, as_dataset, ("knn",), loaded=bare)
    generator = tf.random.Generator.from_seed(0)
    noisy = open_digits.loaded._replace(activations=lambda image: {"logits": generator.normal([tf.shape(image)[0], 6])})
    for random in (open_digits.loaded._replace(is_randomised=True), noisy):
        with pytest.raises(UsageError, match="draws nothing at random"):
            measure(open_digits, as_dataset, ("msp",), loaded=random)
    head = open_digits.loaded.head
    other = open_digits.loaded._replace(head=head._replace(kernel=head.kernel[:, ::-1]))
    with pytest.raises(UsageError, match="needs the head"):
        measure(open_digits, as_dataset, ("react",), loaded=other)


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_reject_option_survives_its_file(name, open_digits, tmp_path):
    option = RejectOption(name, open_digits.fitted(name), 0.25, 0.9, "adv", {"epsilon": 0.1}, (100, 50))
    option.detector.notes = ("a fallback",)
    rejection.write(tmp_path / f"{name}.npz", option, model="abc")
    found = rejection.read(tmp_path / f"{name}.npz", model="abc")
    assert found.described() == option.described()
    image = open_digits.unknown.image[:8]
    activations_fn = open_digits.loaded.activations
    np.testing.assert_array_equal(
        found.detector.score_image(activations_fn, image), option.detector.score_image(activations_fn, image)
    )


def test_reject_option_of_another_model_or_a_torn_file_is_refused(open_digits, tmp_path):
    path = tmp_path / "energy.npz"
    with pytest.raises(InputError, match="--detector_name=energy first"):
        rejection.read(path, model="abc")
    rejection.write(
        path, RejectOption("energy", open_digits.fitted("energy"), 0.0, 0.9, "clean", None, (1, 1)), model="abc"
    )
    with pytest.raises(InputError, match="another model"):
        rejection.read(path, model="xyz")
    with np.load(path) as stored:
        arrays = dict(stored)
    for change in ("model", "threshold"):
        header = json.loads(str(arrays["header"]))
        header.pop(change)
        np.savez(path, **{**arrays, "header": np.array(json.dumps(header))})
        with pytest.raises(InputError, match="no complete detector"):
            rejection.read(path, model="abc")
    option = RejectOption("knn", open_digits.fitted("knn"), 0.0, 0.9, "clean", None, (1, 1))
    rejection.write(tmp_path / "knn.npz", option, model="abc")
    with np.load(tmp_path / "knn.npz") as stored:
        np.savez(tmp_path / "knn.npz", header=stored["header"])
    with pytest.raises(InputError, match="no complete detector"):
        rejection.read(tmp_path / "knn.npz", model="abc")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="no complete detector"):
        rejection.read(path, model="abc")
