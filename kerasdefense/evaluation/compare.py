"""Comparison of evaluated models: one table, with differences from the first model paired image by image.

Models that were attacked on the same images differ less by chance than two separate intervals suggest: how hard the
images are cancels in the differences.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from kerasdefense.evaluation.recorded import Outcomes
from kerasdefense.evaluation.report import RESAMPLES, accuracy_interval, mean_interval
from kerasdefense.types import InputError, UsageError

_COLUMNS = {
    "clean": "clean_accuracy",
    "PGD-20": "pgd20_accuracy",
    "APGD-CE": "apgd_ce_accuracy",
    "worst": "robust_accuracy",
}
_GAP_COLUMNS = {
    "clean": "clean_accuracy",
    "PGD-20": "pgd20_accuracy",
    "PGD-100": "pgd100_accuracy",
    "margin": "pgd100_margin_accuracy",
    "features": "feature_matching_accuracy",
    "transfer": "transfer_apgd_margin_accuracy",
    "worst": "robust_accuracy",
}
"""Of the suite `gap`, whose APGD-CE meets only what stands after these."""
_PURIFIED_COLUMNS = {
    "clean": "clean_accuracy",
    "oblivious": "oblivious_path_accuracy",
    "BPDA": "bpda_identity_path_accuracy",
    "exact": "exact_path_accuracy",
    "worst": "robust_accuracy",
}
"""Of the suite `purified`: by path, the worst over the attacks that meet every image there."""
_DIFFERENCES = {"Δ clean": "clean_difference", "Δ worst": "robust_difference"}


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One model and its figures.

    `clean_accuracy`, `<attack>_accuracy` and `robust_accuracy` are `{value, n, ci95}` over all its images;
    `clean_difference` and `robust_difference`, on the images it shares with the reference, also have `significant`:
    whether the interval excludes 0. The reference has no differences.
    """

    run: Outcomes
    figures: Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Rows, the reference first, and the seed of the bootstrap."""

    rows: tuple[Row, ...]
    seed: int


def compare(runs: Sequence[Outcomes], *, seed: int = 0) -> Comparison:
    """Compare evaluated models with the first of them.

    Args:
        runs: at least two; the first one is the reference.
        seed: seed of the bootstrap; every difference starts from it anew, so that none depends on the other runs.

    Returns:
        A row per run, in the order of `runs`; runs of one name are called by their folders instead.

    Raises:
        UsageError: fewer than two runs, or the same folder twice.
        InputError: runs that were not attacked alike on the same images.
    """
    if len(runs) < 2:
        raise UsageError("a comparison needs at least two evaluated runs: --mode=compare RUN RUN ...")
    given = Counter(run.folder.resolve() for run in runs)
    twice = [str(run.folder) for run in runs if given[run.folder.resolve()] > 1]
    if twice:
        raise UsageError(f"{' and '.join(twice)} are the same run; give each once: --mode=compare RUN RUN ...")
    count = Counter(run.name for run in runs)
    named = [dataclasses.replace(run, name=str(run.folder)) if count[run.name] > 1 else run for run in runs]
    rows = [Row(run, _accuracies(run)) for run in named]
    for number, run in enumerate(named[1:], start=1):
        rows[number] = Row(run, {**rows[number].figures, **_differences(run, named[0], seed)})
    return Comparison(tuple(rows), seed)


def _accuracies(run: Outcomes) -> dict[str, Mapping[str, Any]]:
    by_path = {f"{path}_path": right for path, right in run.by_path.items()} if _suite(run) == "purified" else {}
    right = {"clean": run.clean, **run.survived, **by_path, "robust": run.robust}
    return {f"{name}_accuracy": accuracy_interval(each) for name, each in right.items()}


def _suite(run: Outcomes) -> str:
    return run.setting["suite"].split()[0]


def _differences(run: Outcomes, reference: Outcomes, seed: int) -> dict[str, Mapping[str, Any]]:
    """Return the differences from the reference on the common images, or raise why they do not compare."""
    both = f"{reference.folder} and {run.folder} do not compare:"
    for what, wanted in reference.setting.items():
        if run.setting[what] != wanted:
            raise InputError(
                f"{both} {what.replace('_', ' ')} {wanted} is not {run.setting[what]}; evaluate both alike"
            )
    index, here, there = np.intersect1d(run.index, reference.index, return_indices=True)
    if not index.size:
        raise InputError(f"{both} they have no image in common; evaluate both on the same images")
    unlike = index[run.label[here] != reference.label[there]]
    if unlike.size:
        raise InputError(f"{both} image {unlike[0]} has another label; evaluate both on the same images")
    return {
        "clean_difference": paired_difference(run.clean[here], reference.clean[there], seed=seed),
        "robust_difference": paired_difference(run.robust[here], reference.robust[there], seed=seed),
    }


def paired_difference(right: np.ndarray, reference: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """Return the mean of `right - reference` as `{value, n, ci95, significant}`, with the percentile bootstrap.

    Args:
        right: bool or float [n], whether a model is right on each image, or another figure of it.
        reference: the same of the model to compare with, on the same images.
        seed: seed of the resamples.

    Returns:
        The mean and its 95 % interval, which is one point where all differences are equal.
    """
    found = mean_interval(np.subtract(right, reference, dtype=np.float64), seed=seed)
    low, high = found["ci95"]
    return {**found, "significant": bool(low > 0 or high < 0)}


def comparison_table(comparison: Comparison) -> Table:
    """Return the comparison for the terminal; differences whose interval excludes 0 are bold."""
    (first, *headings), lines = _cells(comparison)
    shown = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, collapse_padding=True, leading=1)
    shown.caption, shown.caption_justify = Text(_caption(comparison)), "left"
    shown.add_column(first, no_wrap=True, overflow="fold")
    for heading in headings:
        shown.add_column(heading, justify="right", overflow="fold")
    for name, *cells in lines:
        texts = [Text(cell.replace(" (", "\n("), "bold" if cell.endswith("*") else "") for cell in cells]
        shown.add_row(Text(name), *texts)
    return shown


def to_markdown(comparison: Comparison) -> str:
    """Return the comparison as a GitHub table and, after an empty line, its caption in one line."""
    headings, lines = _cells(comparison)
    rule = ["---", *["---:"] * (len(headings) - 1)]
    table = [" | ".join(cell.replace("|", r"\|") for cell in cells) for cells in (headings, rule, *lines)]
    return "\n".join([*(f"| {line} |" for line in table), "", _caption(comparison), ""])


def to_csv(comparison: Comparison) -> str:
    """Return the comparison as CSV, a line per run, figures as fractions; what is unknown or not there is empty."""
    lines: list[dict[str, Any]] = []
    for row in comparison.rows:
        run = row.run
        line: dict[str, Any] = {"run": run.name, **run.setting, "attack_seed": run.attack_seed}
        line |= {"training_seed": run.training_seed, "attack_budget": run.attack_budget}
        for name, figure in row.figures.items():
            low, high = figure["ci95"]
            line |= {name: figure["value"], f"{name}_low": low, f"{name}_high": high, f"{name}_n": figure["n"]}
            if "significant" in figure:
                line[f"{name}_significant"] = "*" if figure["significant"] else ""
        lines.append(line)
    text = io.StringIO()
    columns = dict.fromkeys(name for line in reversed(lines) for name in line)  # the reference has no differences
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the cells of every row, as people read them."""
    by_suite = {"gap": _GAP_COLUMNS, "purified": _PURIFIED_COLUMNS}
    shown = by_suite.get(_suite(comparison.rows[0].run), _COLUMNS)
    known = {name for row in comparison.rows for name in row.figures}
    columns = {words: name for words, name in shown.items() if name in known}
    headings = ["run", "attack budget", "n", *columns, *_DIFFERENCES, "pairs"]
    lines = []
    for row in comparison.rows:
        figures, budget = row.figures, row.run.attack_budget
        cells = [row.run.name, "?" if budget is None else f"{budget:,}", f"{len(row.run.index):,}"]
        cells += [_percent(figures[name]) if name in figures else "-" for name in columns.values()]
        cells += [points(figures[name]) if name in figures else "-" for name in _DIFFERENCES.values()]
        cells.append(f"{figures['clean_difference']['n']:,}" if "clean_difference" in figures else "-")
        lines.append(cells)
    return headings, lines


def _percent(figure: Mapping[str, Any]) -> str:
    value, low, high = (f"{100 * each:.1f}" for each in (figure["value"], *figure["ci95"]))
    return f"{value} % ({low} to {high})"


def points(figure: Mapping[str, Any]) -> str:
    """Return a difference of shares, as `paired_difference` returns it, in percentage points with its interval."""
    value, low, high = (f"{round(100 * each, 1) + 0.0:+.1f}" for each in (figure["value"], *figure["ci95"]))
    return f"{value} ({low} to {high}){'*' if figure['significant'] else ''}"


def _caption(comparison: Comparison) -> str:
    """Return, in one line, what one must know to read the figures."""
    runs = [row.run for row in comparison.rows]
    setting = runs[0].setting
    split = "" if setting["open_set_split"] == "none" else f", open-set split {setting['open_set_split']}"
    sizes = _listed(f"{len(run.index):,}" for run in runs)
    attack_seeds = _listed(run.attack_seed for run in runs)
    training_seeds = _listed("unknown" if run.training_seed is None else run.training_seed for run in runs)
    return (
        f"{setting['data_set']}{split}; {setting['threat_model']}; suite {setting['suite']}; n = {sizes}; "
        f"attack seed {attack_seeds}, training seed {training_seeds} (what other training seeds would change is in no "
        f"interval). 95 % intervals: Wilson's for accuracies; Δ: difference from the first row in percentage points, "
        f"paired on the same images, percentile bootstrap with {RESAMPLES:,} resamples and seed {comparison.seed}; "
        f"`*`: its interval, taken alone, excludes 0. Attack budget: input gradients per training image. "
        f"{' '.join(dict.fromkeys(run.note for run in runs))}"
    )


def _listed(values: Iterable[Any]) -> str:
    return " or ".join(str(value) for value in dict.fromkeys(values))
