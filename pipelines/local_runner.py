"""python -m pipelines.local_runner --flagfile=FILE: the whole pipeline on this machine.

    python -m pipelines.local_runner --flagfile=configs/digits/pgd_at.cfg [--root=DIR] [--push_dir=DIR] [--examples=DIR]
        [flags of kerasdefense.run] [any of Beam's pipeline options]
    python -m pipelines.local_runner --flagfile=configs/digits/pgd_at.cfg --lineage

Runs of one root are runs of one pipeline: what has not changed is not done again, and a model is held against the last
one that was blessed. Exit code 3 where a model was not blessed and nothing was pushed.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import logging as absl_logging
from rich.console import Console

from kerasdefense import config, flags
from kerasdefense.boundary import guarded
from pipelines import jobs, lineage
from pipelines.evaluate import of_package
from pipelines.gate import check_gate

METADATA, EXAMPLES, PUSHED, STATE = "metadata.sqlite", "examples", "pushed", "state"
NOT_BLESSED = 3
"""The exit code of a run that pushed nothing."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipelines.local_runner", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--root", default="", help="folder of the pipeline; empty = runs/<data>/pipeline")
    parser.add_argument(
        "--examples", default="", help="folder that python -m pipelines.examples wrote; empty = write it from the data"
    )
    parser.add_argument("--push_dir", default="", help="folder that models are pushed to; empty = ROOT/pushed")
    parser.add_argument("--lineage", action="store_true", help="print what the metadata store knows, and run nothing")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the pipeline, print what became of the model, and return the exit code."""
    own, rest = _parser().parse_known_args(arguments)
    ours, rest = of_package(rest)
    beam_arguments = jobs.beam_arguments(rest)
    run = flags.parse([*ours, "--mode=all"])
    root = Path(own.root or f"runs/{run.data.name}/pipeline").expanduser().resolve()
    console = Console()
    store = lineage.open_store(root / METADATA)
    if own.lineage:
        lineage.show(store, console)
        return 0
    check_gate(run)
    if flags.verbosity(arguments) < 1:
        be_quiet()
    images = examples_of(run, own.examples or str(root / EXAMPLES), may_write=not own.examples)
    push = str(Path(own.push_dir).expanduser().resolve()) if own.push_dir else str(root / PUSHED)
    return execute(run, images, root, push, beam_arguments, console)


def execute(
    run: config.Run, images: Images, places: Places, metadata_path: Path, beam_arguments: Sequence[str]
) -> tuple[Optional[str], str]:
    """Run the pipeline in this process; return where it pushed the model, None where it did not, and why."""
    name = Path(places.root).parent.name
    given = {"beam_arguments": beam_arguments, "metadata_path": str(metadata_path)}
    LocalDagRunner().run(create_pipeline(name, run, images, places, **given))
    return lineage.outcome(lineage.open_store(metadata_path))


def examples_of(run: config.Run, folder: str) -> Images:
    """Return the examples in a folder, written from the run's data set where they are not there yet."""


def be_quiet() -> None:
    """Let libraries tell of errors only: what a user needs is printed, and kept in the artifacts."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = os.environ["GRPC_VERBOSITY"] = "ERROR"
    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger().setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:]), verbosity=flags.verbosity(sys.argv[1:])))
