"""python -m benchmarks: how far a step of adversarial training is from its floor, and from other libraries."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read when TensorFlow is imported

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.training_step import Case, Measurement, has_art, measure
from kerasdefense.files import write_json

CASES = [
    Case("resnet8", width=16, image_shape=(32, 32, 3), batch_size=32),
    Case("resnet8", width=16, image_shape=(32, 32, 3), batch_size=128),
    Case("small_cnn", width=16, image_shape=(28, 28, 1), batch_size=32),
    Case("small_cnn", width=16, image_shape=(28, 28, 1), batch_size=128),
]
QUICK_CASES = [Case("small_cnn", width=16, image_shape=(28, 28, 1), batch_size=32, steps=3)]

# What a column shows, and how. Ratios are of times on the clock; brackets: for information, no limit applies.
COLUMNS = {
    "floor ms": ("floor_ms", ".1f"),
    "ours ms": ("ours_ms", ".1f"),
    "ours/floor": ("over_floor", ".2f"),
    "(CPU time)": ("over_floor_processor", ".2f"),
    "images/s": ("images_per_second", ".0f"),
    "x cleverhans": ("times_cleverhans", ".2f"),
    "x ART": ("times_art", ".2f"),
    "(whole batches)": ("times_art_whole_batches", ".2f"),
    "retraces": ("retraces", "d"),
}
AT_MOST = {"over_floor": 1.10, "retraces": 0}
AT_LEAST = {"times_cleverhans": 1.0, "times_art": 2.0}
BUSY = 1.2
WIDTH = 160  # never cut a column: a narrower terminal wraps the lines


def describe(case: Case) -> str:
    """Return the name of a case."""
    return f"{case.backbone}-{case.width} {'x'.join(map(str, case.image_shape))} batch {case.batch_size}"


def rows_of(case: Case, measurement: Measurement) -> list[dict[str, Any]]:
    """Return the figures of a case, one row per strategy; `times_...` is how many times as long the others take."""
    timing, rows = measurement.timing, []
    for strategy, retraces in measurement.retraces.items():
        times = {name: timing.ratio(name, strategy) for name in timing.seconds}
        row = {
            "case": describe(case),
            "steps": case.steps,
            "strategy": strategy,
            "floor_ms": timing.milliseconds("floor"),
            "ours_ms": timing.milliseconds(strategy),
            "over_floor": timing.ratio(strategy, "floor"),
            "over_floor_processor": timing.processor_ratio(strategy, "floor"),
            "images_per_second": 1000 * case.batch_size / timing.milliseconds(strategy),
            "times_cleverhans": times["cleverhans"],
            "times_art": times.get("ART"),
            "times_art_whole_batches": times.get("ART, whole batches", times.get("ART")),
            "retraces": retraces,
        }
        rows.append(row)
    return rows


def misses_of(rows: list[dict[str, Any]]) -> list[str]:
    """Return one line for each figure that is not what it must be."""
    misses = []
    for row in rows:
        for column, (name, form) in COLUMNS.items():
            value, at_most, at_least = row[name], AT_MOST.get(name), AT_LEAST.get(name)
            figure = f"{row['case']}, {row['strategy']}: {column}"
            if value is not None and at_most is not None and value > at_most:
                misses.append(f"{figure} is {value:{form}}, must be at most {at_most:{form}}")
            if value is not None and at_least is not None and value < at_least:
                misses.append(f"{figure} is {value:{form}}, must be at least {at_least:{form}}")
    return misses


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Return the table of all rows."""
    table = Table(
        title=f"A training step with PGD-{rows[0]['steps']}", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("case", no_wrap=True)
    table.add_column("strategy", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = ("not installed" if row[name] is None else f"{row[name]:{form}}" for name, form in COLUMNS.values())
        table.add_row(row["case"], row["strategy"], *cells)
    return table


def machine() -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    packages = ("tensorflow", "keras", "cleverhans", *(["adversarial-robustness-toolbox"] if has_art() else []))
    versions = {name: metadata.version(name) for name in packages}
    return {"processors": os.cpu_count(), "architecture": platform.machine(), "versions": versions}


def parse(arguments: Optional[list[str]]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small case and few rounds, to see that it works")
    parser.add_argument("--rounds", type=int, help="times each step is timed (default 20; 5 with --quick)")
    parser.add_argument("--output", type=Path, help="JSON file for the figures and the seconds of every round")
    parser.add_argument("--no-check", action="store_true", help="exit with 0 even if a figure is not what it must be")
    options = parser.parse_args(arguments)
    if options.rounds is None:
        options.rounds = 5 if options.quick else 20
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {options.rounds}")
    return options


def main(arguments: Optional[list[str]] = None) -> int:
    """Measure, print the table, and return 1 if a figure is not what it must be."""
    options = parse(arguments)
    console = Console(width=max(WIDTH, Console().width), highlight=False)
    if not has_art():
        console.print(
            "ART is not installed and left out; it comes with the extra `bench`: pip install '.[bench]'", markup=False
        )
    rows, rounds = [], {}
    for case in QUICK_CASES if options.quick else CASES:
        with console.status(f"timing {describe(case)}"):
            measurement = measure(case, options.rounds)
        rows += rows_of(case, measurement)
        rounds[describe(case)] = measurement.timing._asdict()
        disturbance = measurement.timing.disturbance("floor")
        if disturbance > BUSY:
            console.print(
                f"{describe(case)}: a busy machine, the floor took {disturbance:.1f} times as long in its median round"
            )
    console.print(table_of(rows))
    if options.output:
        write_json(options.output, {"machine": machine(), "rows": rows, "rounds": rounds})
    misses = [] if options.no_check else misses_of(rows)
    print(*misses, sep="\n", end="\n" if misses else "", file=sys.stderr)
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
