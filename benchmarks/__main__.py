"""python -m benchmarks: training steps, attacks and serving against other libraries, and against what must be.

Four kinds of tables: `training` (steps against their floor and other libraries, checkpoints), `attacks` (how fast ours
are), `serving` (what signatures add to the defended path, latency, throughput), and `strength` (what ours leave right
of published models; this one needs --data_dir).
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

from rich.console import Console

from benchmarks import strength
from benchmarks.attack_case import Target
from benchmarks.groups import GROUPS, Group
from benchmarks.peers import has_art
from benchmarks.tables import Row, misses_of, table_of
from kerasdefense.attacks import has_foolbox
from kerasdefense.files import write_json

BUSY = 1.2
KINDS = ("training", "attacks", "serving", "strength")
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


def measure_strength(options: argparse.Namespace, console: Console) -> list[Row]:
    """Measure and print what attacks leave right; return the rows, or say on one line why there are none."""
    lacking = strength.missing(options.data_dir)
    if lacking:
        console.print(f"strength is left out: {lacking}", markup=False)
        return []
    rows: list[Row] = []
    image, label = strength.first_images(options.data_dir, options.images)
    for case in strength.QUICK_CASES if options.quick else strength.CASES:
        with console.status(f"attacking {case.name}"):
            rows += strength.rows_of_strength(case, Target(strength.load_classifier(case.model), image, label))
    console.print(table_of(strength.title(options.images), strength.COLUMNS, rows, strategy="attacked by"))
    return rows


def machine() -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    optional = {"adversarial-robustness-toolbox": has_art(), "foolbox": has_foolbox()}
    packages = ("tensorflow", "keras", "cleverhans", *(name for name, is_here in optional.items() if is_here))
    versions = {name: metadata.version(name) for name in packages}
    return {"processors": os.cpu_count(), "architecture": platform.machine(), "versions": versions}


def parse(arguments: Optional[list[str]]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=KINDS, help="tables of one kind")
    parser.add_argument(
        "--quick", action="store_true", help="one small case of each table and few rounds, to see that it works"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        help="times each step is timed (default 20; 5 with --quick; attacks at most 2 to 5, serving 25 times as often)",
    )
    parser.add_argument("--data_dir", default="", help="TFDS folder with cifar10, for strength; else it is left out")
    parser.add_argument("--images", type=int, help="images for strength (default 256; 16 with --quick)")
    parser.add_argument("--output", type=Path, help="JSON file for the figures and the seconds of every round")
    parser.add_argument("--no-check", action="store_true", help="exit with 0 even if a figure is not what it must be")
    options = parser.parse_args(arguments)
    if options.rounds is None:
        options.rounds = 5 if options.quick else 20
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {options.rounds}")
    if options.images is None:
        options.images = strength.QUICK_IMAGES if options.quick else strength.IMAGES
    if options.images < 1:
        parser.error(f"--images must be at least 1, not {options.images}")
    return options


def absent_peers() -> list[str]:
    """Return the other libraries that are not installed."""
    return [name for name, is_here in (("ART", has_art()), ("Foolbox", has_foolbox())) if not is_here]


def main(arguments: Optional[list[str]] = None) -> int:
    """Measure, print the tables, and return 1 if a figure is not what it must be."""
    options = parse(arguments)
    console = Console(width=max(WIDTH, Console().width), highlight=False)
    for name in absent_peers():
        console.print(
            f"{name} is not installed and left out; it comes with the extra `bench`: pip install '.[bench]'",
            markup=False,
        )
    tables, misses = [], []
    for group in GROUPS:
        if options.only in (None, group.kind):
            rows, rounds = measure_group(group, options, console)
            tables.append({"title": group.title, "rows": rows, "rounds": rounds})
            misses += misses_of(group.columns, rows)
    if options.only in (None, "strength"):
        rows = measure_strength(options, console)
        tables += [{"title": strength.title(options.images), "rows": rows, "rounds": {}}] if rows else []
        misses += misses_of(strength.COLUMNS, rows)
    if options.output:
        write_json(options.output, {"machine": machine(), "tables": tables})
    if options.no_check:
        return 0
    print(*misses, sep="\n", end="\n" if misses else "", file=sys.stderr)
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
