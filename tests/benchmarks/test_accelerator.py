from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest
import tensorflow as tf

from benchmarks import accelerator
from benchmarks import accelerator_parts as parts
from benchmarks.accelerator import Share
from benchmarks.accelerator_parts import FAIL, PASS, SKIPPED, Check
from kerasdefense import config, data


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """A tiny network on digits of their own size, so that tracing is what takes time."""
    folder = tmp_path_factory.mktemp("accelerator")
    subject = parts.make_subject(folder, devices=2, accelerated=False)
    source = dataclasses.replace(subject.run.data, image_size=0)
    run = dataclasses.replace(
        subject.run, data=source, backbone=config.Backbone("small_cnn", width=4), attack=config.Attack(steps=1)
    )
    return subject._replace(
        run=dataclasses.replace(run, train=dataclasses.replace(run.train, strategy="none")), splits=data.load(source)
    )


@pytest.fixture
def scripted(monkeypatch, subject):
    """Have parts that say what they are told to, instead of those that train."""

    def script(**checks):
        def part(outcome):
            def run(subject, seconds):
                if isinstance(outcome, Exception):
                    raise outcome
                return outcome

            return Share(run, 1)

        monkeypatch.setattr(accelerator, "PARTS", {name: part(outcome) for name, outcome in checks.items()})
        monkeypatch.setattr(accelerator, "check_devices", lambda: Check(SKIPPED, "no accelerator"))
        monkeypatch.setattr(parts, "make_subject", lambda folder, **kwargs: subject)

    return script


def test_report_is_one_fenced_block_with_a_line_per_check(scripted, capsys):
    scripted(float32=Check(PASS, "loss 2.3 -> 1.1"), export=Check(PASS, "1e-7"))
    assert accelerator.main(["--minutes=0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[-1]) == ("```text", "```")
    assert lines[-2].startswith("2 passed, 0 failed, 1 skipped in ")
    assert "skipped  devices  no accelerator" in lines
    assert "PASS     float32  loss 2.3 -> 1.1" in lines
    assert f"TensorFlow {tf.__version__}" in "\n".join(lines)


def test_one_failure_fails_the_command_and_keeps_no_part_from_running(scripted, capsys):
    said = "Graph execution error:\n\nDetected at node x\nout of memory\n"
    scripted(broken=tf.errors.ResourceExhaustedError(None, None, said), after=Check(PASS, "fine"))
    assert accelerator.main(["--minutes=0.1"]) == 1
    printed = capsys.readouterr().out
    assert "FAIL     broken   ResourceExhaustedError: out of memory\n" in printed
    assert "PASS     after    fine" in printed


def test_time_that_is_left_is_shared_among_the_parts_that_are_left(monkeypatch, subject):
    now, given = [0.0], {}
    monkeypatch.setattr(accelerator.time, "monotonic", lambda: now[0])

    def part(name, takes):
        def run(subject, seconds):
            given[name] = seconds
            now[0] += takes
            return Check(PASS, "")

        return run

    shares = {"fixed": Share(part("fixed", 40), 0), "first": Share(part("first", 30), 1), "last": Share(part("", 9), 2)}
    accelerator.run_parts(shares, subject, seconds=100)
    assert given == {"fixed": 0, "first": 20, "": 30}


def test_driver_without_a_visible_gpu_is_a_failure_that_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    driver = tmp_path / "version"
    assert accelerator.check_devices(driver).outcome == SKIPPED
    driver.write_text("NVRM version: 535\n")
    check = accelerator.check_devices(driver)
    assert check.outcome == FAIL and "tensorflow[and-cuda]" in check.figures
    assert "NVRM version: 535" in accelerator.versions(driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert accelerator.check_devices(driver).outcome == SKIPPED


def test_minutes_must_be_above_zero(capsys):
    with pytest.raises(SystemExit) as stopped:
        accelerator.main(["--minutes=0"])
    assert stopped.value.code == 2
    assert "--minutes must be above 0, not 0" in capsys.readouterr().err


def test_fit_stops_when_its_time_is_over_but_not_before_its_laps():
    def laps(seconds, at_least, lasting):
        clock = parts.Laps(seconds, at_least)
        clock.model = types.SimpleNamespace(terms=("loss",), stop_training=False)
        while not clock.model.stop_training:
            clock.on_epoch_begin(0)
            clock.start -= lasting
            clock.on_epoch_end(0, {"loss": 1.0, "clean_accuracy": 0.5})
        return len(clock.seconds), clock.losses[-1]

    assert laps(seconds=10.5, at_least=2, lasting=1) == (11, 1.0)
    assert laps(seconds=0.0, at_least=3, lasting=1) == (3, 1.0)


def test_training_passes_with_figures_and_fails_where_the_loss_does_not_fall(subject, monkeypatch):
    check = parts.trains("float32")(subject, 0.0)
    assert check.outcome == PASS and "in 15 steps" in check.figures and "images/s" in check.figures
    for losses in ([1.0, 2.0], [1.0, float("nan")]):
        monkeypatch.setattr(parts, "fit", lambda *args, losses=losses: parts.Fit(None, losses, 1.0))
        assert parts.trains("float32")(subject, 0.0).outcome == FAIL


def test_one_and_two_devices_agree_and_a_difference_is_a_failure(subject, monkeypatch):
    devices = [device.name for device in tf.config.list_logical_devices("CPU")]
    assert len(devices) == 2
    assert parts.agrees(subject, 0.0, devices[:1]).outcome == SKIPPED
    check = parts.agrees(subject, 0.0, devices)
    assert check.outcome == PASS and "one device and 2" in check.figures
    steps = iter((np.zeros(3), np.full(3, 2e-4)))
    monkeypatch.setattr(parts, "one_step", lambda *args: next(steps))
    assert parts.agrees(subject, 0.0, devices).outcome == FAIL


@pytest.mark.parametrize(
    ("difference", "accelerated", "outcome"),
    [(0.0, False, PASS), (0.01, True, PASS), (0.01, False, FAIL), (0.2, True, FAIL)],
)
def test_one_seed_must_repeat_exactly_on_the_cpu_and_closely_elsewhere(
    subject, monkeypatch, difference, accelerated, outcome
):
    vectors = iter((np.zeros(4), np.ones(4), np.full(4, 1 + difference)))
    defense = types.SimpleNamespace(step=tf.Variable(10))
    trained = parts.training.Trained(defense, None, is_new=True)
    monkeypatch.setattr(parts.training, "build", lambda *args: None)
    monkeypatch.setattr(parts.training, "train", lambda *args: trained)
    monkeypatch.setattr(parts, "weights_of", lambda defense: next(vectors))
    assert parts.repeats(subject._replace(accelerated=accelerated), 0.0).outcome == outcome


def test_export_passes_and_fails_where_the_saved_model_answers_otherwise(subject, monkeypatch):
    def train(settings, splits, folder):
        folder.mkdir(parents=True)
        parts.training.build(settings, splits).save(folder / parts.training.MODEL)

    monkeypatch.setattr(parts.training, "train", train)
    assert parts.exports(subject._replace(folder=subject.folder / "good"), 0.0).outcome == PASS

    save = parts.export.save

    def save_another(defense, *args, **kwargs):
        other = type(defense).from_config(defense.get_config())
        other.backbone.set_weights([1.01 * value for value in defense.backbone.get_weights()])
        return save(other, *args, **kwargs)

    monkeypatch.setattr(parts.export, "save", save_another)
    assert parts.exports(subject._replace(folder=subject.folder / "bad"), 0.0).outcome == FAIL


@pytest.mark.slow
def test_all_parts_pass_on_this_machine(capsys):
    assert accelerator.main(["--minutes=0.1"]) == 0
    printed = capsys.readouterr().out
    for name in ("devices", *accelerator.PARTS):
        assert f"  {name} " in printed
    assert " 0 failed, " in printed
