"""The whole pipeline on this machine: a robust model is pushed, a fragile one and broken examples are not."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits

from kerasdefense import boundary, config, data, integrity
from pipelines import lineage, local_runner
from pipelines.components.report import GATE
from pipelines.evaluate import SHARDS
from pipelines.examples import write_examples

ROOT = Path(__file__).resolve().parents[2]
ROBUST, FRAGILE = "configs/digits/pgd_at.cfg", "configs/digits/standard.cfg"
SUITE = "--evaluate_suite=quick"


def command(config_file, root, *given):
    arguments = [sys.executable, "-m", "pipelines.local_runner", f"--flagfile={config_file}", f"--root={root}", *given]
    started = time.monotonic()
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    print(f"{config_file} {' '.join(given)}: {time.monotonic() - started:.0f} s, exit code {done.returncode}")
    return done


def versions(root):
    folder = root / "pushed/digits"
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def reports(root):
    """Return gate.json of every report there is, the oldest first."""
    found = root.glob(f"artifacts/RobustnessEvaluator/report/*/{GATE}")
    return [json.loads(path.read_text()) for path in sorted(found, key=lambda path: int(path.parent.name))]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("pipeline") / "digits"


@pytest.fixture(scope="module")
def robust(root):
    """The first run, of a model that holds up."""
    done = command(ROBUST, root, SUITE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.pipeline
def test_robust_model_is_pushed_with_all_that_serves_and_explains_it(robust, root):
    (version,) = versions(root)
    assert (
        f"pushed: {root}/pushed/digits/{version}" in robust.stdout and "blessed: every condition holds" in robust.stdout
    )
    folder = root / "pushed/digits" / version
    beside = {path.name for path in folder.parent.iterdir()}
    assert {"models.config", "batching.config", "docker-compose.yml", "MODEL_CARD.md", "card.json"} <= beside
    assert {"saved_model.pb", "card.json", "variables", "assets"} <= {path.name for path in folder.iterdir()}
    card = json.loads((folder / "card.json").read_text())
    assert card["defense"]["name"] == "pgd_at" and card["data"]["name"] == "digits"
    assert card["figures"]["robust_accuracy"]["n"] == 359 and card["figures"]["suite"] == "quick"
    integrity.check(folder)
    digits = load_digits()
    images = tf.constant((digits.images[:64, ..., None] / 16).astype(np.float32))
    label = tf.saved_model.load(str(folder)).signatures["serving_default"](image=images)["label"].numpy()
    assert (label == digits.target[:64]).mean() > 0.9


@pytest.mark.pipeline
def test_report_holds_results_page_shards_and_conditions(robust, root):
    (folder,) = root.glob("artifacts/RobustnessEvaluator/report/*")
    assert {"results.json", "report.html", "adversarial.npz", GATE, SHARDS} <= {path.name for path in folder.iterdir()}
    results = json.loads((folder / "results.json").read_text())
    assert results["clean_accuracy"]["n"] == 359 and len(list((folder / SHARDS).glob("block-*.npz"))) == 2
    (told,) = reports(root)
    assert told["blessed"] and all(condition["holds"] for condition in told["conditions"])


@pytest.mark.pipeline
def test_fragile_model_is_blocked_and_what_was_pushed_stays(robust, root):
    before = {path: path.stat().st_mtime_ns for path in (root / "pushed").rglob("*")}
    done = command(FRAGILE, root, SUITE, "--train_epochs=5")
    assert done.returncode == local_runner.NOT_BLESSED, done.stdout + done.stderr
    assert "not blessed, nothing is pushed" in done.stdout and "FAILS" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in (root / "pushed").rglob("*")} == before
    failed = [condition["asks"] for condition in reports(root)[-1]["conditions"] if not condition["holds"]]
    assert failed == [
        "lower 95 % bound of robust accuracy is at least 50.0 %",
        "no significant loss of robust accuracy against the last blessed model",
    ]


@pytest.mark.pipeline
def test_run_with_nothing_changed_does_nothing_again(robust, root):
    before = versions(root)
    done = command(ROBUST, root, SUITE)
    assert done.returncode == 0 and versions(root) == before
    assert f"pushed: {root}/pushed/digits/{before[-1]}" in done.stdout
    told = command(ROBUST, root, "--lineage").stdout
    last = told[told.rindex("run 20") :]
    for step in ("ImportExampleGen", "StatisticsGen", "Trainer", "Evaluator", "RobustnessEvaluator"):
        assert re.search(rf"\b{step}\b[^\n]*cached", last), told
    assert re.search(r"PushedModel \(.*pushed 1", last) and re.search(r"RobustnessReport \(verdict blessed", last)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Examples of digits, one of which is no image."""
    folder = tmp_path_factory.mktemp("broken") / "examples"
    write_examples(data.load(config.Data(name="digits", augment="none")), folder)
    (file,) = (folder / "train").iterdir()
    records = [tf.train.Example.FromString(each.numpy()) for each in tf.data.TFRecordDataset(str(file), "GZIP")]
    records[7].features.feature["image"].bytes_list.value[0] = b"no image"
    with tf.io.TFRecordWriter(str(file), "GZIP") as writer:
        for record in records:
            writer.write(record.SerializeToString())
    return folder


@pytest.mark.pipeline
def test_broken_examples_stop_the_run_before_training(broken, tmp_path):
    done = command(ROBUST, tmp_path, f"--examples={broken}")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "image" in done.stderr and "anomalies.txt" in done.stderr and "Trainer ..." not in done.stdout
    assert versions(tmp_path) == [] and not (tmp_path / "artifacts/Trainer").exists()


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """Folders that are wrong in one way each, with a version that was pushed before in all."""
    root = tmp_path_factory.mktemp("strange")
    for name in ("pushed", "empty", "none", "later", "few"):
        version = root / name / "pushed/digits/1"
        version.mkdir(parents=True)
        (version / "saved_model.pb").write_bytes(b"of before")
    for split in ("train", "eval"):
        (root / "empty/examples" / split).mkdir(parents=True)
        (root / "few/examples" / split).mkdir(parents=True)
        with tf.io.TFRecordWriter(str(root / f"few/examples/{split}/a.tfrecord")) as writer:
            writer.write(tf.train.Example().SerializeToString())
    for name in ("empty", "few"):
        (root / name / "examples/labels.txt").write_text("0\n1\n")
    (root / "none" / local_runner.METADATA).write_bytes(b"SQLite format 4" + bytes(4096))
    lineage.open_store(root / "later" / local_runner.METADATA, new=True)
    with contextlib.closing(sqlite3.connect(root / "later" / local_runner.METADATA)) as later, later:
        later.execute("UPDATE MLMDEnv SET schema_version = 99")
    return root


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("pushed", ["--flagfile=configs/digits/nothing.cfg"], "cannot read flag file"),
        ("pushed", ["--gate_robust_accuracy=0.95"], "is above --gate_clean_accuracy=0.9"),
        ("pushed", ["--gate_robust_accuracy=0"], "a pipeline needs --gate_robust_accuracy"),
        ("pushed", ["--gate_robust=0.5"], "unknown flag --gate_robust"),
        ("pushed", ["--evaluate_preprocessor=jpeg"], "a pipeline measures the model that it pushes"),
        ("pushed", ["--gate_auroc=0.5"], "--gate_auroc needs unknown images"),
        ("pushed", ["--lineage"], "there was no run of this pipeline yet"),
        ("empty", ["--examples=ROOT/examples"], "has no files; the split"),
        ("few", ["--examples=ROOT/examples"], "holds no example with a readable image"),
        ("none", [], "is no metadata store that this version of ML Metadata reads (Error"),
        ("later", [], "is no metadata store that this version of ML Metadata reads (MLMD"),
    ],
)
def test_bad_input_is_one_line_and_leaves_what_was_pushed(name, given, words, strange, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(local_runner, "be_quiet", lambda: None)
    root = strange / name
    before = {path: path.stat().st_mtime_ns for path in (root / "pushed").rglob("*")}
    arguments = [f"--flagfile={ROBUST}", f"--root={root}", *(each.replace("ROOT", str(root)) for each in given)]
    assert boundary.guarded(lambda: local_runner.main(arguments)) in (1, 2)
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and words in errors
    assert before and {path: path.stat().st_mtime_ns for path in (root / "pushed").rglob("*")} == before
