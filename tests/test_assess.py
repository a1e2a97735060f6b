"""Evaluating any model from the command line, and verifying later what was found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from sklearn.datasets import load_digits

from kerasdefense import assess, config, data, evaluation, export, run
from kerasdefense.evaluation import geometry
from kerasdefense.evaluation.digests import of_file
from kerasdefense.evaluation.figures import ARRAYS, PICTURE, Figures
from kerasdefense.integrity import BESIDE
from kerasdefense.types import InputError, UsageError

QUICK = ["--mode=evaluate", "--evaluate_suite=quick", "--evaluate_sanity_examples=16", "--noprogress"]
QUICK += ["--evaluate_examples=24", "--attack_epsilon=0.1"]


def classifier(*, activation=None, classes=10):
    image = keras.Input([8, 8, 1])
    tensor = keras.layers.Conv2D(8, 3, activation="relu", kernel_initializer=keras.initializers.GlorotUniform(0))(image)
    tensor = keras.layers.Flatten()(tensor)
    dense = keras.layers.Dense(classes, activation, kernel_initializer=keras.initializers.GlorotUniform(1))
    return keras.Model(image, dense(tensor))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A Keras model that no code of ours has trained."""
    data = load_digits()
    image, label = (data.images[..., None] / 16).astype(np.float32), data.target
    model = classifier()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss=loss)
    model.fit(image[:1200], label[:1200], batch_size=100, epochs=4, shuffle=False, verbose=0)
    path = tmp_path_factory.mktemp("foreign") / "mine.keras"
    model.save(path)
    return path


@pytest.fixture(scope="module")
def evaluated(foreign, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "mine"
    figures = ["--evaluate_internals=8", "--evaluate_nonadaptive=3"]
    assert run.main([*QUICK, *figures, f"--evaluate_model={foreign}", f"--run_dir={run_dir}"]) == 0
    return run_dir


def results_of(run_dir):
    return json.loads((run_dir / assess.RESULTS).read_text())


def test_foreign_model_is_evaluated_into_its_directory(evaluated, foreign):
    names = {path.name for path in (evaluated / assess.FOLDER).iterdir()}
    arrays = {"adversarial.npz", "internals.npz", "nonadaptive.npz"}
    assert names == {"results.json", "report.html", "robustbench.json", *arrays}
    results = results_of(evaluated)
    assert results["attack_budget"] is None and results["model"]["name"] == "mine"
    assert results["model"]["digest"] == of_file(foreign)
    assert 0 <= results["robust_accuracy"]["value"] < results["clean_accuracy"]["value"]
    entry = json.loads((evaluated / assess.ENTRY).read_text())
    assert entry["measured"]["n"] == 24 and "autoattack_acc" not in entry
    with np.load(evaluated / ARRAYS.format("internals")) as inside:
        assert len(inside["index"]) == results["internals"]["n"] == 8
        assert results["internals"]["figures"]["loss"]["value"] == pytest.approx(inside["loss"].mean())
    with np.load(evaluated / ARRAYS.format("nonadaptive")) as average:
        assert len(average["index"]) == results["nonadaptive"]["n"] == 3
        assert results["nonadaptive"]["mean"]["value"] == pytest.approx(average["mean"].mean())


@pytest.mark.parametrize("flag", ["internals", "nonadaptive", "oblivious"])
def test_figures_of_images_are_refused_for_a_model_that_draws_at_random(flag):
    model = evaluation.Loaded({}, is_randomised=True)
    with pytest.raises(UsageError, match=f"--evaluate_{flag} needs a model that draws nothing at random"):
        assess.assess(config.Run(evaluate=config.Evaluate(**{flag: 4})), None, model)


@pytest.mark.parametrize("is_random", [False, True])
def test_images_of_the_page_are_answered_as_the_accuracies_were(is_random, tmp_path, monkeypatch):
    asked = []

    class Exact:
        def __init__(self, path, *, seed, chunk_size, draws):
            asked.append(draws)

        def logits(self, chunk):
            return np.zeros([len(chunk.label), 2])

    for name in ("write_json", "write_report", "choose_examples"):
        monkeypatch.setattr(assess, name, lambda *args, **kwargs: None)
    for name in ("check_results", "robustbench_entry"):
        monkeypatch.setattr(evaluation, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(assess, "images_of", lambda split, index: np.zeros([2, 4, 4, 1], np.float32))
    monkeypatch.setattr(assess, "ExactPath", Exact)
    (tmp_path / assess.FOLDER).mkdir()
    label = np.zeros(2, np.int32)
    np.savez(tmp_path / assess.ADVERSARIAL, index=label, label=label, image_adv=np.zeros([2, 4, 4, 1], np.float32))
    splits, model = SimpleNamespace(test=None, labels=("a", "b"), name="d"), evaluation.Loaded({"exact": None})
    assess._write(tmp_path, {"flags": {"randomised": is_random}, "seed": 0}, splits, model)
    assert asked == [10 if is_random else 1]


def test_picture_of_the_embedding_comes_and_goes_with_the_measurement(tmp_path, monkeypatch):
    embedding, label = np.random.default_rng(0).standard_normal((6, 3)), np.arange(6) % 2
    embeddings = geometry.Embeddings(embedding, embedding + 1, label)
    found = Figures({"n": 6}, {"index": np.arange(6)}, embeddings)
    monkeypatch.setitem(assess.FIGURES, "internals", lambda *args, **kwargs: found)
    splits = SimpleNamespace(labels=("even", "odd"), test=SimpleNamespace(batches=lambda size: None))
    kept = [tmp_path / ARRAYS.format("internals"), tmp_path / PICTURE]

    def measured(examples):
        given = config.Run(run_dir=str(tmp_path), evaluate=config.Evaluate(internals=examples))
        threat_model = evaluation.ThreatModel("linf", 0.1)
        model = SimpleNamespace(name="parity")
        return assess._figures(given, splits, model, threat_model, is_randomised=False)["internals"]

    assert measured(6)["n"] == 6 and all(path.is_file() for path in kept)
    with Image.open(kept[1]) as picture:
        assert picture.format == "PNG" and np.unique(picture.convert("L")).size > 10
    assert measured(0) is None and not any(path.exists() for path in kept)


def test_evaluation_is_verified_in_a_process_without_its_state(evaluated, capsys):
    assert run.main(["--mode=verify", str(evaluated)]) == 0
    out = capsys.readouterr().out
    results = results_of(evaluated)
    for key in ("clean_accuracy", "robust_accuracy"):
        percent = f"{100 * results[key]['value']:.2f} %"
        assert f"{percent} recorded, {percent} scored again: ok" in out
    assert "verified" in out and "0 of 24 outside the linf ball of radius 0.1" in out and "DIFFERS" not in out


@pytest.fixture
def tampered(evaluated, tmp_path):
    folder = tmp_path / "tampered"
    shutil.copytree(evaluated, folder)
    return folder


def change_images(folder, change):
    path = folder / assess.ADVERSARIAL
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    change(arrays)
    np.savez_compressed(path, **arrays)


def test_images_that_leave_the_ball_are_not_verified(tampered, capsys):
    change_images(tampered, lambda arrays: arrays["image_adv"].__setitem__((0, 3, 3, 0), 1.5))
    assert run.main(["--mode=verify", str(tampered)]) == 3
    out = capsys.readouterr().out
    assert "NOT VERIFIED" in out and "adversarial.npz: DIFFERS" in out and "1 of 24 outside" in out


def test_claim_that_the_images_do_not_support_is_not_verified(tampered, capsys):
    results = results_of(tampered)
    results["robust_accuracy"]["value"] = 0.99
    (tampered / assess.RESULTS).write_text(json.dumps(results))
    assert run.main(["--mode=verify", str(tampered)]) == 3
    assert "robust accuracy: 99.00 % recorded" in capsys.readouterr().out


def test_other_model_is_not_verified(tampered, tmp_path, capsys):
    other = tmp_path / "other.keras"
    classifier().save(other)
    results = results_of(tampered)
    results["config"]["evaluate"]["model"] = str(other)
    (tampered / assess.RESULTS).write_text(json.dumps(results))
    assert run.main(["--mode=verify", str(tampered)]) == 3
    assert "model: DIFFERS" in capsys.readouterr().out


def test_nothing_to_verify_is_one_line(tmp_path, capsys):
    assert run.main(["--mode=verify", str(tmp_path)]) == 1
    assert "evaluate it first" in capsys.readouterr().err
    assert run.main(["--mode=verify"]) == 2
    assert "name what to verify" in capsys.readouterr().err


def test_published_model_is_verified_by_its_digests(tmp_path, capsys):
    published = tmp_path / "model"
    shutil.copytree(Path(__file__).parents[1] / "saved_models/standard_cifar10_mini", published)
    assert run.main(["--mode=verify", str(published)]) == 0
    assert "outcomes of 1,000 images agree with the card" in capsys.readouterr().out
    (published / "1/assets/labels.txt").write_text("cat\n")
    assert run.main(["--mode=verify", str(published)]) == 3
    assert "1/assets/labels.txt: DIFFERS" in capsys.readouterr().out


def test_masked_model_is_marked_and_strict_exits_with_3(tmp_path, capsys):
    @keras.saving.register_keras_serializable(package="tests")
    class Quantise(keras.layers.Layer):
        def call(self, image):
            return tf.round(image * 3) / 3

    image = keras.Input([8, 8, 1])
    keras.Model(image, keras.layers.Dense(10)(keras.layers.Flatten()(Quantise()(image)))).save(tmp_path / "q.keras")
    arguments = [*QUICK, f"--evaluate_model={tmp_path / 'q.keras'}", f"--run_dir={tmp_path / 'run'}"]
    assert run.main([*arguments, "--strict"]) == 3
    out = capsys.readouterr().out
    assert "NOT TO BE TRUSTED" in out and "S10 failed" in out
    assert not results_of(tmp_path / "run")["trusted"]
    assert "not to be trusted" in (tmp_path / "run" / assess.REPORT).read_text().lower()
    assert run.main(arguments) == 0


@pytest.mark.parametrize(
    "make, arguments, code, message",
    [
        ({"activation": "softmax"}, [], 1, "--evaluate_outputs=probabilities"),
        ({"classes": 7}, [], 1, "7 classes"),
        ({}, ["--evaluate_outputs=probabilities"], 1, "probabilities"),
        ({}, ["--evaluate_epsilon=-1"], 2, "--evaluate_epsilon=-1"),
        ({}, ["--attack_epsilon=0"], 2, "epsilon must be a finite number above 0"),
        (
            {},
            ["--evaluate_suite=strong"],
            2,
            "unknown evaluate suite 'strong'; valid: ablation, adaptive, autoattack, blackbox",
        ),
        ({}, ["--evaluate_card"], 2, "--evaluate_card needs --evaluate_model to name a published folder"),
        ({}, ["--evaluate_surrogates=nowhere.keras", "--evaluate_suite=blackbox"], 1, "nowhere.keras"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(make, arguments, code, message, tmp_path, capsys):
    classifier(**make).save(tmp_path / "m.keras")
    given = [*QUICK, f"--evaluate_model={tmp_path / 'm.keras'}", f"--run_dir={tmp_path / 'run'}", *arguments]
    assert run.main(given) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error
    assert not (tmp_path / "run" / assess.RESULTS).exists()


@pytest.fixture(scope="module")
def smoother(tmp_path_factory):
    """A Keras model from images to images."""
    path = tmp_path_factory.mktemp("preprocessors") / "smooth.keras"
    keras.Sequential([keras.Input([8, 8, 1]), keras.layers.AveragePooling2D(3, 1, "same")]).save(path)
    return path


def test_model_behind_a_preprocessor_is_evaluated_and_verified(foreign, smoother, tmp_path, capsys):
    given = [f"--evaluate_model={foreign}", f"--evaluate_preprocessor={smoother}", f"--run_dir={tmp_path / 'run'}"]
    given += ["--evaluate_oblivious=8", "--evaluate_oblivious_attacks=pgd40"]
    assert run.main([*QUICK, *given]) == 0
    assert "no measure of robustness" in " ".join(capsys.readouterr().out.split())
    results = results_of(tmp_path / "run")
    assert results["model"]["name"] == "smooth+mine" and results["model"]["digest"] != of_file(foreign)
    assert results["config"]["evaluate"]["preprocessor"] == str(smoother)
    assert {each["path"] for each in results["attacks"]} == {"exact", "bpda_identity", "oblivious"}
    with np.load(tmp_path / "run" / ARRAYS.format("oblivious")) as arrays:
        assert len(arrays["index"]) == results["oblivious"]["n"] == 8 and results["oblivious"]["has_purifier"]
        assert results["oblivious"]["attacks"][0]["accuracy"]["value"] == arrays["pgd40"].mean()
    assert run.main(["--mode=verify", str(tmp_path / "run")]) == 0
    assert "scored again: ok" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--mode=all"], "--evaluate_preprocessor goes with --mode=evaluate, not with --mode=all"),
        (["--evaluate_card"], "--evaluate_card is of the model alone; evaluate it without --evaluate_preprocessor"),
        (
            ["--evaluate_oblivious_attacks=pgd"],
            "unknown attack of --evaluate_oblivious_attacks 'pgd'; valid: autoattack",
        ),
    ],
)
def test_flags_of_a_preprocessor_that_do_not_go_together_are_one_line(arguments, message, smoother, tmp_path, capsys):
    given = [*QUICK, f"--evaluate_preprocessor={smoother}", f"--run_dir={tmp_path / 'run'}", *arguments]
    assert run.main(given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error, error


def test_diagnostics_are_refused_before_a_model_that_neither_draws_nor_purifies_is_trained():
    with pytest.raises(UsageError, match="for models that draw at random or purify images; standard does not"):
        assess.check(config.Run(export=config.Export(diagnostics=True)))
    for name in ("cafd", "atop"):
        assess.check(config.Run(defense=config.Defense(name=name, rt=0), export=config.Export(diagnostics=True)))


def test_softmax_model_is_evaluated_when_it_is_converted(tmp_path):
    classifier(activation="softmax").save(tmp_path / "m.keras")
    given = [*QUICK, f"--evaluate_model={tmp_path / 'm.keras'}", f"--run_dir={tmp_path / 'run'}"]
    assert run.main([*given, "--evaluate_outputs=probabilities"]) == 0


def test_stopped_evaluation_says_so_and_goes_on(foreign, tmp_path, capsys):
    given = [*QUICK, f"--evaluate_model={foreign}", f"--run_dir={tmp_path / 'run'}"]
    assert run.main([*given, "--evaluate_minutes=1e-6"]) == 0
    out = capsys.readouterr().out
    assert "Upper bound: the time was up" in out and "at most" in out
    assert (tmp_path / "run" / assess.STATE).is_dir() and not results_of(tmp_path / "run")["complete"]
    other = tmp_path / "other.keras"
    classifier().save(other)
    assert run.main([*QUICK, f"--evaluate_model={other}", f"--run_dir={tmp_path / 'run'}"]) == 1
    assert "holds an evaluation of another model" in capsys.readouterr().err
    assert run.main(given) == 0
    assert results_of(tmp_path / "run")["complete"] and not (tmp_path / "run" / assess.STATE).exists()


def test_figures_of_a_published_model_are_replaced(tmp_path):
    published = tmp_path / "model"
    shutil.copytree(Path(__file__).parents[1] / "saved_models/standard_cifar10_mini", published)
    before = json.loads((published / "card.json").read_text())
    count = 24
    random = np.random.default_rng(0)
    arrays = {
        "index": np.arange(count),
        "label": np.zeros(count, np.int32),
        "clean": np.ones(count, bool),
        "survived": random.uniform(size=[count, 1]) < 0.5,
        "attacks": np.array(["apgd_ce"]),
        "image_adv": np.zeros([count, 2, 2, 1], np.float32),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    robust = evaluation.accuracy_interval(arrays["survived"][:, 0])
    results = {
        "attack_budget": None,
        "clean_accuracy": evaluation.accuracy_interval(arrays["clean"]),
        "robust_accuracy": robust,
        "rounded_accuracy": robust,
        "suite": "autoattack",
        "note": "a note",
        "seed": 0,
        "threat_model": {"norm": "linf", "epsilon": 8 / 255},
        "cascade": True,
        "complete": True,
        "trusted": True,
        "sanity": [{"id": "S1", "status": "pass"}],
        "model": {"digest": before["beside"]["model.keras"]},
        "config": {"data": {"name": "cifar10", "open_set_split": ""}},
        "attacks": [
            {
                "name": "apgd_ce",
                "path": "exact",
                "accuracy": robust["value"],
                "cascaded_accuracy": robust["value"],
                "ci95": robust["ci95"],
                "attacked": count,
            }
        ],
    }
    shutil.copytree(published / "1", published / "2")
    for change, why in (
        ({"complete": False}, "not complete"),
        ({"config": {"data": {"name": "mnist", "open_set_split": ""}}}, "but its card is of"),
        ({"model": {"digest": "0" * 64}}, r"the evaluation is not of .*model\.keras"),
    ):
        with pytest.raises(InputError, match=why):
            export.publish_figures(published, {**results, **change}, tmp_path / "a.npz")
    export.publish_figures(published, results, tmp_path / "a.npz")
    card = json.loads((published / "card.json").read_text())
    assert set(card.pop("beside")) == {name for name in BESIDE if (published / name).is_file()}
    assert card == json.loads((published / "2/card.json").read_text())
    older = json.loads((published / "1/card.json").read_text())
    assert older["figures"] == before["figures"] != card["figures"]
    assert card["figures"]["suite"] == "autoattack" and card["figures"]["sanity"] == {"S1": "pass"}
    assert card["about"][0].startswith("The suite autoattack leaves 41.7 % of 24 test images right")
    replaced = ("about", "figures", "beside")
    assert {name: card[name] for name in card if name not in replaced} == {
        name: before[name] for name in before if name not in replaced
    }
    read = evaluation.read_outcomes(published)
    np.testing.assert_array_equal(read.robust, arrays["survived"][:, 0])
    with np.load(published / "outcomes.npz") as file:
        assert "image_adv" not in file.files


def test_images_are_found_by_their_numbers():
    split = data.load(config.Data()).test
    every = np.concatenate([batch["image"] for batch in split.batches(100).as_numpy_iterator()])
    numbers = np.concatenate([batch["index"] for batch in split.batches(100).as_numpy_iterator()])
    np.testing.assert_array_equal(assess.images_of(split, numbers[[5, 2, 300]]), every[[5, 2, 300]])
    with pytest.raises(InputError, match="has no test image"):
        assess.images_of(split, np.array([10**6]))
