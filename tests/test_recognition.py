"""Open-set recognition from the command line: measure, keep, export; and one clear line for whatever is wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from kerasdefense import assess, config, data, evaluation, flags, recognition, run, training
from kerasdefense.detectors import DETECTORS
from kerasdefense.evaluation.open_set import metrics
from kerasdefense.export.saved_model import CARD

ROOT = Path(__file__).parents[1]
TINY = [
    "--backbone_name=small_cnn",
    "--backbone_width=8",
    "--data_open_set_split=6:0",
    "--attack_epsilon=0.1",
    "--train_epochs=4",
    "--train_optimizer=adam",
    "--train_learning_rate=0.01",
    "--train_strategy=none",
    "--evaluate_suite=quick",
    "--evaluate_examples=32",
    "--evaluate_sanity_examples=0",
    "--evaluate_score_examples=16",
    "--evaluate_score_steps=3",
    "--noprogress",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    np.savez(folder / "noise.npz", images=np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8))
    more = ["--detector_name=max_logit,knn", "--evaluate_open_set", f"--evaluate_ood=far:{folder / 'noise.npz'}"]
    assert run.main([*TINY, *more, "--detector_retention=0.9", f"--run_dir={folder / 'tiny'}"]) == 0
    return folder / "tiny"


def results_of(run_dir):
    return json.loads((run_dir / assess.RESULTS).read_text())


def test_run_measures_every_detector_on_every_set(finished):
    found = results_of(finished)["open_set"]
    assert set(found["detectors"]) == {"max_logit", "knn"}
    assert {name: each["group"] for name, each in found["sets"].items()} == {"unknown classes": "", "noise": "far"}
    assert found["sets"]["noise"]["n"] == 40 and found["attack"]["set"] == "unknown classes"
    assert (found["attack"]["known"], found["attack"]["unknown"], found["attack"]["candidates"]) == (16, 16, 16)
    for name, entry in found["detectors"].items():
        assert entry["reject"] and entry["grid"] and entry["means"]["far"]["auroc"] == entry["sets"]["noise"]["auroc"]
        with np.load(finished / recognition.SCORES) as stored:
            assert np.mean(stored[f"{name}/validation"] <= entry["threshold"]) >= 0.9
    for name in ("scores", "roc"):
        assert (finished / recognition.PICTURES.format(name)).stat().st_size > 10_000
    assert not (finished / assess.STATE).exists()


def test_export_holds_the_first_detector_and_judges_as_python_did(finished):
    results = results_of(finished)["open_set"]["detectors"]["max_logit"]
    version = finished / "saved_model/1"
    card = json.loads((version / CARD).read_text())
    assert card["rejection"]["detector"] == "max_logit"
    assert card["rejection"]["threshold"] == results["threshold"] and card["rejection"]["retention"] == 0.9
    assert card["figures"]["open_set"]["detectors"]["max_logit"] == results
    serve = tf.saved_model.load(str(version)).signatures["serving_default"]
    splits = data.load(config.Data(open_set_split="6:0"))
    with np.load(finished / recognition.SCORES) as stored:
        for split, key in ((splits.test, "known"), (splits.unknown, "sets/unknown classes")):
            (batch,) = split.batches(1000)
            outputs = serve(image=batch["image"])
            np.testing.assert_allclose(outputs["anomaly_score"], stored[f"max_logit/{key}"], rtol=1e-4, atol=1e-5)
            near = np.abs(stored[f"max_logit/{key}"] - results["threshold"]) < 1e-4
            same = outputs["accepted"].numpy() == (stored[f"max_logit/{key}"] <= results["threshold"])
            assert (same | near).all()


def test_another_detector_is_exported_on_demand(finished):
    assert run.main(["--mode=export", f"--run_dir={finished}", "--export_detector=knn"]) == 0
    card = json.loads((finished / "saved_model/2" / CARD).read_text())
    assert card["rejection"]["detector"] == "knn" and card["rejection"]["settings"]["k"] == 50


def test_trials_sum_up_runs_of_several_seeds(finished, tmp_path, capsys):
    other = shutil.copytree(finished, tmp_path / "other")
    results = results_of(other)
    results["config"]["train"]["seed"] = 1
    (other / assess.RESULTS).write_text(json.dumps(results))
    assert run.main(["--mode=trials", f"--run_dir={tmp_path / 'sum'}", str(finished), str(other)]) == 0
    auroc = results["open_set"]["detectors"]["knn"]["sets"]["unknown classes"]["auroc"]
    assert f"{100 * auroc:.1f} ± 0.0" in capsys.readouterr().out
    assert "knn" in (tmp_path / "sum/trials.md").read_text() and "knn" in (tmp_path / "sum/trials.csv").read_text()
    assert run.main(["--mode=trials", f"--run_dir={tmp_path / 'sum'}", str(finished)]) == 2


DFA = "subspace,max_cosine,msp,energy"


@pytest.fixture(scope="module")
def with_frozen_axes(tmp_path_factory):
    """DFA on all digits before its first step, measured on a folder of images, with `max_cosine` as reject option."""
    folder, random = tmp_path_factory.mktemp("dfa"), np.random.default_rng(0)
    for number in range(30):
        path = folder / f"LSUN_resize/LSUN_resize/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tf.io.encode_png(random.integers(256, size=(8, 8, 3), dtype=np.uint8)).numpy())
    arguments = [
        *TINY,
        "--backbone_width=4",
        "--backbone_head=orthogonal",
        "--defense_name=dfa",
        "--data_open_set_split=",
        "--evaluate_examples=8",
        "--evaluate_score_examples=0",
        f"--detector_name={DFA}",
        "--export_detector=max_cosine",
        f"--evaluate_ood=far:{folder / 'LSUN_resize'}",
        f"--run_dir={folder / 'run'}",
    ]
    settings = flags.parse(arguments)
    (folder / "run").mkdir()
    training.build(settings, data.load(settings.data)).save(folder / "run" / training.MODEL)
    assert run.main([*arguments, "--mode=evaluate"]) == run.main([*arguments, "--mode=export"]) == 0
    return folder / "run"


def test_detectors_of_a_model_with_frozen_axes_are_measured_on_a_folder(with_frozen_axes):
    found = results_of(with_frozen_axes)["open_set"]
    assert found["sets"] == {"LSUN_resize": {"group": "far", "n": 30}}
    with np.load(with_frozen_axes / recognition.SCORES) as stored:
        scores = {name: stored[f"{name}/known"] for name in DFA.split(",")}
        others = {name: stored[f"{name}/sets/LSUN_resize"] for name in scores}
    for name, entry in found["detectors"].items():
        expected = metrics.f1_binary(scores[name], others[name], entry["threshold"])
        assert entry["sets"]["LSUN_resize"]["f1_binary"] == pytest.approx(expected)
    (batch,) = data.load(config.Data()).test.batches(1000)
    model = evaluation.load_model(with_frozen_axes / "model.keras")
    logits = model.activations(batch["image"])["logits"].numpy()
    np.testing.assert_allclose(scores["max_cosine"], 1 - logits.max(axis=1), atol=1e-5)
    version = with_frozen_axes / "saved_model/1"
    assert json.loads((version / CARD).read_text())["rejection"]["detector"] == "max_cosine"
    served = tf.saved_model.load(str(version)).signatures["serving_default"](image=batch["image"])
    np.testing.assert_allclose(served["anomaly_score"], scores["max_cosine"], atol=1e-5)
    np.testing.assert_allclose(served["logits"], logits, atol=1e-5)


def test_detector_that_does_not_go_with_frozen_axes_is_one_line(with_frozen_axes, tmp_path, capsys):
    arguments = ["--mode=evaluate", f"--evaluate_model={with_frozen_axes}", "--detector_name=react"]
    assert run.main([*TINY, "--data_open_set_split=", *arguments, f"--run_dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: ReAct needs logits = embedding @ kernel + bias, but those of this model are cosines"
    )
    assert error.count("\n") == 1


def test_names_of_detectors():
    def names(**settings):
        asked = config.Evaluate(open_set=settings.pop("open_set", False))
        return recognition.names_of(config.Run(detector=config.Detector(**settings), evaluate=asked))

    assert names() == () and names(name="knn,msp") == ("knn", "msp")
    assert names(name="all") == tuple(DETECTORS)
    assert names(open_set=True) == ("max_logit", "mahalanobis", "openmax")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--detector_name=knn,knm"], "unknown detector 'knm'; valid: energy, "),
        (["--detector_name=knn,knn"], "names a detector twice"),
        (["--evaluate_open_set", "--data_open_set_split="], "--evaluate_open_set needs unknown classes"),
        (["--evaluate_ood=nowhere/images.npz"], "no such file or folder"),
        (["--evaluate_ood=digits"], "the known set itself"),
        (["--detector_name=knn", "--detector_retention=1"], "retention must be above 0 and below 1"),
        (["--export_detector=knm"], "unknown export detector 'knm'"),
        (["--mode=all", "--evaluate_model=", "--detector_name=msp", "--export_detector=knn"], "not among those of"),
        (["--detector_name=knn", "--detector_fit_examples=20"], "k of knn must be at most the 20 training images"),
    ],
)
def test_bad_input_ends_in_one_line(finished, arguments, words, capsys, tmp_path):
    model = ["--mode=evaluate", f"--evaluate_model={finished / 'model.keras'}", f"--run_dir={tmp_path}"]
    assert run.main([*TINY, *model, *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1


def test_export_of_a_detector_that_was_not_fitted_says_what_to_do(finished, capsys):
    assert run.main(["--mode=export", f"--run_dir={finished}", "--export_detector=vim"]) == 1
    assert "evaluate with --detector_name=vim first" in capsys.readouterr().err


@pytest.mark.slow
def test_exported_model_accepts_fewer_unknown_digits(tmp_path):
    """The configuration that README shows: verdicts are those of Python, and fewer unknown ones pass, p < 0.01."""
    flagfile = f"--flagfile={ROOT / 'configs/digits/open_set.cfg'}"
    assert run.main([flagfile, f"--run_dir={tmp_path}", "--noprogress"]) == 0
    serve = tf.saved_model.load(str(tmp_path / "saved_model/1")).signatures["serving_default"]
    splits = data.load(flags.parse([flagfile]).data)
    threshold = results_of(tmp_path)["open_set"]["detectors"]["max_logit"]["threshold"]
    accepted = []
    for split, key in ((splits.test, "known"), (splits.unknown, "sets/unknown classes")):
        batch = next(iter(split.batches(200)))
        accepted.append(serve(image=batch["image"])["accepted"].numpy())
        with np.load(tmp_path / recognition.SCORES) as stored:
            score = stored[f"max_logit/{key}"][:200]
        np.testing.assert_array_equal(accepted[-1], score <= threshold)

    def difference(known, unknown, axis):
        return np.mean(known, axis=axis) - np.mean(unknown, axis=axis)

    found = stats.bootstrap(accepted, difference, confidence_level=0.99, random_state=0, method="percentile")
    assert found.confidence_interval.low > 0
