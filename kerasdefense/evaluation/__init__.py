"""Evaluation: what survives every attack on every path. It is given functions and arrays, never a defense."""

from kerasdefense.evaluation.compare import compare, comparison_table, to_csv, to_markdown
from kerasdefense.evaluation.recorded import read_outcomes
from kerasdefense.evaluation.report import accuracy_interval, check_results, table, versions
from kerasdefense.evaluation.robustness import evaluate
from kerasdefense.evaluation.suites import SUITES, PlannedAttack

__all__ = [
    "SUITES",
    "PlannedAttack",
    "accuracy_interval",
    "check_results",
    "compare",
    "comparison_table",
    "evaluate",
    "read_outcomes",
    "table",
    "to_csv",
    "to_markdown",
    "versions",
]
