from __future__ import annotations

import json

import pytest

from benchmarks import __main__ as benchmark
from benchmarks import training_step
from benchmarks.timing import Timing, time_in_turns
from benchmarks.training_step import Case, Measurement

CASE = Case("small_cnn", width=4, image_shape=(8, 8, 1), batch_size=10)


@pytest.fixture(scope="module")
def art():
    """Import ART before a test captures: its import closes all logging handlers, and absl's one its stream with it."""
    if training_step.has_art():
        training_step.import_art()


def measurement(*, ours=1.0, retraces=0, **others):
    """Return what would be measured if the floor took one second."""
    seconds = {name: [value] * 3 for name, value in {"floor": 1.0, "mirrored": ours, **others}.items()}
    return Measurement(Timing(seconds, seconds), {"mirrored": retraces})


def test_quick_benchmark_fills_every_column_and_never_retraces(art, capsys, tmp_path):
    assert benchmark.main(["--quick", "--rounds=2", "--no-check", f"--output={tmp_path / 'figures.json'}"]) == 0
    printed = capsys.readouterr().out
    assert [column for column in ("case", "strategy", *benchmark.COLUMNS) if column not in printed] == []
    content = json.loads((tmp_path / "figures.json").read_text())
    assert [row["strategy"] for row in content["rows"]] == ["mirrored", "none"]
    for row in content["rows"]:
        assert row["retraces"] == 0
        assert 0 < row["over_floor_processor"] < 3
        assert row["times_cleverhans"] > 0
        assert (row["times_art"] or 0) > 0 or not training_step.has_art()
    (rounds,) = content["rounds"].values()
    assert {len(values) for values in rounds["seconds"].values()} == {2}


def test_timing_is_the_median_of_the_faster_half_and_ratios_are_of_it():
    timing = Timing({"floor": [2.0, 90.0, 1.0, 3.0, 80.0], "mirrored": [6.0, 4.0, 5.0, 70.0, 60.0]}, {})
    assert timing.milliseconds("floor") == 2000
    assert timing.ratio("mirrored", "floor") == 2.5
    assert timing.disturbance("floor") == 1.5


def test_turns_begin_with_another_step_in_each_round():
    calls = []
    timing = time_in_turns({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=4)
    assert "".join(calls) == "abcbcacababc"
    assert {len(values) for values in (*timing.seconds.values(), *timing.processor_seconds.values())} == {4}


@pytest.mark.parametrize(
    ("measured", "missed"),
    [
        (measurement(ours=1.1, cleverhans=1.1, ART=2.2), []),
        (measurement(ours=1.11, cleverhans=1.2, ART=2.3), ["ours/floor is 1.11, must be at most 1.10"]),
        (measurement(cleverhans=0.9, ART=2.0), ["x cleverhans is 0.90, must be at least 1.00"]),
        (measurement(cleverhans=1.0, ART=1.5), ["x ART is 1.50, must be at least 2.00"]),
        (measurement(cleverhans=1.0, ART=2.0, retraces=1), ["retraces is 1, must be at most 0"]),
    ],
)
def test_benchmark_fails_exactly_where_a_figure_is_missed(monkeypatch, capsys, measured, missed):
    monkeypatch.setattr(benchmark, "QUICK_CASES", [CASE])
    monkeypatch.setattr(benchmark, "measure", lambda case, rounds: measured)
    assert benchmark.main(["--quick"]) == (1 if missed else 0)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"small_cnn-4 8x8x1 batch 10, mirrored: {miss}" for miss in missed]
    assert benchmark.main(["--quick", "--no-check"]) == 0


def test_benchmark_without_art_says_which_extra_to_install(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "has_art", lambda: False)
    monkeypatch.setattr(benchmark, "measure", lambda case, rounds: measurement(cleverhans=1.5))
    assert benchmark.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert "pip install '.[bench]'" in printed
    assert printed.count("not installed") == 3  # a line of its own, and two columns


def test_busy_machine_is_reported(monkeypatch, capsys):
    seconds = {"floor": [1.0, 1.0, 1.5, 3.0, 3.0], "mirrored": [1.0] * 5, "cleverhans": [1.0] * 5}
    monkeypatch.setattr(
        benchmark, "measure", lambda case, rounds: Measurement(Timing(seconds, seconds), {"mirrored": 0})
    )
    benchmark.main(["--quick", "--no-check"])
    assert "the floor took 1.5 times as long in its median round" in capsys.readouterr().out


def test_floor_takes_one_input_gradient_per_step_and_one_parameter_gradient():
    gradients = training_step.floor(CASE)()
    shapes = [tuple(variable.shape) for variable in CASE.make_classifier().trainable_variables]
    assert [gradient.shape for gradient in gradients] == shapes


def test_rounds_below_one_are_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--rounds=0"])
    assert stopped.value.code == 2
    assert "--rounds must be at least 1, not 0" in capsys.readouterr().err
