"""Exact resume: what is interrupted anywhere ends as if it had not been."""

import dataclasses
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

from kerasdefense import config, training
from kerasdefense.training import fitting
from kerasdefense.types import InputError, UsageError


class InterruptionError(Exception):
    """Stands for whatever ends a process."""


class InterruptAt(keras.callbacks.Callback):
    """Raise at one step, counted from the start of the process."""

    def __init__(self, step):
        super().__init__()
        self.left = step

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            raise InterruptionError


def variables(defense):
    held = [defense.step, *defense.backbone.weights]
    return [
        each.numpy() for each in [*held, *(one for optimizer, _ in defense.optimizers() for one in optimizer.variables)]
    ]


def assert_same(one, two):
    assert len(one) == len(two) > 10
    for first, second in zip(one, two):
        np.testing.assert_array_equal(first, second)


@pytest.fixture(scope="module")
def run(small_run):
    return small_run(epochs=4, steps_per_epoch=8, awp_gamma=0.01, ema_decay=0.9, learning_rate=0.2)


@pytest.fixture(scope="module")
def uninterrupted(run, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, variables(training.train(run, digits, folder).defense)


def interrupt(monkeypatch, run, digits, folder, step):
    with monkeypatch.context() as context:
        context.setattr(fitting, "_displays", lambda *given: [InterruptAt(step)])
        with pytest.raises(InterruptionError):
            training.train(run, digits, folder)


def test_resume_after_interruptions_is_bit_identical(run, digits, uninterrupted, tmp_path, monkeypatch, capsys):
    steps = random.Random(5).sample(range(2, 14), 2)  # within the epochs that each process begins with
    for step in steps:
        interrupt(monkeypatch, run, digits, tmp_path, step)
    resumed = training.train(run, digits, tmp_path)
    assert "going on after epoch" in capsys.readouterr().err
    assert_same(variables(resumed.defense), uninterrupted[1])
    folder, _ = uninterrupted
    assert (tmp_path / training.HISTORY).read_text() == (folder / training.HISTORY).read_text()


def broken_copy(uninterrupted, tmp_path, breaking):
    """Return a run directory whose end is not written yet and whose newest checkpoint is broken."""
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    (tmp_path / "run" / training.HISTORY).unlink()
    newest = tmp_path / "run/checkpoints/epochs/epoch-4"
    breaking(newest)
    return tmp_path / "run"


def truncate(newest):
    data = newest.with_name("epoch-4.data-00000-of-00001")
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])


def flip_a_byte(newest):
    data = newest.with_name("epoch-4.data-00000-of-00001")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 0xFF
    data.write_bytes(bytes(content))


def empty_the_index(newest):
    newest.with_name("epoch-4.index").write_bytes(b"")


@pytest.mark.parametrize("breaking", [truncate, flip_a_byte, empty_the_index])
def test_broken_checkpoint_falls_back_to_the_one_before(
    breaking, run, digits, uninterrupted, tmp_path, capsys, monkeypatch
):
    folder = broken_copy(uninterrupted, tmp_path, breaking)
    trained = []
    monkeypatch.setattr(fitting, "_fit", lambda run, splits, defense, first_epoch, *rest: trained.append(first_epoch))
    training.train(run, digits, folder)
    said = capsys.readouterr().err
    assert trained == [3] and "epoch-4 cannot be read" in said and "going back to the one before" in said


def test_training_from_the_checkpoint_before_ends_alike(run, digits, uninterrupted, tmp_path):
    resumed = training.train(run, digits, broken_copy(uninterrupted, tmp_path, truncate))
    assert_same(variables(resumed.defense), uninterrupted[1])


def test_no_readable_checkpoint_is_an_error_that_touches_nothing(run, digits, uninterrupted, tmp_path):
    folder = broken_copy(uninterrupted, tmp_path, truncate)
    for index in (folder / "checkpoints/epochs").glob("*.index"):
        index.write_bytes(b"")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"no checkpoint in .* can be read; --train_resume=never begins anew"):
        training.train(run, digits, folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_other_settings_are_named_and_refused(run, small_run, digits, uninterrupted):
    folder, _ = uninterrupted
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = dataclasses.replace(run, train=dataclasses.replace(run.train, learning_rate=0.1))
    with pytest.raises(UsageError, match=r"--train_learning_rate 0\.2 there, 0.1 now.*--train_resume=always"):
        training.train(other, digits, folder)
    set_of_that_name = dataclasses.replace(run, data=dataclasses.replace(run.data, name="mnist"))
    with pytest.raises(UsageError, match="--data_name digits there, mnist now"):
        training.train(set_of_that_name, digits, folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def with_always(run, **train):
    return dataclasses.replace(run, train=dataclasses.replace(run.train, resume="always", **train))


def test_always_goes_on_with_other_settings(run, digits, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    other = with_always(run, epochs=5, learning_rate=1e-9)
    trained = training.train(other, digits, tmp_path / "run")
    assert [epoch["epoch"] for epoch in trained.selection.history] == [1, 2, 3, 4, 5]
    assert trained.selection.best_epoch == 5  # what was best under other settings does not count


def test_always_takes_another_constant_learning_rate(small_run, digits, tmp_path):
    first = small_run(epochs=1, steps_per_epoch=2, schedule="constant", learning_rate=0.1)
    training.train(first, digits, tmp_path)
    trained = training.train(with_always(first, epochs=2, learning_rate=1e-3), digits, tmp_path)
    ((optimizer, _),) = trained.defense.optimizers()
    assert float(optimizer.learning_rate) == pytest.approx(1e-3)


def test_always_without_an_epoch_left_changes_nothing(run, digits, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="leaves nothing to train after epoch 4"):
        training.train(with_always(run, learning_rate=0.1), digits, tmp_path / "run")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_always_with_another_model_says_that_it_does_not_fit(run, digits, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    wider = dataclasses.replace(with_always(run, epochs=5), backbone=config.Backbone(name="small_cnn", width=8))
    with pytest.raises(UsageError, match="does not fit a model of these settings"):
        training.train(wider, digits, tmp_path / "run")


@pytest.mark.parametrize("name", [training.HISTORY, training.MODEL])
def test_damaged_end_is_written_again_from_the_checkpoints(name, run, digits, uninterrupted, tmp_path, capsys):
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    file = tmp_path / "run" / name
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    trained = training.train(run, digits, tmp_path / "run")
    assert "is not complete" in capsys.readouterr().err
    assert_same(variables(trained.defense), uninterrupted[1])
    assert (tmp_path / "run" / training.HISTORY).read_text() == (uninterrupted[0] / training.HISTORY).read_text()


def test_dropout_of_an_own_model_is_resumed_too(run, digits, tmp_path, monkeypatch):
    image = keras.Input((8, 8, 1))
    hidden = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(8, 3, activation="relu")(image))
    keras.Model(image, keras.layers.Dense(10)(keras.layers.Dropout(0.5)(hidden))).save(tmp_path / "own.keras")
    own = dataclasses.replace(
        run,
        backbone=config.Backbone(path=str(tmp_path / "own.keras")),
        defense=config.Defense(name="standard"),
        train=dataclasses.replace(run.train, epochs=2),
    )
    whole = training.train(own, digits, tmp_path / "whole").defense
    interrupt(monkeypatch, own, digits, tmp_path / "killed", 12)
    assert_same(variables(training.train(own, digits, tmp_path / "killed").defense), variables(whole))


def test_three_checkpoints_are_kept(uninterrupted):
    folder = uninterrupted[0] / "checkpoints/epochs"
    assert {path.stem for path in folder.glob("*.index")} == {"epoch-2", "epoch-3", "epoch-4"}


def test_full_disk_ends_in_one_error_and_keeps_what_was_there(run, digits, tmp_path, monkeypatch):
    interrupt(monkeypatch, run, digits, tmp_path, 10)  # in the second epoch
    folder = tmp_path / "checkpoints"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(fitting, "_displays", lambda *given: [])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="could not be written"):
            training.train(run, digits, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_kill_9_at_three_random_points_is_bit_identical(tmp_path):
    arguments = [
        "--backbone_name=small_cnn", "--backbone_width=4", "--attack_epsilon=0.1", "--attack_steps=2",
        "--defense_name=pgd_at", "--defense_awp_gamma=0.01", "--train_ema_decay=0.9", "--train_epochs=12",
        "--train_steps_per_epoch=60", "--train_validation_steps=2", "--train_optimizer=adam", "--mode=train",
        "--noprogress",
    ]  # fmt: skip

    def start(folder):
        command = [sys.executable, "-m", "kerasdefense.run", *arguments, f"--run_dir={folder}"]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    finish(start(tmp_path / "whole"))
    draw = random.Random(time.time_ns())
    for _ in range(3):
        reached = newest(tmp_path / "killed")
        process = start(tmp_path / "killed")
        while newest(tmp_path / "killed") == reached and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 2))
        process.kill()
        process.communicate()
        print("killed after epoch", newest(tmp_path / "killed"), "had been written")
    finish(start(tmp_path / "killed"))
    assert_same(*(variables(keras.models.load_model(tmp_path / name / training.MODEL)) for name in ("whole", "killed")))


def finish(process):
    said = process.communicate()[1]
    assert process.returncode == 0, said


def newest(folder):
    return max((int(path.stem.removeprefix("epoch-")) for path in folder.rglob("epoch-*.index")), default=0)
