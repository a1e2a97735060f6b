"""Attacks as an evaluation runs them, timed in turns with those of other libraries at equal work."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from benchmarks.attack_case import AttackCase, Budget, Target
from benchmarks.attack_peers import art_in_numpy, attack_peers
from benchmarks.peers import has_art
from benchmarks.tables import Row
from benchmarks.timing import Step, Timing, time_in_turns
from benchmarks.training_step import Measurement
from kerasdefense.attacks import OBJECTIVES, misclassified, seeds, share_pass
from kerasdefense.evaluation.pool import Pool
from kerasdefense.evaluation.search import Chunk, ExactPath, Search
from kerasdefense.types import InputError

EVALUATION, ONE_GRAPH, ART, ART_NUMPY = "evaluation", "one graph", "ART", "ART, NumPy"


def evaluation(budget: Budget, target: Target) -> Step:
    """Return the search that `kerasdefense.evaluate` runs: one compiled step, driven from Python by a pool of slots.

    The clean logits are given, which an evaluation asks for once for all its attacks; images that are wrong clean are
    left out. All the others are attacked at once, and those that fall leave.
    """
    count = len(target.label)

    def path(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return target.model(image, training=False)

    search = Search(budget.planned, "exact", path, stream=0, seed=0, chunk_size=count)
    exact = ExactPath(path, seed=0, chunk_size=count)
    chunk = Chunk(target.image, target.label, np.arange(count, dtype=np.int32))
    logits = exact.logits(chunk)
    standing = np.flatnonzero(np.argmax(logits, axis=1) == target.label)

    def run(rows: np.ndarray) -> np.ndarray:
        pool = Pool(search, chunk, logits, rows, exact)
        while not pool.finished:
            pool.advance()
        image_adv = target.image.copy()
        image_adv[rows] = pool.image_adv
        return image_adv

    def step() -> np.ndarray:
        return run(standing)

    run(standing[:1])  # traced to its last step; functions take any number of images
    return step


def one_graph(budget: Budget, target: Target) -> Step:
    """Return the same attack called within a function of the user's own, compiled as a whole."""
    attack, objective = budget.planned.attack, OBJECTIVES[budget.planned.objective]
    seed = seeds.per_example(0, 0, tf.range(len(target.label)))

    @tf.function
    def craft(image: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
        path = share_pass(lambda each, _: target.model(each, training=False))

        def logits_fn(each: tf.Tensor) -> tf.Tensor:
            return path(each, seed)

        return attack(objective(logits_fn), image, {"label": label}, seed, misclassified(logits_fn)).image

    def step() -> np.ndarray:
        return craft(tf.constant(target.image), tf.constant(target.label)).numpy()

    step()
    return step


def measure_attack(case: AttackCase, rounds: int) -> Measurement:
    """Time an attack by ours and by the other libraries in turns, all of them warm, on images that do not fall.

    Raises:
        InputError: an image fell, and whoever stopped there did less work than the others.
    """
    budget, target = case.budget, case.make_target()
    steps: dict[str, Step] = {EVALUATION: evaluation(budget, target), **attack_peers(budget, target)}
    if case.kind == "pgd":
        steps[ONE_GRAPH] = one_graph(budget, target)
        if has_art():
            steps[ART_NUMPY] = art_in_numpy(budget, target)
    found: dict[str, np.ndarray] = {}

    def keeping(name: str) -> Step:
        def step() -> None:
            found[name] = steps[name]()

        return step

    timing = time_in_turns({name: keeping(name) for name in steps}, min(rounds, case.rounds))
    check_equal_work(target, found)
    return Measurement(timing, {})


def check_equal_work(target: Target, found: Mapping[str, np.ndarray]) -> None:
    """Raise an InputError where a contender moved an image to another class."""
    for name, image in found.items():
        fallen = int((~target.is_right(image)).sum())
        if fallen:
            raise InputError(f"{name} fooled {fallen} of {len(image)} images that must not fall: work was not equal")


def rows_of_attack(case: AttackCase, measurement: Measurement) -> list[Row]:
    """Return the figures of a case; `times_...` is how many times as long the others take, ART by its faster PGD.

    cleverhans, which neither looks who has fallen nor tries the last point, is compared with the attack in one graph.
    """
    timing = measurement.timing
    found = {
        "ours_ms": timing.milliseconds(EVALUATION),
        "images_per_second": 1000 * case.model.batch_size / timing.milliseconds(EVALUATION),
        "one_graph_ms": timing.milliseconds(ONE_GRAPH) if ONE_GRAPH in timing.seconds else None,
    }
    alike = ONE_GRAPH if ONE_GRAPH in timing.seconds else EVALUATION
    found |= {**_times(timing, "cleverhans", "cleverhans", alike), **_times(timing, "Foolbox", "foolbox")}
    variants = [name for name in (ART, ART_NUMPY) if name in timing.seconds]
    return [
        {"strategy": EVALUATION, **found, **_times(timing, min(variants, key=timing.milliseconds, default=ART), "art")}
    ]


def _times(timing: Timing, name: str, key: str, ours: str = EVALUATION) -> Row:
    if name not in timing.seconds:
        return {f"times_{key}": None, f"times_{key}_processor": None}
    return {
        f"times_{key}": timing.ratio(name, ours),
        f"times_{key}_processor": timing.processor_ratio(name, ours),
    }
