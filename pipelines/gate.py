"""The gate before a push: what a model must have shown, condition by condition, with the reason in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional

from rich.console import Console
from rich.table import Table

from kerasdefense import config
from kerasdefense.evaluation.compare import paired_difference, points
from kerasdefense.evaluation.recorded import Outcomes
from kerasdefense.types import InputError, UsageError

LEAST_PAIRS = 200
"""Images on which two models are compared at least; on fewer a loss of ten points may go unseen."""


_NOT_IN_PIPELINES = ("model", "preprocessor", "endpoint", "card", "minutes")
"""Flags of evaluation that concern another model than the one that is trained, or cut its evaluation short."""


@dataclasses.dataclass(frozen=True)
class Condition:
    """What was asked, whether it holds, and what was found."""

    asks: str
    holds: bool
    found: str


def check_gate(run: config.Run) -> None:
    """Raise a UsageError for thresholds that are missing or contradict each other or what the run measures."""
    gate = run.gate
    if not gate.robust_accuracy:
        raise UsageError(
            "a pipeline needs --gate_robust_accuracy, the least lower 95 % bound of robust accuracy that is pushed; "
            "without one it would push anything"
        )
    for name, value in dataclasses.asdict(gate).items():
        if value >= 1:
            raise UsageError(f"--gate_{name}={value:g} cannot be reached: give a share below 1")
    if gate.clean_accuracy and gate.robust_accuracy > gate.clean_accuracy:
        raise UsageError(
            f"--gate_robust_accuracy={gate.robust_accuracy:g} is above --gate_clean_accuracy={gate.clean_accuracy:g}, "
            "but no model is right on more images under attack than without"
        )
    if gate.auroc and not (run.evaluate.open_set or run.evaluate.ood):
        raise UsageError("--gate_auroc needs unknown images: pass --evaluate_open_set or --evaluate_ood")
    for name in _NOT_IN_PIPELINES:
        if getattr(run.evaluate, name):
            raise UsageError(f"--evaluate_{name} is for kerasdefense.run: a pipeline measures the model that it pushes")
    if not run.evaluate.sanity_examples:
        raise UsageError("a pipeline asks for a clean sanity battery: --evaluate_sanity_examples must be above 0")


def judge(
    run: config.Run,
    results: Mapping[str, Any],
    outcomes: Outcomes,
    *,
    baseline: Optional[Outcomes] = None,
    is_evaluator_content: Optional[bool] = None,
) -> list[Condition]:
    """Return the conditions of a push, all of which must hold.

    Args:
        run: says what is asked.
        results: what the evaluation found.
        outcomes: the same, image by image.
        baseline: outcomes of the last blessed model on the same images; None = there is none.
        is_evaluator_content: the verdict of TFX's Evaluator; None = it was not asked.
    """
    return [
        *_of_evaluator(is_evaluator_content),
        *_of_accuracies(run.gate, results),
        *_of_detector(run, results),
        _of_sanity(results),
        *_of_baseline(outcomes, baseline, run.evaluate.seed),
    ]


def is_blessed(conditions: Sequence[Condition]) -> bool:
    """Return whether all conditions hold."""
    return all(each.holds for each in conditions)


def show(conditions: Sequence[Condition], console: Console) -> None:
    """Print the conditions."""
    table = Table("", "asked", "found", title="before a push", title_justify="left")
    for each in conditions:
        table.add_row("[green]holds[/green]" if each.holds else "[bold red]FAILS[/bold red]", each.asks, each.found)
    console.print(table)


def verdict(conditions: Sequence[Condition]) -> str:
    """Return in one line whether a model is blessed, and if not, why."""
    failed = [f"{each.asks}: {each.found}" for each in conditions if not each.holds]
    return f"not blessed, nothing is pushed: {'; '.join(failed)}" if failed else "blessed: every condition holds"


def _of_evaluator(content: Optional[bool]) -> Iterator[Condition]:
    if content is not None:
        yield Condition("TFX's Evaluator blesses it", content, "blessed" if content else "not blessed")


def _of_accuracies(gate: config.Gate, results: Mapping[str, Any]) -> Iterator[Condition]:
    for name in ("clean_accuracy", "robust_accuracy"):
        asked, found = getattr(gate, name), results[name]
        if asked:
            low, high = found["ci95"]
            words = f"{_percent(found['value'])} ({_percent(low)} to {_percent(high)}) of {found['n']:,} images"
            yield _bound(name.replace("_", " "), asked, low, words)


def _of_detector(run: config.Run, results: Mapping[str, Any]) -> Iterator[Condition]:
    """Yield a condition for each set of unknown images that the exported detector was measured on."""
    if not run.gate.auroc:
        return
    measured = results["open_set"]
    detectors = {} if measured is None else measured["detectors"]
    name = run.export.detector or next(iter(detectors), "")
    sets = detectors[name]["sets"] if name in detectors else {}
    if not sets:
        raise InputError("--gate_auroc asks how a detector tells unknown images, but no unknown images were measured")
    for unknown, figures in sets.items():
        low, high = figures["auroc_ci95"]
        words = f"{figures['auroc']:.3f} ({low:.3f} to {high:.3f})"
        yield _bound(f"AUROC of {name} on {unknown}", run.gate.auroc, low, words, share=False)


def _of_sanity(results: Mapping[str, Any]) -> Condition:
    failed = [each["id"] for each in results["sanity"] if each["gates"] and each["status"] == "fail"]
    ran = [each for each in results["sanity"] if each["status"] != "not_run"]
    holds = bool(ran) and not failed and results["complete"]
    if failed:
        found = f"failed: {', '.join(failed)}; robust accuracy is not to be trusted"
    else:
        found = f"{len(ran)} items passed" if holds else "not run"
    return Condition("the sanity battery is clean", holds, found)


def _of_baseline(outcomes: Outcomes, baseline: Optional[Outcomes], seed: int) -> Iterator[Condition]:
    """Yield a condition for clean and one for robust accuracy: no loss that is sure, on the same images."""
    if baseline is None:
        return
    if list(outcomes.index) != list(baseline.index):
        raise InputError("the last blessed model was not measured on the same images; evaluate both alike")
    count = len(outcomes.index)
    for name in ("clean", "robust"):
        asks = f"no significant loss of {name} accuracy against the last blessed model"
        if count < LEAST_PAIRS:
            yield Condition(asks, False, f"{count} images are too few to tell; {LEAST_PAIRS} are needed")
            continue
        found = paired_difference(getattr(outcomes, name), getattr(baseline, name), seed=seed)
        lost = found["significant"] and found["value"] < 0
        yield Condition(asks, not lost, f"{points(found)} points on {count:,} images")


def _bound(what: str, asked: float, low: float, words: str, *, share: bool = True) -> Condition:
    shown = _percent(asked) if share else f"{asked:.3f}"
    return Condition(f"lower 95 % bound of {what} is at least {shown}", low >= asked, words)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
