"""python -m pipelines.local_runner --flagfile=FILE: the whole pipeline on this machine.

    python -m pipelines.local_runner --flagfile=configs/digits/pgd_at.cfg [--root=DIR] [--push_dir=DIR] [--examples=DIR]
        [flags of kerasdefense.run] [any of Beam's pipeline options]
    python -m pipelines.local_runner --flagfile=configs/digits/pgd_at.cfg --lineage

Runs of one root are runs of one pipeline: what has not changed is not done again, and a model is held against the last
one that was blessed. Exit code 3 where a model was not blessed and nothing was pushed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from absl import logging as absl_logging
from rich.console import Console
from tfx.orchestration.local.local_dag_runner import LocalDagRunner

from kerasdefense import assess, config, data, flags, recognition
from kerasdefense.boundary import guarded
from kerasdefense.export.saved_model import versions_of
from pipelines import jobs, lineage
from pipelines.artifacts import Images, images_in
from pipelines.evaluate import of_package
from pipelines.examples import write_examples
from pipelines.gate import check_gate
from pipelines.pipeline import Places, create_pipeline

METADATA, EXAMPLES, PUSHED, STATE = "metadata.sqlite", "examples", "pushed", "state"
_BEGINS = "Component %s is running."
"""What TFX logs of every step."""
NOT_BLESSED = 3
"""The exit code of a run that pushed nothing."""


def _parser() -> jobs.Parser:
    parser = jobs.Parser("python -m pipelines.local_runner", __doc__)
    parser.add_argument("--root", default="", help="folder of the pipeline; empty = runs/<data>/pipeline")
    parser.add_argument(
        "--examples", default="", help="folder that python -m pipelines.examples wrote; empty = write it from the data"
    )
    parser.add_argument("--push_dir", default="", help="folder that models are pushed to; empty = ROOT/pushed/DATA")
    parser.add_argument("--lineage", action="store_true", help="print what the metadata store knows, and run nothing")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the pipeline, print what became of the model, and return the exit code."""
    own, rest = _parser().parse_known_args(arguments)
    ours, rest = of_package(rest)
    beam_arguments = jobs.beam_arguments(rest) if rest else []  # else each component's own choice
    run = flags.parse([*ours, "--mode=all"])
    root = Path(own.root or f"runs/{run.data.name}/pipeline").expanduser().resolve()
    console = Console()
    if own.lineage:
        lineage.show(lineage.open_store(root / METADATA), console)
        return 0
    check_gate(run)
    assess.check(run)
    lineage.open_store(root / METADATA, new=True)
    if flags.verbosity(arguments) < 1:
        be_quiet()
    images = images_in(examples_of(run, own.examples, root))
    push = Path(own.push_dir or root / PUSHED / images.name).expanduser().resolve()
    there = tuple(str(number) for number in versions_of(push))
    places = Places(str(root / "artifacts"), str(push), str(root / STATE), there)
    pushed, verdict = execute(run, images, places, root / METADATA, beam_arguments)
    console.print(verdict, markup=False, highlight=False, soft_wrap=True)
    if pushed is None:
        return NOT_BLESSED
    console.print(f"pushed: {pushed}", markup=False, highlight=False, soft_wrap=True)
    return 0


def examples_of(run: config.Run, given: str, root: Path) -> Path:
    """Return the folder of a pipeline's examples, written from the run's data set where none is given."""
    if given:
        return Path(given).expanduser().resolve()
    splits = data.load(run.data)
    recognition.check(run, splits)
    return write_examples(splits, root / EXAMPLES).folder


def execute(
    run: config.Run, images: Images, places: Places, metadata_path: Path, beam_arguments: Sequence[str]
) -> tuple[Optional[str], str]:
    """Run the pipeline in this process; return where it pushed the model, None where it did not, and why.

    Models of other classes or image sizes are another pipeline's, also where they share its folders.
    """
    known = hashlib.sha256(json.dumps([images.labels, images.shape]).encode()).hexdigest()[:8]
    del sys.argv[1:]  # TFX's executors read them as flags of their own, and would miss files that ours include
    LocalDagRunner().run(
        create_pipeline(
            f"{images.name}-{known}",
            run,
            images,
            places,
            beam_arguments=beam_arguments,
            metadata_path=str(metadata_path),
        )
    )
    return lineage.outcome(lineage.open_store(metadata_path))


def be_quiet() -> None:
    """Let libraries tell of errors, and TFX of the step that begins; all else is in the artifacts."""
    os.environ["GRPC_VERBOSITY"] = "ERROR"
    logging.getLogger().setLevel(logging.ERROR)
    absl_logging.set_verbosity(absl_logging.INFO)

    def is_told(record: logging.LogRecord) -> bool:
        if record.msg == _BEGINS:
            print(f"{record.getMessage().split()[1]} ...", flush=True)
        return record.levelno > logging.ERROR  # an error is raised as well, and told once

    absl_logging.get_absl_logger().addFilter(is_told)


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:]), verbosity=flags.verbosity(sys.argv[1:])))
