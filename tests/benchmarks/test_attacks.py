from __future__ import annotations

import json

import keras
import numpy as np
import pytest
from sklearn.datasets import load_digits

from benchmarks import __main__ as benchmark
from benchmarks import attack_peers, attacks, groups, peers, strength
from benchmarks.attack_case import TINY, AttackCase, Budget, Target
from benchmarks.case import Case
from benchmarks.strength import StrengthCase
from benchmarks.tables import misses_of
from benchmarks.timing import Timing
from benchmarks.training_step import Measurement
from kerasdefense.attacks import has_foolbox
from kerasdefense.types import InputError

PGD, APGD_AND_SQUARE = (group for group in groups.GROUPS if group.kind == "attacks")
EPSILON = 0.15
LIBRARIES = {
    "cleverhans": attack_peers.cleverhans,
    "Foolbox": attack_peers.foolbox,
    "ART": attack_peers.art,
    "ART, NumPy": attack_peers.art_in_numpy,
}
INSTALLED = [
    name for name in LIBRARIES if name == "cleverhans" or (has_foolbox() if name == "Foolbox" else peers.has_art())
]


@pytest.fixture(scope="module", autouse=True)
def art():
    """Import ART before a test captures: its import closes all logging handlers."""
    if peers.has_art():
        attack_peers.import_art_attacks()


@pytest.fixture(scope="module")
def target():
    """A linear model of digits, and images some of which fall within 0.15."""
    data = load_digits()
    image, label = (data.images[..., None] / 16).astype(np.float32), data.target.astype(np.int32)
    model = keras.Sequential([keras.layers.Input([8, 8, 1]), keras.layers.Flatten(), keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.02), loss=loss)
    model.fit(image[:1500], label[:1500], batch_size=100, epochs=5, shuffle=False, verbose=0)
    return Target(model, image[1500:1540], label[1500:1540])


def measurement(*, ours=1.0, **others):
    """Return what would be measured if ours took so many seconds; Foolbox and both of ART ten unless said."""
    seconds = {"evaluation": ours, "one graph": 1.0, "cleverhans": 1.0, "Foolbox": 10.0, "ART": 10.0, **others}
    seconds = {name: [value] * 3 for name, value in seconds.items() if value is not None}
    return Measurement(Timing(seconds, seconds), {})


def contenders(kind):
    """Return the makers of every library that has an attack, ours among them, by name."""
    others = {name: LIBRARIES[name] for name in INSTALLED if kind == "pgd" or name == "ART"}
    return {"evaluation": attacks.evaluation, **({"one graph": attacks.one_graph} if kind == "pgd" else {}), **others}


@pytest.mark.parametrize(("kind", "steps"), [("pgd", 5), ("apgd", 10), ("square", 100)])
def test_every_library_attacks_the_same_images_in_the_same_ball(target, kind, steps):
    budget, clean = Budget(kind, steps, EPSILON), target.is_right(target.image)
    for name, make in contenders(kind).items():
        np.random.seed(0)
        found = make(budget, target)()
        assert found.shape == target.image.shape, name
        assert np.abs(found - target.image).max() <= EPSILON + 1e-6, name
        assert found.min() >= 0 and found.max() <= 1, name
        assert 0.02 < (clean & target.is_right(found)).mean() < clean.mean() - 0.05, name


def test_ours_leaves_images_alone_that_are_wrong_clean(target):
    wrong = target._replace(label=np.where(np.arange(40) < 5, (target.label + 1) % 10, target.label).astype(np.int32))
    found = attacks.evaluation(Budget("pgd", 3, EPSILON), wrong)()
    np.testing.assert_array_equal(found[:5], target.image[:5])
    assert (found[5:] != target.image[5:]).any(axis=(1, 2, 3)).sum() > 25


@pytest.mark.parametrize("kind", ["pgd", "apgd", "square"])
def test_images_to_time_with_do_not_fall(kind):
    case = AttackCase(Case("small_cnn", width=4, image_shape=(8, 8, 1), batch_size=6), kind, steps=4, rounds=3)
    target = case.make_target()
    assert target.image.shape == (6, 8, 8, 1)
    assert target.is_right(target.image).all()
    found = {name: make(case.budget, target)() for name, make in contenders(kind).items()}
    assert max(np.abs(image - target.image).max() for image in found.values()) > 0.9 * TINY
    attacks.check_equal_work(target, found)


def test_work_that_was_not_equal_is_an_error(target):
    with pytest.raises(InputError, match=r"cleverhans fooled \d+ of 40 images that must not fall"):
        attacks.check_equal_work(target._replace(label=(target.label + 1) % 10), {"cleverhans": target.image})


def test_attack_is_timed_no_more_often_than_it_says():
    case = AttackCase(Case("small_cnn", width=4, image_shape=(8, 8, 1), batch_size=4), "pgd", steps=3, rounds=2)
    timing = attacks.measure_attack(case, rounds=20).timing
    assert {len(values) for values in timing.seconds.values()} == {2}
    assert set(timing.seconds) == {"evaluation", "one graph", *INSTALLED}


@pytest.mark.parametrize(
    ("group", "measured", "missed"),
    [
        (PGD, measurement(), []),
        (PGD, measurement(**{"one graph": 1.1}), ["x cleverhans is 0.91, must be at least 1.00"]),
        (PGD, measurement(Foolbox=1.4), ["x Foolbox is 1.40, must be at least 1.50"]),
        (PGD, measurement(ART=1.4), ["x ART is 1.40, must be at least 1.50"]),
        (PGD, measurement(**{"ART, NumPy": 1.3}), ["x ART is 1.30, must be at least 1.50"]),
        (PGD, measurement(ART=1.2, **{"ART, NumPy": 9.0}), ["x ART is 1.20, must be at least 1.50"]),
        (APGD_AND_SQUARE, measurement(ART=3.0), []),
        (APGD_AND_SQUARE, measurement(ART=2.9), ["x ART is 2.90, must be at least 3.00"]),
    ],
)
def test_benchmark_of_attacks_fails_exactly_where_a_figure_is_missed(monkeypatch, capsys, group, measured, missed):
    monkeypatch.setattr(benchmark, "GROUPS", (group._replace(measure=lambda case, rounds: measured),))
    assert benchmark.main(["--quick", "--only=attacks"]) == (1 if missed else 0)
    name = group.quick_cases[0].name
    assert capsys.readouterr().err.splitlines() == [f"{name}, evaluation: {miss}" for miss in missed]


def test_libraries_that_are_not_installed_are_left_out(monkeypatch, capsys, target):
    for module in (attack_peers, benchmark):
        monkeypatch.setattr(module, "has_art", lambda: False)
        monkeypatch.setattr(module, "has_foolbox", lambda: False)
    assert list(attack_peers.attack_peers(Budget("pgd", 3, EPSILON), target)) == ["cleverhans"]
    assert attack_peers.attack_peers(Budget("apgd", 2, EPSILON), target) == {}
    measured = measurement(Foolbox=None, ART=None)
    monkeypatch.setattr(benchmark, "GROUPS", (PGD._replace(measure=lambda case, rounds: measured),))
    assert benchmark.main(["--quick", "--only=attacks"]) == 0
    printed = capsys.readouterr().out
    assert "ART is not installed and left out" in printed and "Foolbox is not installed and left out" in printed
    assert printed.count("not installed") == 6  # two lines, and two columns of each


def test_strength_has_a_row_for_each_other_library_and_its_paired_interval(monkeypatch, target):
    ours, theirs = np.arange(40) < 10, np.arange(40) < 16
    answers = iter([np.arange(40) < 30, ours, theirs])
    monkeypatch.setattr(Target, "is_right", lambda self, image: next(answers))
    monkeypatch.setattr(strength, "evaluation", lambda budget, target: lambda: target.image)
    monkeypatch.setattr(strength, "attack_peers", lambda budget, target: {"other": lambda: target.image})
    (row,) = strength.rows_of_strength(StrengthCase("digits", Budget("pgd", 2, EPSILON)), target)
    assert (row["name"], row["strategy"]) == ("digits, PGD-2", "other")
    assert (row["clean"], row["ours"], row["theirs"]) == (0.75, 0.25, 0.4)
    assert row["difference"] == pytest.approx(-0.15)
    assert row["low"] < row["difference"] < row["high"] < 0
    assert misses_of(strength.COLUMNS, [row]) == []
    assert misses_of(strength.COLUMNS, [{**row, "low": 0.0}]) == []
    assert misses_of(strength.COLUMNS, [{**row, "low": 0.01}]) == [
        "digits, PGD-2, other: 95 % from is +1.0%, must be at most +0.0%"
    ]


def test_quick_strength_attacks_a_published_model_with_every_library(monkeypatch, capsys, tmp_path, target):
    monkeypatch.setattr(strength, "first_images", lambda folder, count: (target.image[:count], target.label[:count]))
    monkeypatch.setattr(strength, "load_classifier", lambda name: target.model)
    (tmp_path / strength.DATA).mkdir()
    output = tmp_path / "figures.json"
    arguments = ["--quick", "--only=strength", f"--data_dir={tmp_path}", "--no-check", f"--output={output}"]
    assert benchmark.main(arguments) == 0
    printed = capsys.readouterr().out
    (table,) = json.loads(output.read_text())["tables"]
    assert [row["strategy"] for row in table["rows"]] == [name for name in INSTALLED if name != "ART, NumPy"]
    assert all(row["ours"] <= row["clean"] and row["low"] <= row["difference"] for row in table["rows"])
    assert "first 16 test images of cifar10" in printed and "attacked by" in printed
    assert [column.heading for column in strength.COLUMNS if column.heading not in printed] == []


def test_strength_says_what_is_missing(monkeypatch, tmp_path):
    assert strength.missing("") == "--data_dir is not given, a TFDS folder that holds cifar10"
    assert strength.missing(str(tmp_path)) == f"there is no cifar10 in --data_dir={tmp_path}"
    (tmp_path / "cifar10").mkdir()
    assert strength.missing(str(tmp_path)) == ""
    monkeypatch.setattr(strength, "MODELS", tmp_path)
    models = "pgd_at_cifar10_mini, standard_cifar10_mini, trades_cifar10_mini"
    assert strength.missing(str(tmp_path)) == f"no {models} in {tmp_path}"


def test_published_model_is_attacked_by_its_logits():
    model = strength.load_classifier("standard_cifar10_mini")
    logits = model(np.full([2, 32, 32, 3], 0.5, np.float32), training=False).numpy()
    assert logits.shape == (2, 10)
    assert np.abs(logits.sum(axis=1) - 1).min() > 1e-3


def test_candidates_are_held_to_the_ball_and_the_box():
    image = np.array([0.0, 0.5, 1.0], np.float32).reshape([1, 3, 1, 1])
    found = strength.clipped(image + np.array([-0.3, 0.3, -0.05]).reshape(image.shape), image, EPSILON)
    np.testing.assert_allclose(found.ravel(), [0.0, 0.5 + EPSILON, 0.95], rtol=1e-6)
    assert found.dtype == np.float32
    with pytest.raises(InputError, match="NaN"):
        strength.clipped(image * np.nan, image, EPSILON)
