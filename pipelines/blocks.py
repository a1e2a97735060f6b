"""Blocks of images, attacked by the workers of a Beam pipeline as an evaluation in one process attacks them.

An image belongs to the block of its place in the data set. A worker loads the model once, runs the whole suite on one
block after the other and writes each block's outcomes to a shard under its number, where it is not there already. So a
bundle that is processed twice changes nothing, and a run that was stopped goes on. What goes wrong in a worker is noted
beside the shards in one line.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import logging
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
import tensorflow as tf

from kerasdefense import assess, config, evaluation
from kerasdefense.boundary import first_line
from kerasdefense.data import Split
from kerasdefense.data.records import Records, decode
from kerasdefense.evaluation import Options, PlannedAttack, preprocessing
from kerasdefense.evaluation.evaluate import shaped
from kerasdefense.evaluation.journal import Arrays
from kerasdefense.evaluation.references import References
from kerasdefense.evaluation.robustness import Course, check_labels, checked, finished, make_course
from kerasdefense.evaluation.search import Chunk
from kerasdefense.types import InputError, UsageError
from pipelines.jobs import beam, watched
from pipelines.shards import Shards

_TIMES = ("began", "ended")
"""When a worker began and ended a block, in seconds of the epoch, as arrays beside its outcomes."""


@dataclasses.dataclass(frozen=True, order=True)
class Row:
    """An example: its number in the data set, its label and its encoded image."""

    index: int
    label: int
    image: bytes


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What a worker must know.

    Attributes:
        wanted: says which model it is, with what in front of it, and which surrogates.
        suite: the attacks.
        options: how images are attacked; `block` says how many make a block.
        image_shape: (height, width, channels) of decoded images.
        index: int [n], ascending, of all images of the evaluation.
        references: images that attacks match, where one does.
        threads: TensorFlow's threads in a worker; 0 = its own choice.
        shards: folder of the outcomes.
    """

    wanted: config.Evaluate
    suite: tuple[PlannedAttack, ...]
    options: Options
    image_shape: tuple[int, int, int]
    index: np.ndarray
    references: Optional[Chunk]
    threads: int
    shards: str


class Attacker:
    """The model and the attacks in a worker's memory."""

    def __init__(self, task: Task) -> None:
        self._task = task
        if task.threads:
            tf.config.threading.set_intra_op_parallelism_threads(task.threads)
            tf.config.threading.set_inter_op_parallelism_threads(task.threads)
        wanted = task.wanted
        self._model = evaluation.load_model(local(wanted.model), outputs=wanted.outputs)
        if wanted.preprocessor:
            purifier = preprocessing.preprocessor(str(local(wanted.preprocessor)))
            self._model = preprocessing.preprocessed(self._model, purifier)
        self._paths = assess.paths_of(self._model, assess.load_surrogates(wanted.surrogates, local))

    @functools.cached_property
    def _course(self) -> Course:
        few = self._few
        paths, self._classes = shaped(self._paths, few, self._task.options)
        told: dict[str, Any] = {"features": self._model.features, "class_activation": self._model.class_activation}
        return make_course(paths, self._task.suite, self._task.options, **told)

    @functools.cached_property
    def _references(self) -> References:
        return References(self._course.exact, self._read_references)

    def _read_references(self) -> Chunk:
        assert self._task.references is not None  # only where an attack matches, for which they were sent along
        return self._task.references

    def attack(self, number: int, rows: Iterable[Row]) -> Arrays:
        """Return the outcomes of a block, whatever the order of its rows, and when it was at work."""
        began = time.time()
        chunk = decoded(sorted(rows), self._task.image_shape)
        self._few = chunk.rows(np.arange(min(len(chunk.label), 64)))
        course = self._course
        check_labels(chunk, self._classes)
        block = course.block(chunk, self._references, first=number * self._task.options.block)
        block.attack(lambda: None)
        return {**finished(block), "began": np.array(began), "ended": np.array(time.time())}


def decoded(rows: Sequence[Row], image_shape: tuple[int, int, int]) -> Chunk:
    """Return examples as images, by the very stream that an evaluation in one process reads."""
    images = tf.constant([row.image for row in rows])
    label = np.array([row.label for row in rows], np.int32)
    records = Records(
        label,
        lambda: tf.data.Dataset.from_tensor_slices(images),
        lambda record: decode(record, image_shape, resize=True),
        lambda place: f"example {rows[place].index}",
    )
    split = Split(records, np.arange(len(rows)), label, image_shape, "none")
    batch = next(split.batches(len(rows)).as_numpy_iterator())
    return checked({**batch, "index": np.array([row.index for row in rows], np.int32)})


def local(path: str) -> Path:
    """Return a path of this machine that holds what `path` does, which may be a URL.

    Then it is a copy, there until the process ends, whose last two names are those of the URL, as models are called by.
    """
    if "://" not in path:
        return Path(path).expanduser()
    parent = tempfile.mkdtemp(prefix="kerasdefense-model-")
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    target = Path(parent, *path.partition("://")[2].strip("/").split("/")[-2:])
    target.parent.mkdir(exist_ok=True)
    if not tf.io.gfile.isdir(path):
        tf.io.gfile.copy(path, str(target))
        return target
    for folder, _, files in tf.io.gfile.walk(path):
        place = target / folder[len(path) :].strip("/")
        place.mkdir(parents=True, exist_ok=True)
        for file in files:
            tf.io.gfile.copy(f"{folder.rstrip('/')}/{file}", str(place / file))
    return target


class AttackBlocks(beam.DoFn):
    """Attack blocks (number, rows) and store their outcomes; the model is loaded once in a worker process.

    An error does not leave it, as Beam would tell of it at length: it is noted among the shards under the block's
    number, and blocks that come after it are passed over.

    Args:
        task: what is to be done.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._shared = beam.utils.shared.Shared()

    def setup(self) -> None:
        """Load the model, unless another copy of this has in the process."""
        self._failed: Optional[Exception] = None
        self._is_noted = False
        try:
            self._attacker = self._shared.acquire(lambda: Attacker(self._task))
        except Exception as error:  # whatever it is, it is noted with the first block
            self._failed = error

    def process(self, element: tuple[int, Iterable[Row]]) -> Iterator[int]:
        """Yield the number of a block that is through, or was passed over."""
        number, rows = element
        shards = Shards(self._task.shards)
        if self._failed is None and not shards.has(number):
            try:
                shards.write(number, self._attacker.attack(number, rows))
            except Exception as error:  # whatever it is
                self._failed = error
        if self._failed is not None and not self._is_noted:
            logging.getLogger(__name__).info("block %d", number, exc_info=self._failed)
            with contextlib.suppress(OSError):  # no room for this either: the block is missing in the end
                shards.fail(number, in_words(self._failed))
            self._is_noted = True
        yield number


def in_words(error: Exception) -> str:
    """Return an error in one line: what it says, and its type unless it is one of ours."""
    if isinstance(error, (InputError, UsageError)):
        return " ".join(str(error).split())
    return f"{type(error).__name__}: {first_line(error)}"


def parsed(record: bytes) -> Row:
    """Return a serialised tf.Example with features image, label and index as a row."""
    feature = tf.train.Example.FromString(record).features.feature
    return Row(
        feature["index"].int64_list.value[0], feature["label"].int64_list.value[0], feature["image"].bytes_list.value[0]
    )


def placed(row: Row, index: np.ndarray, size: int, missing: frozenset[int]) -> Iterator[tuple[int, Row]]:
    """Yield a row with the number of its block, if that is still to be attacked."""
    place = int(np.searchsorted(index, row.index))
    if place < len(index) and index[place] == row.index and place // size in missing:
        yield place // size, row


def attack_blocks(
    task: Task, files: Sequence[str], pipeline_of: Callable[[], beam.Pipeline], *, anew: bool, settings: dict[str, Any]
) -> dict[str, Any]:
    """Attack, in a Beam pipeline, the blocks of a task that have no shard yet.

    Args:
        task: what is to be done.
        files: patterns of the TFRecord files that hold the examples.
        pipeline_of: returns the pipeline to run.
        anew: whether blocks that are there are attacked again.
        settings: what the outcomes depend on.

    Returns:
        What was done: `blocks` and `attacked` (their numbers), `seconds` from the first block's beginning to the last
        one's end, and `start_up`, seconds before that.

    Raises:
        InputError: shards of another evaluation, a block that a worker could not attack, or a worker that died.
    """
    shards = Shards(task.shards)
    shards.open(settings, anew=anew)
    blocks = -(-len(task.index) // task.options.block)
    missing = frozenset(number for number in range(blocks) if not shards.has(number))
    launched = time.time()
    if missing:
        _attack(task, files, pipeline_of, missing)
    for number, line in shards.failures():
        raise InputError(f"block {number}: {line}; the same command goes on from the shards in {task.shards}")
    still = [number for number in sorted(missing) if not shards.has(number)]
    if still:
        why = f"their examples are no longer in the files, or no worker could write to {task.shards}"
        raise InputError(f"blocks {still} were given no outcome: {why}")
    times = [{name: float(arrays[name]) for name in _TIMES} for arrays in map(shards.read, sorted(missing))]
    began = min((each["began"] for each in times), default=launched)
    ended = max((each["ended"] for each in times), default=launched)
    return {"blocks": blocks, "attacked": len(missing), "seconds": ended - began, "start_up": began - launched}


def _attack(
    task: Task, files: Sequence[str], pipeline_of: Callable[[], beam.Pipeline], missing: frozenset[int]
) -> None:
    """Run the pipeline that attacks the blocks which are missing."""
    with watched(f"the same command goes on from the shards in {task.shards}"), pipeline_of() as pipeline:
        _ = (
            pipeline
            | "Files" >> beam.Create([each.removeprefix("file://") for each in files])  # a scheme Beam does not know
            | "Read" >> beam.io.ReadAllFromTFRecord()
            | "Parse" >> beam.Map(parsed)
            | "Place" >> beam.FlatMap(placed, task.index, task.options.block, missing)
            | "Group" >> beam.GroupByKey()
            | "Attack" >> beam.ParDo(AttackBlocks(task))
        )
