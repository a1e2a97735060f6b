"""Robust accuracy: the share of images that no attack on any path moves to another class.

Images stream through in blocks, so memory does not grow with their number. Every candidate image is scored again
through the path `exact`, whichever path it was found on; an image counts as robust when it is right clean and after
every attack.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import numpy as np
import tensorflow as tf

from kerasdefense.attacks import FEATURE_DISTANCE
from kerasdefense.evaluation.block import Block
from kerasdefense.evaluation.journal import Arrays, Journal
from kerasdefense.evaluation.outcomes import Outcomes, collect, write_outcomes
from kerasdefense.evaluation.references import References
from kerasdefense.evaluation.search import FEATURES, FRESH_DRAWS, Chunk, ExactPath, Search
from kerasdefense.evaluation.suites import PlannedAttack
from kerasdefense.types import InputError, LogitsFn, PathFn, UsageError

_BLOCK, _BLOCK_BYTES = 1024, 1 << 28


@dataclasses.dataclass(frozen=True)
class Options:
    """How images are attacked.

    Attributes:
        examples: how many images to take from the start; 0 = all.
        chunk_size: images attacked at once.
        block: images that go through all attacks before the next ones come; 0 = as many as memory allows.
        seed: seed of the attacks.
        cascade: whether an attack only meets images that stand after those before it.
        is_randomised: whether the model draws at random, so that its answer is taken from several draws.
        minutes: after which to stop, with what stands then as an upper bound; 0 = never.
        progress: whether to show a progress bar.
        journal: folder for what an evaluation needs to go on after it was stopped; None = it cannot.
        model: what tells the model from others, a digest for instance.
        snapshot_seconds: how often the journal is written while an attack runs.
    """

    examples: int = 0
    chunk_size: int = 256
    block: int = 0
    seed: int = 0
    cascade: bool = False
    is_randomised: bool = False
    minutes: float = 0.0
    progress: bool = False
    journal: Optional[Path] = None
    model: str = ""
    snapshot_seconds: float = 30.0


class Measured(NamedTuple):
    """Who survived which search, whether all came to their end, and the journal that holds the images."""

    outcomes: Outcomes
    searches: tuple[Search, ...]
    cascade: bool
    complete: bool
    journal: Journal


@dataclasses.dataclass(frozen=True, eq=False)
class Course:
    """What every image goes through: the attacks on all paths, in order, and the path that judges.

    Attributes:
        exact: judges images.
        searches: the attacks on their paths.
        options: how images are attacked.
        suite: what was planned.
    """

    exact: ExactPath
    searches: tuple[Search, ...]
    options: Options
    suite: tuple[PlannedAttack, ...]

    def settings(self) -> dict[str, Any]:
        """Return what the outcomes depend on besides the data."""
        attacks = [
            [each.name, type(each.attack).__name__, each.attack.get_config(), *each.planned[2:5], each.planned.alone]
            for each in self.searches
        ]
        kept = ("examples", "chunk_size", "block", "seed", "cascade", "is_randomised")
        settings = {name: getattr(self.options, name) for name in kept}
        return {"model": self.options.model, "suite": attacks, **settings, "tensorflow": tf.__version__}

    def journal(self) -> Journal:
        """Open the journal of this course, in the folder of its options."""
        return Journal(self.options.journal, self.settings(), seconds=self.options.snapshot_seconds)

    def block(self, chunk: Chunk, references: References, *, first: int) -> Block:
        """Return images that `first` others came before, about to be attacked."""
        cascade = self.options.cascade
        return Block(chunk, self.exact, self.searches, first=first, cascade=cascade, references=references)


class _Expired(Exception):  # noqa: N818 - nothing went wrong
    """The time is up."""


def measure(
    attack_paths: Mapping[str, PathFn],
    dataset: tf.data.Dataset,
    suite: Sequence[PlannedAttack],
    options: Options,
    *,
    features: Optional[LogitsFn] = None,
    class_activation: Optional[LogitsFn] = None,
    save: Optional[Path] = None,
    ahead: Optional[Callable[[Course], None]] = None,
) -> Measured:
    """Run every attack of a suite on every path and return who survived.

    Args:
        attack_paths: `{name: fn(image, seed) -> logits}`, with `exact` among the names; those of surrogates begin with
            `surrogate:` and are met by attacks that transfer, the others by those that do not.
        dataset: batches of dicts with image float32 [n, h, w, c] in [0, 1], label int32 [n] and index int32 [n].
        suite: the attacks.
        options: how they are run.
        features: `features(image) -> [n, d]`, what enters the last layer; without it features are not matched.
        class_activation: `class_activation(image) -> [n, h, w, c]`, the class activation features of the exact path;
            without it no attack goes away from them.
        save: .npz file that receives, per example, the worst image found and every outcome; needs a journal.
        ahead: called before anything is attacked here; it may put blocks that were attacked elsewhere in the journal.

    Raises:
        InputError: no images, images outside [0, 1] or not finite, labels out of range, outputs that are no logits, or
            a journal of another evaluation.
    """
    told = {"features": features, "class_activation": class_activation}
    course = make_course(attack_paths, suite, options, **told)
    if ahead is not None:
        ahead(course)
    journal = course.journal()
    unfinished = _Run(course, journal).all_blocks(dataset)
    rest = [] if unfinished is None else [unfinished]
    outcomes = collect(itertools.chain(journal.blocks(), rest))
    if save is not None:
        images = (block["image_adv"] for block in itertools.chain(journal.blocks(), rest))
        write_outcomes(save, [each.name for each in course.searches], outcomes, images)
    return Measured(outcomes, course.searches, options.cascade, unfinished is None, journal)


def make_course(
    attack_paths: Mapping[str, PathFn],
    suite: Sequence[PlannedAttack],
    options: Options,
    *,
    features: Optional[LogitsFn] = None,
    class_activation: Optional[LogitsFn] = None,
) -> Course:
    """Return what images go through, for arguments as `measure` takes them."""
    draws = FRESH_DRAWS if options.is_randomised else 1
    exact = ExactPath(attack_paths["exact"], seed=options.seed, chunk_size=options.chunk_size, draws=draws)
    planned = [(each, name) for each in suite for name in attack_paths if each.is_for(name)]
    told = {FEATURES: features, FEATURE_DISTANCE: class_activation}
    settings: dict[str, Any] = {"seed": options.seed, "chunk_size": options.chunk_size}
    settings |= {"features": features, "class_activation": class_activation}
    searches = tuple(
        Search(each, name, attack_paths[name], stream=stream, **settings)
        for stream, (each, name) in enumerate(planned)
        if told.get(each.objective, each) is not None
    )
    if not searches:
        raise UsageError("an evaluation needs at least one attack; transfer attacks need a surrogate")
    return Course(exact, searches, options, tuple(suite))


class _Run:
    """Blocks of images, one after the other, through all searches."""

    def __init__(self, course: Course, journal: Journal) -> None:
        self.course = course
        self.options = options = course.options
        self.journal = journal
        self.deadline = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")

    def all_blocks(self, dataset: tf.data.Dataset) -> Optional[Arrays]:
        """Attack all blocks that are not in the journal; return the one at work if the time is up before the end."""
        current, classes, seen = self.journal.current(), 0, 0
        references = References(self.course.exact, lambda: first_block(dataset, self.options))
        for number, chunk in enumerate(in_blocks(dataset, self.options)):
            known = self.journal.block(number)
            if known is not None:
                _check_same(str(known["digest"]), chunk)
                seen += len(chunk.label)
                continue
            classes = classes or self.course.exact.check(chunk)
            check_labels(chunk, classes)
            block = self.course.block(chunk, references, first=seen)
            # One that was killed after its block was stored, and before it was removed, is of an earlier block.
            if current is not None and int(current["first"]) == seen:
                _check_same(str(current["digest"]), chunk)
                block.from_arrays(current)
            current = None
            try:
                block.attack(functools.partial(self._watch, block), progress=self.options.progress)
            except _Expired:
                self._store(block)
                return block.outcome()
            self.journal.finish_block(number, finished(block))
            seen += len(chunk.label)
        if not seen:
            raise InputError("there are no test images to evaluate on")
        return None

    def _watch(self, block: Block) -> None:
        if time.monotonic() >= self.deadline:
            raise _Expired
        if self.journal.is_due:
            self._store(block)

    def _store(self, block: Block) -> None:
        what = {"digest": np.array(_digest(block.chunk)), "first": np.array(block.first)}
        self.journal.write_current({**block.to_arrays(), **what})


def in_blocks(dataset: tf.data.Dataset, options: Options) -> Iterator[Chunk]:
    """Yield the examples of a dataset, checked, in blocks of the size asked for, or as large as memory allows."""
    elements = dataset.unbatch()
    elements = elements.take(options.examples) if options.examples else elements
    image_bytes = max((each["image"].nbytes for each in elements.take(1).as_numpy_iterator()), default=1)
    for batch in elements.batch(options.block or largest_block(image_bytes, options)).as_numpy_iterator():
        yield checked(batch)


def largest_block(image_bytes: int, options: Options) -> int:
    """Return how many images of so many bytes go through all attacks together where nothing else is asked for."""
    return max(options.chunk_size, min(_BLOCK, _BLOCK_BYTES // image_bytes))


def first_block(dataset: tf.data.Dataset, options: Options) -> Chunk:
    """Return the first images, as many as memory allows: what attacks that match another image choose from."""
    return next(in_blocks(dataset, dataclasses.replace(options, block=0)))


def finished(block: Block) -> Arrays:
    """Return what the journal keeps of a block that is through."""
    return {**block.outcome(), "digest": np.array(_digest(block.chunk))}


def checked(batch: Mapping[str, np.ndarray]) -> Chunk:
    """Return a batch as a chunk, or raise an InputError that names an image outside [0, 1]."""
    chunk = Chunk(batch["image"].astype(np.float32), batch["label"].astype(np.int32), batch["index"].astype(np.int32))
    flat = chunk.image.reshape(len(chunk.label), -1)
    bad = ~((flat >= 0) & (flat <= 1)).all(axis=1)
    if bad.any():
        where = chunk.index[bad][0]
        raise InputError(f"test image {where} has pixels that are NaN or outside [0, 1]; scale images to [0, 1]")
    return chunk


def _digest(chunk: Chunk) -> str:
    return hashlib.sha256(chunk.image.tobytes() + chunk.label.tobytes() + chunk.index.tobytes()).hexdigest()


def _check_same(digest: str, chunk: Chunk) -> None:
    if digest != _digest(chunk):
        raise InputError("the evaluation that was begun saw other images; --evaluate_resume=never begins anew")


def check_labels(chunk: Chunk, classes: int) -> None:
    """Raise an InputError that names an image whose label is none of 0 .. classes - 1."""
    bad = (chunk.label < 0) | (chunk.label >= classes)
    if bad.any():
        where, label = chunk.index[bad][0], chunk.label[bad][0]
        raise InputError(f"test image {where} has label {label}, but the model has classes 0 to {classes - 1}")
