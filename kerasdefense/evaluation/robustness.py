"""Robust accuracy: the share of images that no attack on any path moves to another class.

Images stream through in chunks of one fixed size, so memory does not grow with their number. Every candidate image is
scored again through the path `exact`, whichever path it was found on; an image counts as robust when it is right
clean and after every attack.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from kerasdefense.evaluation.outcomes import OutcomeWriter
from kerasdefense.evaluation.report import accuracy_interval
from kerasdefense.evaluation.search import Chunk, ExactPath, Search
from kerasdefense.evaluation.suites import PlannedAttack
from kerasdefense.types import InputError, PathFn, UsageError


def evaluate(
    attack_paths: Mapping[str, PathFn],
    batches: tf.data.Dataset,
    suite: Sequence[PlannedAttack],
    *,
    examples: int = 0,
    chunk_size: int = 256,
    seed: int = 0,
    progress: bool = False,
    save: Optional[Path] = None,
) -> dict[str, Any]:
    """Measure clean and robust accuracy.

    Args:
        attack_paths: `{name: fn(image, seed) -> logits}`, with `exact` among the names.
        batches: dataset of dicts with image float32 [n, h, w, c] in [0, 1], label int32 [n] and index int32 [n].
        suite: attacks to run on every path, all of one norm and radius.
        examples: how many images to take from the start of `batches`; 0 = all.
        chunk_size: images attacked at once.
        seed: seed of the attacks.
        progress: whether to show a progress bar.
        save: .npz file that receives, per example, the worst image found and every outcome.

    Returns:
        `clean_accuracy` and `robust_accuracy` as `{value, n, ci95}`, and `attacks`, one entry per attack and path with
        the accuracy it leaves alone (`accuracy`) and with all before it (`cascaded_accuracy`).

    Raises:
        InputError: no images, images outside [0, 1] or not finite, labels out of range, or outputs that are no logits.
        UsageError: no path `exact`, an empty suite, or an illegal chunk size.
    """
    if not suite:
        raise UsageError("an evaluation needs at least one attack; give it a suite")
    if "exact" not in attack_paths:
        raise UsageError(
            f"an evaluation needs the path 'exact', the whole defended path; given: {sorted(attack_paths)}"
        )
    if chunk_size < 1 or examples < 0:
        raise UsageError(f"chunk_size must be at least 1 and examples at least 0, not {chunk_size} and {examples}")
    exact = ExactPath(attack_paths["exact"], seed=seed, chunk_size=chunk_size)
    searches = [
        Search(planned, name, path, stream=number, seed=seed, chunk_size=chunk_size)
        for number, (planned, name, path) in enumerate(
            (planned, name, path) for planned in suite for name, path in attack_paths.items()
        )
    ]
    writer = OutcomeWriter([f"{search.name}:{search.path_name}" for search in searches], save)
    bar = tqdm(total=examples or None, unit="image", disable=not progress, desc="attacks", leave=False)
    classes = 0
    with writer, bar:
        for chunk in _chunks(batches, chunk_size, examples):
            _check_images(chunk)
            classes = classes or exact.classes(chunk)
            _check_labels(chunk, classes)
            _attack(chunk, exact, searches, writer)
            bar.update(len(chunk.label))
            bar.set_postfix(clean=f"{writer.clean.mean():.3f}", robust=f"{writer.robust.mean():.3f}")
        if not writer.examples:
            raise InputError("there are no test images to evaluate on")
    return _summary(searches, writer)


def _attack(chunk: Chunk, exact: ExactPath, searches: Sequence[Search], writer: OutcomeWriter) -> None:
    """Run every search on the rightly classified images of a chunk and record the outcomes."""
    clean = exact.is_right(chunk)
    worst, standing = chunk.image.copy(), clean.copy()
    survived = []
    for search in searches:
        started = time.perf_counter()
        alone = clean.copy()
        for restart in range(search.attack.restarts):
            rows = np.flatnonzero(alone)
            if not rows.size:
                break
            found = search.candidates(chunk.rows(rows), restart)
            worst[rows] = np.where(standing[rows, None, None, None], found, worst[rows])
            alone[rows] = exact.is_right(dataclasses.replace(chunk.rows(rows), image=found))
            standing &= alone
        search.seconds += time.perf_counter() - started
        survived.append(alone)
    writer.add(chunk.index, chunk.label, worst, clean=clean, survived=np.stack(survived, axis=1))


def _chunks(batches: tf.data.Dataset, chunk_size: int, examples: int) -> Iterator[Chunk]:
    """Yield the first `examples` elements of a batched dataset in chunks of `chunk_size`."""
    elements = batches.unbatch()
    elements = elements.take(examples) if examples else elements
    for batch in elements.batch(chunk_size).prefetch(1).as_numpy_iterator():
        yield Chunk(
            batch["image"].astype(np.float32),
            batch["label"].astype(np.int32),
            batch["index"].astype(np.int32),
        )


def _check_images(chunk: Chunk) -> None:
    flat = chunk.image.reshape(len(chunk.label), -1)
    bad = ~((flat >= 0) & (flat <= 1)).all(axis=1)
    if bad.any():
        where = chunk.index[bad][0]
        raise InputError(f"test image {where} has pixels that are NaN or outside [0, 1]; scale images to [0, 1]")


def _check_labels(chunk: Chunk, classes: int) -> None:
    bad = (chunk.label < 0) | (chunk.label >= classes)
    if bad.any():
        where, label = chunk.index[bad][0], chunk.label[bad][0]
        raise InputError(f"test image {where} has label {label}, but the model has classes 0 to {classes - 1}")


def _summary(searches: Sequence[Search], writer: OutcomeWriter) -> dict[str, Any]:
    attacks = []
    cascade = writer.clean.copy()
    for column, search in enumerate(searches):
        survived = writer.survived[:, column]
        cascade &= survived
        attack = search.attack
        attacks.append(
            {
                "name": search.name,
                "path": search.path_name,
                "objective": search.objective,
                "threat_model": {"norm": attack.norm, "epsilon": attack.epsilon},
                "accuracy": float(survived.mean()),
                "ci95": accuracy_interval(survived)["ci95"],
                "cascaded_accuracy": float(cascade.mean()),
                "seconds": round(search.seconds, 3),
                "settings": attack.get_config(),
            }
        )
    return {
        "clean_accuracy": accuracy_interval(writer.clean),
        "robust_accuracy": accuracy_interval(writer.robust),
        "attacks": attacks,
    }
