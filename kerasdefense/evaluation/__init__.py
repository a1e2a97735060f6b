"""Evaluation: what survives every attack on every path. It is given functions and arrays, never a defense."""

from kerasdefense.evaluation.compare import compare, comparison_table, to_csv, to_markdown
from kerasdefense.evaluation.evaluate import evaluate
from kerasdefense.evaluation.models import Loaded, as_paths, check_fits, load_model
from kerasdefense.evaluation.recorded import read_outcomes, read_results
from kerasdefense.evaluation.report import (
    accuracy_interval,
    check_results,
    radius,
    randomised_table,
    sanity_lines,
    table,
    unseen_lines,
    versions,
)
from kerasdefense.evaluation.robustbench import entry as robustbench_entry
from kerasdefense.evaluation.robustness import Options
from kerasdefense.evaluation.suites import SUITES, PlannedAttack, ThreatModel
from kerasdefense.evaluation.testing import RobustValidation, assert_robust

__all__ = [
    "SUITES",
    "Loaded",
    "Options",
    "PlannedAttack",
    "RobustValidation",
    "ThreatModel",
    "accuracy_interval",
    "as_paths",
    "assert_robust",
    "check_fits",
    "check_results",
    "compare",
    "comparison_table",
    "evaluate",
    "load_model",
    "radius",
    "randomised_table",
    "read_outcomes",
    "read_results",
    "robustbench_entry",
    "sanity_lines",
    "table",
    "to_csv",
    "to_markdown",
    "unseen_lines",
    "versions",
]
