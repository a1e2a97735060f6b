"""python -m benchmarks.beam --model=PATH --data_name=NAME --data_dir=DIR: Beam's workers against one process.

The same evaluation three ways, one after the other: in one process on all processors, by one worker of one TensorFlow
thread, and by one such worker for each processor. Seconds are those of attacks; what workers take to start is apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple, Optional

from rich.console import Console
from rich.table import Table

AMONG_WORKERS, AGAINST_ONE_PROCESS = 1.6, 0.9
"""What two workers must reach at least, of the speed of one worker and of one process on both processors."""


class Speed(NamedTuple):
    """Seconds of attacks, and seconds before the first one began."""

    seconds: float
    start_up: float


def one_process(options: argparse.Namespace, folder: Path) -> Speed:
    """Time the evaluation of kerasdefense.run."""
    given = [f"--data_name={options.data_name}", f"--data_dir={options.data_dir}", f"--evaluate_model={options.model}"]
    run("kerasdefense.run", "--mode=evaluate", f"--run_dir={folder}", *given, *wanted(options))
    results = json.loads((folder / "evaluation/results.json").read_text(encoding="utf-8"))
    return Speed(sum(attack["seconds"] for attack in results["attacks"]), 0.0)


def workers(options: argparse.Namespace, folder: Path, examples: Path, count: int) -> Speed:
    """Time the evaluation by so many workers."""
    given = [f"--model={options.model}", f"--examples={examples}", f"--output={folder}"]
    run("pipelines.evaluate", *given, f"--direct_num_workers={count}", *wanted(options))
    work = json.loads((folder / "work.json").read_text(encoding="utf-8"))
    return Speed(work["seconds"], work["start_up"])


def wanted(options: argparse.Namespace) -> list[str]:
    """Return the flags that all three share."""
    settings = {"suite": options.suite, "examples": options.images, "chunk_size": options.chunk_size}
    flags = [f"--evaluate_{name}={value}" for name, value in settings.items()]
    return [*flags, "--evaluate_sanity_examples=0", "--noprogress"]


def run(module: str, *arguments: str) -> None:
    """Run a module of ours as a command, and raise what it says where it fails."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.strip() or f"{module} failed")


def parse(arguments: Optional[list[str]]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.beam", description=__doc__)
    parser.add_argument("--model", default="saved_models/pgd_at_cifar10_mini", help="what is attacked")
    parser.add_argument("--data_name", default="cifar10", help="as the flag of kerasdefense.run")
    parser.add_argument("--data_dir", default="", help="as the flag of kerasdefense.run")
    parser.add_argument("--suite", default="standard", help="attacks")
    parser.add_argument("--images", type=int, default=256, help="test images")
    parser.add_argument("--chunk_size", type=int, default=64, help="images attacked at once, and of a block")
    parser.add_argument("--workers", type=int, default=2, help="processors, and workers")
    return parser.parse_args(arguments)


def main(arguments: Optional[list[str]] = None) -> int:
    """Measure, print the table and return 1 where a ratio is below what it must be."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        given = [f"--data_name={options.data_name}", f"--data_dir={options.data_dir}"]
        run("pipelines.examples", f"--examples_dir={folder}/examples", *given)
        alone = one_process(options, folder / "alone")
        one = workers(options, folder / "one", folder / "examples", 1)
        several = workers(options, folder / "several", folder / "examples", options.workers)
    among, against = one.seconds / several.seconds, alone.seconds / several.seconds
    table = Table("", "seconds of attacks", "images/s", "start-up")
    rows = {f"one process, {options.workers} processors": alone, "1 worker": one, f"{options.workers} workers": several}
    for name, speed in rows.items():
        table.add_row(name, f"{speed.seconds:.1f}", f"{options.images / speed.seconds:.1f}", f"{speed.start_up:.1f} s")
    console = Console()
    console.print(table)
    console.print(f"{options.workers} workers: {among:.2f} times one worker (at least {AMONG_WORKERS})")
    console.print(f"{options.workers} workers: {against:.2f} times one process (at least {AGAINST_ONE_PROCESS})")
    return int(among < AMONG_WORKERS or against < AGAINST_ONE_PROCESS)


if __name__ == "__main__":
    sys.exit(main())
