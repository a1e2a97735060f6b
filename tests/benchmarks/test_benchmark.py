from __future__ import annotations

import collections
import json

import pytest
import tensorflow as tf

from benchmarks import __main__ as benchmark
from benchmarks import attack_peers, groups, peers
from benchmarks.case import Case
from benchmarks.floor import floor
from benchmarks.serving import CALLS
from benchmarks.timing import Timing, time_in_turns
from benchmarks.training_step import Measurement

CASE = Case("small_cnn", width=4, image_shape=(8, 8, 1), batch_size=10)
PEERS, CONTROLS, OSDN, DFA, AGKD, CAFD, ATOP, CHECKPOINTS = (
    group for group in groups.GROUPS if group.kind == "training"
)


@pytest.fixture(scope="module")
def art():
    """Import ART before a test captures: its import closes all logging handlers, and absl's one its stream with it."""
    if peers.has_art():
        peers.import_art()
        attack_peers.import_art_attacks()


def measurement(*, ours=1.0, retraces=0, **others):
    """Return what would be measured if the floor took one second."""
    seconds = {name: [value] * 3 for name, value in {"floor": 1.0, "mirrored": ours, **others}.items()}
    return Measurement(Timing(seconds, seconds), {"mirrored": retraces})


def script(monkeypatch, group, measured):
    """Have nothing but one case of one group, and what is measured there."""
    scripted = group._replace(quick_cases=(CASE,), measure=lambda case, rounds: measured)
    monkeypatch.setattr(benchmark, "GROUPS", (scripted,))


def test_quick_benchmark_fills_every_column_and_never_retraces(art, capsys, tmp_path):
    assert benchmark.main(["--quick", "--rounds=2", "--no-check", f"--output={tmp_path / 'figures.json'}"]) == 0
    printed = capsys.readouterr().out
    headings = [column.heading for group in groups.GROUPS for column in group.columns]
    assert [heading for heading in ("case", "strategy", *headings) if heading not in printed] == []
    tables = json.loads((tmp_path / "figures.json").read_text())["tables"]
    assert [[row["strategy"] for row in table["rows"]] for table in tables] == [
        ["mirrored", "none"],
        ["mirrored"],
        ["mirrored"],
        ["mirrored"],
        ["mirrored"],
        ["mirrored"],
        ["mirrored"],
        ["mirrored"],
        ["evaluation"],
        ["evaluation"],
        ["serving_default", "image_bytes"],
        ["batch 1", "batch 8", "batch 32", "batch 128"],
    ]
    for table in tables:
        if "retraces" in table["rows"][0]:
            assert [row["retraces"] for row in table["rows"]] == [0] * len(table["rows"])
    for number, table in enumerate(tables):
        (rounds,) = table["rounds"].values()
        calls = CALLS if number >= 10 else 1
        assert {len(values) for values in rounds["seconds"].values()} == {2 * calls}
    for row in [row for table in tables[:7] for row in table["rows"]]:
        assert 0 < row["over_floor_processor"] < 3
    for row in tables[0]["rows"]:
        assert row["times_cleverhans"] > 0
        assert (row["times_art"] or 0) > 0 or not peers.has_art()
    assert tables[7]["rows"][0]["checkpoint_share"] > 0


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
    ("group", "measured", "missed"),
    [
        (PEERS, measurement(ours=1.1, cleverhans=1.1, ART=2.2), []),
        (PEERS, measurement(ours=1.11, cleverhans=1.2, ART=2.3), ["ours/floor is 1.11, must be at most 1.10"]),
        (PEERS, measurement(cleverhans=0.9, ART=2.0), ["x cleverhans is 0.90, must be at least 1.00"]),
        (PEERS, measurement(cleverhans=1.0, ART=1.5), ["x ART is 1.50, must be at least 2.00"]),
        (PEERS, measurement(cleverhans=1.0, ART=2.0, retraces=1), ["retraces is 1, must be at most 0"]),
        (CONTROLS, measurement(ours=1.15), []),
        (CONTROLS, measurement(ours=1.16, retraces=2), ["ours/floor is 1.16, must be at most 1.15", "retraces is 2"]),
        (OSDN, measurement(ours=1.25), []),
        (OSDN, measurement(ours=1.26), ["ours/floor is 1.26, must be at most 1.25"]),
        (DFA, measurement(ours=1.15), []),
        (DFA, measurement(ours=1.16), ["ours/floor is 1.16, must be at most 1.15"]),
        (CHECKPOINTS, measurement(checkpoint=9.9), []),
        (CHECKPOINTS, measurement(checkpoint=11.0), ["share of the steps is 5.50%, must be at most 5.00%"]),
    ],
)
def test_benchmark_fails_exactly_where_a_figure_is_missed(monkeypatch, capsys, group, measured, missed):
    script(monkeypatch, group, measured)
    assert benchmark.main(["--quick"]) == (1 if missed else 0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(missed)
    for line, miss in zip(lines, missed):
        assert line.startswith(f"{group.name(CASE)}, mirrored: {miss}")
    assert benchmark.main(["--quick", "--no-check"]) == 0


def test_every_control_is_timed_with_and_without_weight_perturbation():
    names = {case.defense_name for case in CONTROLS.cases}
    assert names == {"standard", "fgsm_rs", "pgd_at", "trades", "mart", "pgd_at + AWP", "trades + AWP"}


def test_osdn_caml_is_timed_with_one_and_three_steps_of_attack_and_without_peer():
    names = {OSDN.name(case) for case in OSDN.cases}
    assert names == {"osdn_caml, PGD-1", "osdn_caml, PGD-3", "osdn_caml without peer, PGD-1"}


def test_dfa_is_timed_in_two_and_three_passes_and_on_adversarial_images():
    assert {DFA.name(case) for case in DFA.cases} == {"dfa", "dfa in three passes", "dfa_at"}


def test_atop_is_timed_with_one_and_three_steps_of_attack():
    assert {ATOP.name(case) for case in ATOP.cases} == {"atop, PGD-1", "atop, PGD-3"}


@pytest.mark.parametrize("group", groups.GROUPS, ids=lambda group: group.title)
def test_cases_of_a_table_have_names_of_their_own(group):
    assert len({group.name(case) for case in group.cases}) == len(group.cases)


def test_benchmark_without_art_says_which_extra_to_install(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "has_art", lambda: False)
    script(monkeypatch, PEERS, measurement(cleverhans=1.5))
    assert benchmark.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert "pip install '.[bench]'" in printed
    assert printed.count("not installed") == 3  # a line of its own, and two columns


def test_only_one_kind_of_tables_is_measured_where_one_is_asked_for(monkeypatch, capsys):
    kinds = []

    def measure_group(group, options, console):
        kinds.append(group.kind)
        return [], {}

    monkeypatch.setattr(benchmark, "measure_group", measure_group)
    for kind in ("training", "attacks", "serving"):
        kinds.clear()
        assert benchmark.main([f"--only={kind}"]) == 0
        assert set(kinds) == {kind}
    assert "strength" not in capsys.readouterr().out
    kinds.clear()
    assert benchmark.main([]) == 0
    assert set(kinds) == {"training", "attacks", "serving"}
    assert "strength is left out: --data_dir is not given" in capsys.readouterr().out


def test_busy_machine_is_reported(monkeypatch, capsys):
    seconds = {"floor": [1.0, 1.0, 1.5, 3.0, 3.0], "mirrored": [1.0] * 5, "cleverhans": [1.0] * 5}
    script(monkeypatch, PEERS, Measurement(Timing(seconds, seconds), {"mirrored": 0}))
    benchmark.main(["--quick", "--no-check"])
    assert "the floor took 1.5 times as long in its median round" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("control", "inference", "training"),
    [
        ({"defense": "standard", "steps": 0}, 0, 1),
        ({"defense": "fgsm_rs", "steps": 1}, 1, 1),
        ({"defense": "pgd_at", "steps": 3}, 3, 1),
        ({"defense": "pgd_at", "steps": 3, "awp_gamma": 0.005}, 3, 2),
        ({"defense": "mart", "steps": 3}, 3, 2),
        ({"defense": "trades", "steps": 3}, 4, 2),
        ({"defense": "trades", "steps": 3, "awp_gamma": 0.005}, 4, 4),
    ],
)
def test_floor_takes_no_pass_that_the_method_could_do_without(monkeypatch, control, inference, training):
    case = Case("small_cnn", width=4, image_shape=(8, 8, 1), batch_size=4, **control)
    model, passes = case.make_classifier(), collections.Counter()

    class Counting:
        trainable_variables = model.trainable_variables

        def __call__(self, image, training):
            passes[training] += 1
            return model(image, training=training)

    monkeypatch.setattr(Case, "make_classifier", lambda self: Counting())
    tf.config.run_functions_eagerly(True)
    try:
        gradients = floor(case)()
    finally:
        tf.config.run_functions_eagerly(False)
    assert (passes[False], passes[True]) == (inference, training)
    assert [gradient.shape for gradient in gradients] == [tuple(each.shape) for each in model.trainable_variables]


@pytest.mark.parametrize("name", ["rounds", "images"])
def test_rounds_and_images_below_one_are_refused(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main([f"--{name}=0"])
    assert stopped.value.code == 2
    assert f"--{name} must be at least 1, not 0" in capsys.readouterr().err
