"""Beam evaluation: the outcomes of one process, whoever attacks, in what order and how often."""

from __future__ import annotations

import atexit
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import keras
import numpy as np
import psutil
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits

from kerasdefense import assess, config, data, evaluation
from kerasdefense.attacks import PGD
from kerasdefense.boundary import guarded
from kerasdefense.evaluation import PlannedAttack, recorded
from kerasdefense.evaluation.suites import SUITES, Suite
from kerasdefense.types import InputError, UsageError
from pipelines import blocks, jobs
from pipelines.evaluate import SHARDS, Workers, check_keyed, evaluate, main
from pipelines.examples import write_examples
from pipelines.shards import Shards

ROOT = Path(__file__).resolve().parents[2]
COUNT, EPSILON = 80, 0.05
FLAGS = (f"--evaluate_epsilon={EPSILON}", f"--evaluate_examples={COUNT}", "--evaluate_chunk_size=16")

REMOTE = ("--runner=DataflowRunner",)
URLS = ("--model=gs://b/m", "--examples=gs://b/e", "--shards=gs://b/s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the digits as examples, and with a small classifier that is right on most of them."""
    root = tmp_path_factory.mktemp("beam")
    splits = data.load(config.Data(name="digits", augment="none"))
    write_examples(splits, root / "examples", shards=3)
    batches = load_digits()
    image, label = (batches.images[..., None] / 16).astype(np.float32), batches.target
    layers = [keras.layers.Input([8, 8, 1]), keras.layers.Conv2D(4, 3, activation="relu", padding="same")]
    layers += [keras.layers.GlobalMaxPooling2D(), keras.layers.Dense(10)]
    keras.utils.set_random_seed(0)
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.Adam(0.02), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(image, label, batch_size=100, epochs=12, verbose=0)
    model.save(root / "model.keras")
    return root


def settings(folder, run_dir, **wanted):
    chosen = {
        "suite": "standard",
        "epsilon": EPSILON,
        "examples": COUNT,
        "chunk_size": 16,
        "sanity_examples": 0,
        **wanted,
    }
    return config.Run(
        mode="evaluate",
        run_dir=str(run_dir),
        progress=False,
        data=config.Data(name="examples", dir=str(folder / "examples")),
        evaluate=config.Evaluate(model=str(folder / "model.keras"), **chosen),
    )


def in_beam(folder, run_dir, pipeline_of=None, **wanted):
    run = settings(folder, run_dir, **wanted)
    splits, model = data.load(run.data), evaluation.load_model(Path(run.evaluate.model))
    workers = Workers(pipeline_of or (lambda: jobs.make_pipeline([])), 0, str(run_dir / SHARDS))
    return evaluate(run, splits, model, [f"{folder}/examples/eval/*"], workers)


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """What one process finds, by a data set that was never written as examples."""
    run = settings(folder, tmp_path_factory.mktemp("alone"))
    run = dataclasses.replace(run, data=config.Data(name="digits", augment="none"))
    assess.assess(run, data.load(run.data), evaluation.load_model(folder / "model.keras"))
    return recorded.read_outcomes(Path(run.run_dir))


def all_rows(folder):
    files = sorted(str(path) for path in (folder / "examples/eval").iterdir())
    return [blocks.parsed(record.numpy()) for record in tf.data.TFRecordDataset(files, "GZIP")]


def assert_same(found, expected):
    assert expected.clean.any() and not expected.robust.all() and expected.robust.any()
    for name in ("index", "label", "clean", "robust"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    assert set(found.survived) == set(expected.survived)
    for name in expected.survived:
        np.testing.assert_array_equal(found.survived[name], expected.survived[name], err_msg=name)


@pytest.fixture(scope="module")
def spread(folder, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("spread")
    return run_dir, in_beam(folder, run_dir)


def test_beam_finds_of_every_example_what_one_process_finds(spread, alone):
    run_dir, found = spread
    assert found.work["blocks"] == found.work["attacked"] == COUNT // 16
    assert_same(recorded.read_outcomes(run_dir), alone)


class Kept(Exception):  # noqa: N818 - nothing went wrong
    """What was wanted is there."""


def test_bundle_that_is_processed_twice_changes_no_outcome_and_no_count(folder, spread, tmp_path, monkeypatch):
    run_dir, found = spread
    shards = Shards(str(run_dir / SHARDS))
    before = {number: shards.read(number) for number in range(found.work["blocks"])}
    tasks = []

    def keep(task, *_, **__):
        tasks.append(task)
        raise Kept

    with monkeypatch.context() as patch, pytest.raises(Kept):
        patch.setattr("pipelines.evaluate.attack_blocks", keep)
        in_beam(folder, tmp_path)
    worker = blocks.AttackBlocks(dataclasses.replace(tasks[0], shards=shards.folder))
    worker.setup()
    counts = recorded.read_outcomes(run_dir)
    (run_dir / SHARDS / "block-00002.npz").unlink()
    rows = [row for row in all_rows(folder) if 32 <= row.index < 48]
    assert [number for _ in range(3) for number in worker.process((2, reversed(rows)))] == [2, 2, 2]
    for number, arrays in before.items():
        for name in set(arrays) - {"seconds", "began", "ended"}:
            np.testing.assert_array_equal(shards.read(number)[name], arrays[name], err_msg=name)
    assert in_beam(folder, run_dir).work["attacked"] == 0
    assert_same(recorded.read_outcomes(run_dir), counts)


def test_second_run_attacks_only_blocks_that_have_no_shard(folder, spread, alone, tmp_path):
    run_dir, found = spread
    shards = Shards(str(tmp_path / SHARDS))
    copied = Shards(str(run_dir / SHARDS))
    shards.open(json.loads((run_dir / SHARDS / "settings.json").read_text()))
    for number in (0, 3, 4):
        shards.write(number, copied.read(number))
    rest = in_beam(folder, tmp_path)
    assert (rest.work["attacked"], rest.work["blocks"]) == (2, found.work["blocks"])
    assert_same(recorded.read_outcomes(tmp_path), alone)
    assert in_beam(folder, tmp_path).work["attacked"] == 0


def test_shards_of_another_evaluation_are_refused(folder, spread):
    run_dir, _ = spread
    with pytest.raises(InputError, match="another seed"):
        in_beam(folder, run_dir, seed=1)


def in_beam_without_model(folder, run_dir, missing):
    """Evaluate a model that workers do not find where they are told that it is."""
    run = settings(folder, run_dir)
    splits, model = data.load(run.data), evaluation.load_model(folder / "model.keras")
    run = dataclasses.replace(run, evaluate=dataclasses.replace(run.evaluate, model=str(missing)))
    workers = Workers(lambda: jobs.make_pipeline([]), 0, str(run_dir / SHARDS))
    return evaluate(run, splits, model, [f"{folder}/examples/eval/*"], workers)


def test_what_a_worker_cannot_do_is_told_in_one_line_and_the_next_run_goes_on(folder, spread, alone, tmp_path):
    shards, copied = Shards(str(tmp_path / SHARDS)), Shards(str(spread[0] / SHARDS))
    shards.open(json.loads((spread[0] / SHARDS / "settings.json").read_text()))
    for number in (0, 1, 2, 4):
        shards.write(number, copied.read(number))
    missing = tmp_path / "nothing.keras"
    with pytest.raises(InputError, match=rf"^block 3: {missing}: [^\n]+; the same command goes on from the shards in"):
        in_beam_without_model(folder, tmp_path, missing)
    (noted,) = (tmp_path / SHARDS).glob("error-*.txt")
    assert noted.name == "error-00003.txt" and noted.read_text().count("\n") == 1
    assert in_beam(folder, tmp_path).work["attacked"] == 1
    assert not noted.exists()
    assert_same(recorded.read_outcomes(tmp_path), alone)


def attack_of(error):
    """Return a worker's attack that raises an error."""

    def attack(*_):
        raise error

    return attack


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("a model\nof images"), "a model of images"),
        (ValueError("first line\nand more"), "ValueError: first line"),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
    ],
)
def test_worker_that_failed_notes_it_once_and_passes_over_what_comes_after(error, line, tmp_path):
    worker = blocks.AttackBlocks(types.SimpleNamespace(shards=str(tmp_path)))
    worker._shared = types.SimpleNamespace(acquire=lambda _: types.SimpleNamespace(attack=attack_of(error)))
    worker.setup()
    assert [number for each in (7, 8) for number in worker.process((each, []))] == [7, 8]
    assert Shards(str(tmp_path)).failures() == [(7, line)]


def test_shard_for_which_there_is_no_room_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise tf.errors.ResourceExhaustedError(None, None, "block; No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"could not be written: No space left"):
        patch.setattr(tf.io.gfile, "rename", full)
        Shards(str(tmp_path)).write(0, {"robust": np.array([True])})
    assert not list(tmp_path.iterdir())


def test_copy_of_a_remote_model_is_removed_when_the_process_ends(folder, monkeypatch):
    at_exit = []
    monkeypatch.setattr(atexit, "register", lambda *work, **options: at_exit.append((work, options)))
    path = blocks.local(f"file://{folder}/model.keras")
    assert path.read_bytes() == (folder / "model.keras").read_bytes()
    (((remove, *arguments), options),) = at_exit
    remove(*arguments, **options)
    assert not path.parent.exists()


def test_examples_without_numbers_are_refused(tmp_path):
    with tf.io.TFRecordWriter(str(tmp_path / "a.tfrecord")) as writer:
        writer.write(tf.train.Example().SerializeToString())
    with pytest.raises(InputError, match=r"no feature index, .* python -m pipelines.examples writes it"):
        check_keyed([f"{tmp_path}/*"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--direct_num_wokers=2"], "unknown flag --direct_num_wokers; did you mean --direct_num_workers?"),
        (["--evaluate_sweet=quick"], "unknown flag --evaluate_sweet"),
    ],
)
def test_unknown_flags_are_refused(given, message, folder):
    with pytest.raises(UsageError, match=re.escape(message)):
        main([f"--model={folder}/model.keras", f"--examples={folder}/examples", *given])


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--direct_num_workers=two"], "Beam: argument --direct_num_workers: invalid int value: 'two'"),
        (["--threads=two"], "argument --threads: invalid int value: 'two'"),
        (["--threads=-1"], "--threads=-1 must be at least 0"),
        (["--mod=x"], "unknown flag --mod"),
        (["--output=gs://bucket/out"], "--output=gs://bucket/out must be a folder of this machine; --shards may be"),
        ([*REMOTE], "--model=MODEL is not where workers on other machines find it: name a URL that they can reach"),
        ([*REMOTE, "--model=gs://b/m"], "--examples=EXAMPLES is not where workers"),
        ([*REMOTE, "--model=gs://b/m", "--examples=gs://b/e"], "--shards= is not where workers"),
        ([*REMOTE, *URLS, "--evaluate_surrogates=gs://b/s,t"], "--evaluate_surrogates=t is not where workers"),
        ([*REMOTE, *URLS, "--evaluate_preprocessor=a/b"], "--evaluate_preprocessor=a/b is not where workers"),
    ],
)
def test_wrong_command_is_one_line(given, line, capfd):
    assert guarded(lambda: main(["--model=MODEL", "--examples=EXAMPLES", *given])) == 2
    printed = capfd.readouterr()
    assert printed.err.startswith(f"error: {line}") and printed.err.count("\n") == 1 and not printed.out


def test_missing_flag_and_options_that_do_not_go_together_are_one_line(capfd):
    assert guarded(lambda: main(["--examples=EXAMPLES"])) == 2
    assert capfd.readouterr().err == "error: the following arguments are required: --model\n"
    with pytest.raises(UsageError, match=r"^Beam: .*Missing required option: project"):
        jobs.make_pipeline(["--runner=DataflowRunner"])


def transferred(norm, epsilon, _):
    return (PlannedAttack("transfer", PGD(norm, epsilon, steps=10), transfer=True),)


def test_surrogates_behind_urls_and_shards_elsewhere_find_what_one_process_finds(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(SUITES, "transferred", Suite(transferred, True, (), "of a test"))
    (tmp_path / "other").mkdir()
    shutil.copy(folder / "model.keras", tmp_path / "other/model.keras")
    given = [f"--model=file://{folder}/model.keras", f"--examples=file://{folder}/examples", f"--output={tmp_path}/out"]
    given += [f"--shards=file://{tmp_path}/elsewhere", f"--evaluate_surrogates=file://{tmp_path}/other/model.keras"]
    given += ["--evaluate_suite=transferred", "--evaluate_sanity_examples=0", "--direct_running_mode=in_memory", *FLAGS]
    assert main(given) == 0
    assert len(list((tmp_path / "elsewhere").glob("block-*.npz"))) == COUNT // 16
    run = settings(folder, tmp_path / "alone", suite="transferred", surrogates=f"{tmp_path}/other/model.keras")
    assess.assess(run, data.load(run.data), evaluation.load_model(folder / "model.keras"))
    assert_same(recorded.read_outcomes(tmp_path / "out"), recorded.read_outcomes(tmp_path / "alone"))


def test_local_workers_are_processes_unless_told_otherwise():
    assert jobs.beam_arguments([]) == ["--direct_running_mode=multi_processing", f"--direct_num_workers={jobs.cores()}"]
    assert jobs.beam_arguments(["--direct_num_workers=3"])[-1] == "--direct_running_mode=multi_processing"
    assert jobs.beam_arguments(["--runner=PrismRunner"]) == ["--runner=PrismRunner"]
    assert jobs.beam_arguments(["--direct_running_mode=in_memory"]) == ["--direct_running_mode=in_memory"]


def test_minutes_do_not_go_with_workers(folder, tmp_path):
    with pytest.raises(UsageError, match="--evaluate_minutes does not go with workers"):
        in_beam(folder, tmp_path, minutes=1.0)


@pytest.mark.pipeline
def test_killed_worker_ends_the_run_in_one_line_and_the_same_command_goes_on(folder, tmp_path):
    command = [sys.executable, "-m", "pipelines.evaluate", f"--model={folder}/model.keras", f"--output={tmp_path}"]
    command += [f"--examples={folder}/examples", "--evaluate_suite=quick", "--evaluate_sanity_examples=0", *FLAGS]
    command += ["--direct_num_workers=2", "--evaluate_chunk_size=4"]
    deadline = time.monotonic() + 900
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob("shards/block-*.npz")):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(str(process.communicate()))
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        next(each for each in reversed(children) if any("sdk_worker_main" in part for part in each.cmdline())).kill()
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    (told,) = (line for line in errors.splitlines() if line != "Killed")  # as the shell says that began the worker
    assert "a worker process died" in told and "goes on from the shards" in told
    done = len(list(tmp_path.glob("shards/block-*.npz")))
    assert 0 < done < COUNT // 4
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"{done} of {COUNT // 4} blocks were there already" in finished.stdout
    run = settings(folder, tmp_path / "alone", suite="quick", chunk_size=4)
    assess.assess(run, data.load(run.data), evaluation.load_model(folder / "model.keras"))
    assert_same(recorded.read_outcomes(tmp_path), recorded.read_outcomes(tmp_path / "alone"))
