"""Slots, journal, stops: every image gets the same outcome however an evaluation is cut."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

from kerasdefense.attacks import APGD, FAB, PGD, Square
from kerasdefense.evaluation import Options, PlannedAttack, ThreatModel, evaluate, robustness
from kerasdefense.evaluation.pool import Pool
from kerasdefense.evaluation.search import Chunk, ExactPath, Search, padded_size
from kerasdefense.types import InputError

THREAT = ThreatModel("linf", 0.1)
SUITE = (
    PlannedAttack("apgd_ce", APGD(*THREAT, steps=12, restarts=2)),
    PlannedAttack("apgd_t", APGD(*THREAT, steps=8, targets=3), "targeted_dlr"),
    PlannedAttack("fab_t", FAB(*THREAT, steps=6, targets=2), "distance"),
    PlannedAttack("matching", PGD(*THREAT, steps=4), "logit_matching"),
    PlannedAttack("square", Square(*THREAT, queries=60), "margin"),
)


def run(trained, folder, *, batch_size=16, count=40, suite=SUITE, ahead=None, **options):
    settings = {"chunk_size": 16, "cascade": True, "journal": folder / "journal", **options}
    return robustness.measure(
        {"exact": trained.path},
        trained.batches(batch_size=batch_size, count=count),
        suite,
        Options(**settings),
        save=folder / "a.npz",
        ahead=ahead,
    )


def saved(folder):
    with np.load(folder / "a.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def whole(digits_classifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run(digits_classifier, folder), saved(folder)


def assert_equal(one, other):
    assert set(one) == set(other)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_outcomes_hold_the_cascade(whole):
    measured, file = whole
    outcomes = measured.outcomes
    assert outcomes.met[0] == outcomes.clean.sum() and (np.diff(outcomes.met) <= 0).all()
    for column in range(1, len(SUITE)):
        assert outcomes.met[column] == outcomes.survived[:, :column].all(axis=1).sum()
    assert 0 < outcomes.robust.mean() < outcomes.clean.mean()
    assert measured.complete and (outcomes.unconfirmed == 0).all()
    np.testing.assert_array_equal(file["clean"] & file["survived"].all(axis=1), outcomes.robust)


def test_batch_size_of_the_reader_changes_nothing(digits_classifier, whole, tmp_path):
    run(digits_classifier, tmp_path, batch_size=7)
    assert_equal(saved(tmp_path), whole[1])


def test_order_of_attacks_changes_no_verdict(digits_classifier, whole, tmp_path):
    alone = run(digits_classifier, tmp_path, suite=SUITE[:3], cascade=False).outcomes
    cascade = run(digits_classifier, tmp_path / "2", suite=SUITE[:3]).outcomes
    np.testing.assert_array_equal(alone.robust, cascade.robust)
    np.testing.assert_array_equal(alone.clean & alone.survived.all(axis=1), cascade.robust)


# Two attacks of a few steps, the second on every image.
ALONE = (
    PlannedAttack("pgd", PGD(*THREAT, steps=1, step_size=0.05, random_start=False)),
    PlannedAttack("pgd_margin", PGD(*THREAT, steps=3), "margin", alone=True),
)


def test_attack_that_stands_alone_finds_what_it_finds_without_a_cascade(digits_classifier, tmp_path, monkeypatch):
    cascade = run(digits_classifier, tmp_path, count=20, suite=ALONE).outcomes
    apart = run(digits_classifier, tmp_path / "2", count=20, suite=ALONE, cascade=False).outcomes
    np.testing.assert_array_equal(cascade.survived, apart.survived)
    np.testing.assert_array_equal(cascade.met, np.full(2, cascade.clean.sum()))
    assert 0 < cascade.robust.sum() < cascade.survived[:, 0].sum() < cascade.clean.sum()
    advance, calls = Pool.advance, []

    def dying(self):
        if self.search.name == "pgd_margin":
            calls.append(self.search.name)
        if len(calls) == 2:
            raise Killed
        advance(self)

    monkeypatch.setattr(Pool, "advance", dying)
    with pytest.raises(Killed):
        run(digits_classifier, tmp_path / "3", count=20, suite=ALONE, snapshot_seconds=0.0)
    monkeypatch.setattr(Pool, "advance", advance)
    resumed = run(digits_classifier, tmp_path / "3", count=20, suite=ALONE)
    np.testing.assert_array_equal(resumed.outcomes.met, cascade.met)
    assert_equal(saved(tmp_path / "3"), saved(tmp_path))


def test_journal_of_a_cascade_is_refused_where_an_attack_shall_stand_alone(digits_classifier, tmp_path):
    run(digits_classifier, tmp_path, count=8, suite=(ALONE[0], ALONE[1]._replace(alone=False)))
    with pytest.raises(InputError, match="evaluation of another suite"):
        run(digits_classifier, tmp_path, count=8, suite=ALONE)


class Killed(Exception):  # noqa: N818 - nothing went wrong
    """Stands for a kill: nothing after it is written."""


@pytest.mark.parametrize("after", [1, 4, 9, 17])
def test_killed_evaluation_goes_on_and_ends_alike(digits_classifier, whole, tmp_path, monkeypatch, after):
    advance, calls = Pool.advance, []

    def dying(self):
        if len(calls) == after:
            raise Killed
        calls.append(self.search.name)
        advance(self)

    monkeypatch.setattr(Pool, "advance", dying)
    with pytest.raises(Killed):
        run(digits_classifier, tmp_path, snapshot_seconds=0.0)
    monkeypatch.setattr(Pool, "advance", advance)
    assert not (tmp_path / "a.npz").exists()
    resumed = run(digits_classifier, tmp_path)
    assert_equal(saved(tmp_path), whole[1])
    np.testing.assert_array_equal(resumed.outcomes.met, whole[0].outcomes.met)


def test_journal_of_another_model_or_suite_is_refused(digits_classifier, tmp_path):
    run(digits_classifier, tmp_path, model="one", suite=SUITE[:1])
    with pytest.raises(InputError, match=r'another model \("one" there, "two" now\); .*--evaluate_resume=never'):
        run(digits_classifier, tmp_path, model="two", suite=SUITE[:1])
    with pytest.raises(InputError, match="evaluation of another suite"):
        run(digits_classifier, tmp_path, model="one", suite=SUITE[1:2])


def test_journal_of_other_images_is_refused(digits_classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(Pool, "advance", lambda self: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        run(digits_classifier, tmp_path, suite=SUITE[:1])
    monkeypatch.undo()
    journal = robustness.Journal(tmp_path / "journal", json.loads((tmp_path / "journal/settings.json").read_text()))
    chunk = Chunk(digits_classifier.image[:40], digits_classifier.label[:40], np.arange(40, dtype=np.int32))
    exact = ExactPath(digits_classifier.path, seed=0, chunk_size=16)
    block = robustness.Block(chunk, exact, [], first=0, cascade=True)
    what = {"digest": np.array("of other images"), "first": np.array(0)}
    journal.write_current({**block.to_arrays(), **what})
    with pytest.raises(InputError, match="saw other images"):
        run(digits_classifier, tmp_path, suite=SUITE[:1])


def test_damaged_journal_is_one_line(digits_classifier, tmp_path):
    run(digits_classifier, tmp_path, suite=SUITE[:1])
    (tmp_path / "journal/block-00000.npz").write_bytes(b"half")
    with pytest.raises(InputError, match=r"block-00000.npz cannot be read .*--evaluate_resume=never") as caught:
        run(digits_classifier, tmp_path, suite=SUITE[:1])
    assert "\n" not in str(caught.value)


def test_evaluation_stops_in_time_with_an_upper_bound_and_goes_on(digits_classifier, whole, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(robustness.time, "monotonic", lambda: now.__setitem__(0, now[0] + 1) or now[0])
    first = run(digits_classifier, tmp_path, minutes=8 / 60)
    assert not first.complete and first.outcomes.robust.mean() >= whole[0].outcomes.robust.mean()
    monkeypatch.undo()
    assert run(digits_classifier, tmp_path).complete
    assert_equal(saved(tmp_path), whole[1])


def test_time_limit_is_marked_in_the_results(digits_classifier, tmp_path):
    options = Options(examples=32, minutes=1e-9, chunk_size=16)
    results = evaluate(
        {"exact": digits_classifier.path},
        digits_classifier.batches(),
        THREAT,
        SUITE,
        options=options,
        sanity_examples=16,
    )
    assert not results["complete"] and results["sanity"] == [] and results["curve"] == []
    fallen = results["clean_accuracy"]["value"] - results["robust_accuracy"]["value"]
    assert 0 < fallen < 1  # what has fallen in the first burst counts


def test_evaluation_of_several_blocks_goes_on_in_any_of_them(digits_classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(robustness, "_BLOCK", 16)
    suite = [SUITE[0], SUITE[4]._replace(examples=20)]
    uncut = run(digits_classifier, tmp_path / "uncut", suite=suite)
    assert len(list((tmp_path / "uncut/journal").glob("block-*.npz"))) == 3
    assert uncut.outcomes.met[1] <= 20
    advance, left = Pool.advance, [0]

    def dying(self):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        advance(self)

    monkeypatch.setattr(Pool, "advance", dying)
    for _ in range(60):
        left[0] = 7
        try:
            run(digits_classifier, tmp_path / "cut", suite=suite, snapshot_seconds=0.0)
            break
        except Killed:
            continue
    assert_equal(saved(tmp_path / "cut"), saved(tmp_path / "uncut"))


def test_block_that_was_killed_between_its_two_files_is_not_taken_for_the_next(
    digits_classifier, tmp_path, monkeypatch
):
    monkeypatch.setattr(robustness, "_BLOCK", 16)
    kept = []
    finish = robustness.Journal.finish_block

    def keeping(self, number, arrays):
        path = tmp_path / "journal/current.npz"
        content = path.read_bytes() if path.is_file() else None
        finish(self, number, arrays)
        if content is not None and not kept:
            kept.append(path.write_bytes(content))
            raise Killed

    monkeypatch.setattr(robustness.Journal, "finish_block", keeping)
    with pytest.raises(Killed):
        run(digits_classifier, tmp_path, suite=SUITE[:1], snapshot_seconds=0.0)
    resumed = run(digits_classifier, tmp_path, suite=SUITE[:1])
    monkeypatch.undo()
    np.testing.assert_array_equal(
        resumed.outcomes.survived, run(digits_classifier, tmp_path / "2", suite=SUITE[:1]).outcomes.survived
    )


def test_finished_block_of_other_images_is_refused(digits_classifier, tmp_path):
    run(digits_classifier, tmp_path, suite=SUITE[:1])
    other = digits_classifier._replace(image=digits_classifier.image[::-1])
    with pytest.raises(InputError, match="saw other images"):
        run(other, tmp_path, suite=SUITE[:1])


@pytest.mark.parametrize("planned", SUITE, ids=[planned.name for planned in SUITE])
def test_no_run_takes_more_passes_than_its_budget(digits_classifier, planned):
    exact = ExactPath(digits_classifier.path, seed=0, chunk_size=16)
    chunk = Chunk(digits_classifier.image[:16], digits_classifier.label[:16], np.arange(16, dtype=np.int32))
    weak = planned._replace(attack=dataclasses.replace(planned.attack, epsilon=1e-5))
    search = Search(weak, "exact", digits_classifier.path, stream=0, seed=0, chunk_size=16)
    pool, most = Pool(search, chunk, exact.logits(chunk), np.flatnonzero(exact.is_right(chunk)), exact), 0
    while not pool.finished:
        pool.advance()
        most = max(most, int(pool._state.best.queries.numpy()[: len(pool.rows)].max()))
    assert most == search.attack.passes


def test_gradients_that_are_no_numbers_fool_nobody(digits_classifier, tmp_path):
    @tf.custom_gradient
    def poisoned(image):
        return tf.identity(image), lambda upstream: upstream * float("nan")

    def path(image, seed):
        return digits_classifier.path(poisoned(image), seed)

    suite = [PlannedAttack("pgd", PGD("linf", 1e-4, steps=3))]
    measured = robustness.measure({"exact": path}, digits_classifier.batches(), suite, Options(chunk_size=32))
    np.testing.assert_array_equal(measured.outcomes.robust, measured.outcomes.clean)


def test_slots_are_filled_from_the_queue_and_halved_at_its_end(digits_classifier):
    exact = ExactPath(digits_classifier.path, seed=0, chunk_size=16)
    chunk = Chunk(digits_classifier.image[:40], digits_classifier.label[:40], np.arange(40, dtype=np.int32))
    planned = PlannedAttack("apgd", APGD("linf", 0.1, steps=10))
    search = Search(planned, "exact", digits_classifier.path, stream=0, seed=0, chunk_size=16)
    pool, sizes = Pool(search, chunk, exact.logits(chunk), np.flatnonzero(exact.is_right(chunk)), exact), []
    while not pool.finished:
        pool.advance()
        sizes.append(len(pool.place))
    assert sizes[0] == 16 and sizes == sorted(sizes, reverse=True) and sizes[-1] < 16
    assert int(pool.entered) == len(pool.rows)


@pytest.mark.parametrize(
    "count, size", [(1, 16), (16, 16), (17, 32), (33, 48), (64, 64), (65, 96), (200, 256), (999, 256)]
)
def test_padded_sizes_are_few(count, size):
    assert padded_size(count, 256) == size


def test_transfer_attacks_look_on_surrogates_alone(digits_classifier, tmp_path):
    def path(image, seed):
        return digits_classifier.path(tf.stop_gradient(image), seed)

    paths = {"exact": path, "surrogate:twin": digits_classifier.path}
    suite = [
        PlannedAttack("pgd", PGD(*THREAT, steps=5)),
        PlannedAttack("transfer", PGD(*THREAT, steps=5), transfer=True),
    ]
    measured = robustness.measure(paths, digits_classifier.batches(), suite, Options(chunk_size=32))
    assert [search.name for search in measured.searches] == ["pgd", "transfer:surrogate:twin"]
    survived = measured.outcomes.survived.mean(axis=0)
    assert survived[0] > survived[1] + 0.2  # its own gradient is zero; the twin's is not


PROGRAM = """
import sys
from pathlib import Path
import numpy as np
import tensorflow as tf
from kerasdefense.attacks import Square
from kerasdefense.evaluation import Options, PlannedAttack, ThreatModel, robustness

random = np.random.default_rng(0)
weights = random.normal(size=[64, 4]).astype(np.float32)
image = random.uniform(size=[64, 8, 8, 1]).astype(np.float32)
label = np.argmax(image.reshape(64, 64) @ weights, axis=1).astype(np.int32)
elements = {"image": image, "label": label, "index": np.arange(64, dtype=np.int32)}
suite = [PlannedAttack("square", Square("linf", 0.02, queries=4000), "margin")]
folder = Path(sys.argv[1])
robustness.measure(
    {"exact": lambda image, seed: tf.reshape(image, [-1, 64]) @ weights},
    tf.data.Dataset.from_tensor_slices(elements).batch(64),
    suite,
    Options(chunk_size=32, journal=folder / "journal", snapshot_seconds=0.01),
    save=folder / "a.npz",
)
"""


@pytest.mark.slow
def test_evaluation_killed_by_the_system_ends_with_the_same_file(tmp_path):
    command = [sys.executable, "-c", PROGRAM]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    killed = tmp_path / "killed"
    for _ in range(3):
        process = subprocess.Popen([*command, str(killed)])
        began, current = time.monotonic(), killed / "journal/current.npz"
        while process.poll() is None and not (current.is_file() and current.stat().st_mtime > time.time() - 1):
            assert time.monotonic() - began < 120
            time.sleep(0.05)
        time.sleep(0.5)
        process.kill()
        process.wait()
    subprocess.run([*command, str(killed)], check=True)
    assert_equal(saved(killed), saved(tmp_path / "whole"))


def test_outcomes_do_not_depend_on_the_block_that_an_image_is_in(digits_classifier, whole, tmp_path):
    measured = run(digits_classifier, tmp_path, block=16)
    np.testing.assert_array_equal(measured.outcomes.survived, whole[0].outcomes.survived)
    assert sum(1 for _ in (tmp_path / "journal").glob("block-*.npz")) == 3


def test_matching_attack_finds_the_same_reference_from_any_block(digits_classifier):
    exact = ExactPath(digits_classifier.path, seed=0, chunk_size=16)
    chunk = Chunk(digits_classifier.image[:40], digits_classifier.label[:40], np.arange(40, dtype=np.int32))
    references = robustness.References(exact, lambda: chunk)
    planned = PlannedAttack("matching", PGD(*THREAT, steps=4), "logit_matching")
    search = Search(planned, "exact", digits_classifier.path, stream=0, seed=0, chunk_size=16)
    run_of = np.arange(40) % 3
    together = references.of(search, chunk.label, np.arange(40), run_of)
    late = references.of(search, chunk.label[24:], np.arange(24, 40), run_of[24:])
    np.testing.assert_array_equal(late, together[24:])
    assert (together.argmax(axis=1) != chunk.label).all()


def test_blocks_attacked_elsewhere_are_taken_from_the_journal_whatever_their_order(
    digits_classifier, tmp_path, monkeypatch
):
    alone = run(digits_classifier, tmp_path / "alone", block=16, suite=SUITE[:1])
    attacked = []

    def ahead(course):
        journal = course.journal()
        for number in (2, 0):
            journal.path_of(number).write_bytes((tmp_path / f"alone/journal/block-0000{number}.npz").read_bytes())

    attack = robustness.Block.attack
    monkeypatch.setattr(
        robustness.Block, "attack", lambda block, *a, **k: attacked.append(block.first) or attack(block, *a, **k)
    )
    measured = run(digits_classifier, tmp_path / "rest", block=16, suite=SUITE[:1], ahead=ahead)
    assert attacked == [16]
    np.testing.assert_array_equal(measured.outcomes.survived, alone.outcomes.survived)
