"""python -m benchmarks: training steps against their floor and other libraries, and what a checkpoint costs."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

from rich.console import Console

from benchmarks.groups import GROUPS, Group
from benchmarks.peers import has_art
from benchmarks.tables import Row, misses_of, table_of
from kerasdefense.files import write_json

BUSY = 1.2
WIDTH = 160  # never cut a column: a narrower terminal wraps the lines


def measure_group(group: Group, options: argparse.Namespace, console: Console) -> tuple[list[Row], dict[str, Any]]:
    """Measure and print a group; return its rows, and the seconds of every round by the name of the case."""
    rows: list[Row] = []
    rounds = {}
    cases = group.quick_cases if options.quick else group.cases
    for case in cases:
        name = group.name(case)
        with console.status(f"timing {name}"):
            measurement = group.measure(case, options.rounds)
        rows += [{"name": name, "case": case.model_name, **row} for row in group.rows(case, measurement)]
        rounds[name] = measurement.timing._asdict()
        disturbance = measurement.timing.disturbance(group.reference)
        if disturbance > BUSY:
            times = f"{disturbance:.1f} times as long in its median round"
            console.print(f"{name}: a busy machine, the {group.reference} took {times}")
    title = group.title.format(case=cases[0].model_name, steps=cases[0].steps)
    console.print(table_of(title, group.columns, rows))
    return rows, rounds


def machine() -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    packages = ("tensorflow", "keras", "cleverhans", *(["adversarial-robustness-toolbox"] if has_art() else []))
    versions = {name: metadata.version(name) for name in packages}
    return {"processors": os.cpu_count(), "architecture": platform.machine(), "versions": versions}


def parse(arguments: Optional[list[str]]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="one small case of each table and few rounds, to see that it works"
    )
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
    """Measure, print the tables, and return 1 if a figure is not what it must be."""
    options = parse(arguments)
    console = Console(width=max(WIDTH, Console().width), highlight=False)
    if not has_art():
        console.print(
            "ART is not installed and left out; it comes with the extra `bench`: pip install '.[bench]'", markup=False
        )
    tables, misses = [], []
    for group in GROUPS:
        rows, rounds = measure_group(group, options, console)
        tables.append({"title": group.title, "rows": rows, "rounds": rounds})
        misses += misses_of(group.columns, rows)
    if options.output:
        write_json(options.output, {"machine": machine(), "tables": tables})
    if options.no_check:
        return 0
    print(*misses, sep="\n", end="\n" if misses else "", file=sys.stderr)
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
