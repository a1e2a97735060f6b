"""python -m pipelines.evaluate --model=PATH --examples=DIR: the evaluation of one process, spread over Beam's workers.

    python -m pipelines.evaluate --model=saved_models/pgd_at_cifar10_mini --examples=DIR --output=DIR \
        [--evaluate_suite=autoattack and other flags of kerasdefense.run] [any of Beam's pipeline options]

Without Beam's options the workers are processes of this machine, one for each processor. What they found stays in
OUTPUT/shards: after a kill the same command goes on from there. With a runner whose workers are on other machines,
--model, --examples and --shards are URLs that they can reach.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple

import tensorflow as tf
from rich.console import Console

from kerasdefense import assess, config, data, evaluation, flags
from kerasdefense.boundary import guarded
from kerasdefense.data import Splits
from kerasdefense.data.examples import split_folders
from kerasdefense.evaluation import Loaded, preprocessing
from kerasdefense.evaluation.robustness import Course, first_block
from kerasdefense.files import write_json
from kerasdefense.types import InputError, UsageError
from pipelines import jobs
from pipelines.blocks import Task, attack_blocks, local
from pipelines.shards import Shards

SHARDS, WORK = "shards", "work.json"


class Workers(NamedTuple):
    """Who attacks, and where what they found is kept.

    Attributes:
        pipeline_of: returns a Beam pipeline.
        threads: TensorFlow's threads in a worker; 0 = its own choice.
        shards: folder that they write to.
    """

    pipeline_of: Callable[[], Any]
    threads: int
    shards: str


class Found(NamedTuple):
    """What an evaluation found, and how its work went: blocks, attacked, seconds, start_up."""

    results: dict[str, Any]
    work: dict[str, Any]


def evaluate(run: config.Run, splits: Splits, model: Loaded, files: Sequence[str], workers: Workers) -> Found:
    """Measure a model as `assess.assess` does, with the suite's attacks run by Beam's workers.

    Args:
        run: the run; `evaluate.model` says where workers find the model.
        splits: the data, read from examples.
        model: the same model, for all that is done here.
        files: patterns of the files that hold the test images as tf.Examples with image, label and index.
        workers: who attacks.
    """
    work: dict[str, Any] = {}

    def ahead(course: Course) -> None:
        task = _task(run, splits, course, workers)
        digest = hashlib.sha256(task.index.astype("<i8").tobytes()).hexdigest()
        settings = {**course.settings(), "images": digest}
        anew = run.evaluate.resume == "never"
        work.update(attack_blocks(task, files, workers.pipeline_of, anew=anew, settings=settings))
        journal, shards = course.journal(), Shards(workers.shards)
        for number in range(work["blocks"]):
            journal.finish_block(number, shards.read(number))

    size = run.evaluate.block or run.evaluate.chunk_size
    run = dataclasses.replace(run, evaluate=dataclasses.replace(run.evaluate, block=size))
    surrogates = assess.load_surrogates(run.evaluate.surrogates, local)
    return Found(assess.assess(run, splits, model, surrogates=surrogates, ahead=ahead), work)


def _task(run: config.Run, splits: Splits, course: Course, workers: Workers) -> Task:
    if run.evaluate.minutes:
        raise UsageError("--evaluate_minutes does not go with workers, which nobody stops: leave it out")
    matches = any(search.matches for search in course.searches)
    batches = splits.test.batches(run.evaluate.chunk_size)
    return Task(
        wanted=run.evaluate,
        suite=course.suite,
        options=dataclasses.replace(course.options, journal=None, progress=False),
        image_shape=splits.image_shape,
        index=splits.test.index[: course.options.examples or None],
        references=first_block(batches, course.options) if matches else None,
        threads=workers.threads,
        shards=workers.shards,
    )


def work_line(work: dict[str, Any], images: int) -> str:
    """Return what to print of the work on so many images: how fast it went, and what it took before."""
    if not work["attacked"]:
        return f"attacks: all {work['blocks']} blocks were there already"
    share = images * work["attacked"] / work["blocks"]
    line = f"attacks: {share / max(work['seconds'], 1e-9):.1f} images/s, {work['seconds']:.1f} s in workers"
    line += f" after {work['start_up']:.1f} s of start-up"
    rest = work["blocks"] - work["attacked"]
    return f"{line}; {rest} of {work['blocks']} blocks were there already" if rest else line


def check_keyed(files: Sequence[str]) -> None:
    """Raise an InputError unless examples are numbered, as outcomes and random draws are keyed by their numbers."""
    paths = sorted(path for pattern in files for path in tf.io.gfile.glob(pattern))
    for path in paths[:1]:
        compression = "GZIP" if path.endswith(".gz") else ""
        for record in tf.data.TFRecordDataset(path, compression).take(1):
            if "index" not in tf.train.Example.FromString(record.numpy()).features.feature:
                raise InputError(
                    f"{path}: its examples have no feature index, their number in the data set, by which outcomes are "
                    "keyed; python -m pipelines.examples writes it"
                )


def _parser() -> jobs.Parser:
    parser = jobs.Parser("python -m pipelines.evaluate", __doc__)
    parser.add_argument("--model", required=True, help="a run's or published folder, a .keras file or a SavedModel")
    parser.add_argument("--examples", required=True, help="folder that python -m pipelines.examples wrote")
    parser.add_argument(
        "--output", default="", help="folder of this machine for what is found; empty = runs/evaluated/MODEL"
    )
    parser.add_argument("--shards", default="", help="folder or URL that workers write to; empty = OUTPUT/shards")
    parser.add_argument(
        "--threads", type=int, default=1, help="TensorFlow's threads in a worker process; 0 = its own choice"
    )
    return parser


def of_package(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide arguments into those that are flags of kerasdefense.run, and the rest."""
    names = flags.names()
    kept: list[str] = []
    rest: list[str] = []
    for each in arguments:
        name = each.lstrip("-").partition("=")[0]
        (kept if {name, name.removeprefix("no")} & names else rest).append(each)
    return kept, rest


def _check_reachable(own: argparse.Namespace, run: config.Run) -> None:
    """Raise a UsageError where something that workers on other machines need lies on this one."""
    needed = [("--model", own.model), ("--examples", own.examples), ("--shards", own.shards)]
    needed += [("--evaluate_surrogates", each) for each in run.evaluate.surrogates.split(",") if each]
    if Path(run.evaluate.preprocessor).is_file() or "/" in run.evaluate.preprocessor:
        needed.append(("--evaluate_preprocessor", run.evaluate.preprocessor))
    for flag, place in needed:
        if "://" not in place:
            raise UsageError(
                f"{flag}={place} is not where workers on other machines find it: name a URL that they can reach, as "
                "gs://BUCKET/..., or file:///... on a disk that all of them share"
            )


def main(arguments: Sequence[str]) -> int:
    """Evaluate, print what was found and return the exit code."""
    own, rest = _parser().parse_known_args(arguments)
    ours, rest = of_package(rest)
    of_beam = jobs.beam_arguments(rest)
    if own.threads < 0:
        raise UsageError(f"--threads={own.threads} must be at least 0")
    given = ["--data_name=examples", f"--data_dir={own.examples}", *ours]
    given += ["--mode=evaluate", f"--evaluate_model={own.model}", *([f"--run_dir={own.output}"] if own.output else [])]
    run = flags.parse(given)
    if run.evaluate.endpoint:
        raise UsageError("--evaluate_endpoint is attacked by kerasdefense.run; workers attack a model that they load")
    if ":/" in run.run_dir:  # a URL, as a path
        raise UsageError(
            f"--output={own.output or run.run_dir} must be a folder of this machine; --shards may be a URL"
        )
    if jobs.is_remote(of_beam):
        _check_reachable(own, run)
    console = Console()
    splits = data.load(run.data)
    files = [f"{split_folders(own.examples)['eval']}/*"]
    check_keyed(files)
    model = evaluation.load_model(local(own.model), outputs=run.evaluate.outputs)
    evaluation.check_fits(model, splits.image_shape, len(splits.labels), splits.name)
    if run.evaluate.preprocessor:
        model = preprocessing.preprocessed(model, preprocessing.preprocessor(str(local(run.evaluate.preprocessor))))
    threads = own.threads if jobs.is_multi_processing(of_beam) else 0
    shards = own.shards or str(Path(run.run_dir) / SHARDS)
    workers = Workers(lambda: jobs.make_pipeline(of_beam), threads, shards)
    found = evaluate(run, splits, model, files, workers)
    assess.show(found.results, f"{model.name} on {splits.name}", console)
    write_json(Path(run.run_dir) / WORK, found.work)
    images = found.results["clean_accuracy"]["n"]
    console.print(work_line(found.work, images), markup=False, highlight=False, soft_wrap=True)
    console.print(Path(run.run_dir) / assess.REPORT, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:]), verbosity=flags.verbosity(sys.argv[1:])))
