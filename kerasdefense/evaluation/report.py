"""Results for people and machines: intervals, the printed table, the JSON schema."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
from rich.table import Table
from scipy import stats

from kerasdefense.attacks.norms import radius
from kerasdefense.evaluation.search import FRESH_DRAWS
from kerasdefense.evaluation.suites import AVERAGED, EOT_DRAWS, FEW, PROTOCOL, SUITES
from kerasdefense.files import check_schema

_SCHEMA = Path(__file__).with_name("results.schema.json")
_PACKAGES = (
    "kerasdefense",
    "tensorflow",
    "keras",
    "tensorflow-addons",
    "tensorflow-datasets",
    "cleverhans",
    "numpy",
)
AUTOATTACK_IMAGES = 1000
RESAMPLES = 9999
_ON_RANDOM = {
    AVERAGED: "the model draws at random, so those of its attacks that go step by step follow the mean over "
    f"{EOT_DRAWS} draws, the others one draw",
    FEW: "the model draws at random, so PGD over mean losses, and APGD past its purifier and on one fixed draw, stand "
    "in for it, few attacks for ablations: not an AutoAttack result, true robustness is at most this",
    PROTOCOL: "the model draws at random, so AutoAttack rand, PGD over mean losses and Square over mean scores stand "
    "in for it",
}
_FIGURES = {
    "R1_fixed_noise": "AutoAttack on the model with its draw held fixed",
    "R2_autoattack_rand": "AutoAttack rand, on the mean over draws",
    "R3_pgd200_eot": "a long PGD on the mean over draws",
    "R4_square": "Square on the mean over draws",
    "R5_scaling": "PGD by the number of draws it averages over",
    "R6_fresh_draws": "fresh draws on the worst images found, and on clean ones",
}
"""Figures of the protocol for models that draw at random."""


def accuracy_interval(right: np.ndarray) -> dict[str, Any]:
    """Return the share of true values [n] as `{value, n, ci95}`, the last being Wilson's 95 % interval."""
    return wilson(int(np.sum(right)), len(right))


def wilson(count: int, total: int) -> dict[str, Any]:
    """Return a share as `{value, n, ci95}`, the last being Wilson's 95 % interval."""
    interval = stats.binomtest(count, total).proportion_ci(0.95, method="wilson")
    return {"value": count / total, "n": total, "ci95": [float(interval.low), float(interval.high)]}


def mean_interval(values: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """Return a mean as `{value, n, ci95}`, the last being the percentile bootstrap's 95 % interval.

    Args:
        values: numbers [n].
        seed: seed of the resamples.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13. Deviations: where all values are
    equal, the interval is one point.
    """
    value = low = high = float(values.mean())
    if np.ptp(values):
        low, high = stats.bootstrap(
            (values,),
            np.mean,
            n_resamples=RESAMPLES,
            batch=1000,
            vectorized=True,
            method="percentile",
            random_state=np.random.default_rng(seed),
        ).confidence_interval
    return {"value": value, "n": len(values), "ci95": [float(low), float(high)]}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that the figures depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
            found[name] = "not installed"
    return found


def check_results(results: Mapping[str, Any]) -> None:
    """Raise an InputError unless `results` follow the package's JSON schema of results.json."""
    check_schema(results, _SCHEMA, "results.json")


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _interval(accuracy: Mapping[str, Any]) -> str:
    low, high = accuracy["ci95"]
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def table(results: Mapping[str, Any], title: str) -> Table:
    """Return the results as one readable table: clean, each attack, and what survives all of them."""
    robust, clean = results["robust_accuracy"], results["clean_accuracy"]
    threat = results["threat_model"]
    caption = f"{threat['norm']} ball of radius {radius(threat['epsilon'])}, n = {clean['n']}, seed {results['seed']}. "
    shown = Table(title=title, caption=caption + results["note"], caption_justify="left", title_justify="left")
    for heading in ("images", "accuracy", "95 % interval", "attacked", "seconds"):
        shown.add_column(heading, justify="left" if heading == "images" else "right")
    shown.add_row("clean", _percent(clean["value"]), _interval(clean), "", "")
    for attack in results["attacks"]:
        path = "" if attack["path"] == "exact" else f" via {attack['path']}"
        left = left_by(attack, results)
        cells = (_percent(left["value"]), _interval(left), f"{attack['attacked']:,}", f"{attack['seconds']:.1f}")
        words = "after" if met_all(attack, results) else "and after"
        shown.add_row(f"{words} {attack['name']}{path}{' alone' if attack.get('alone') else ''}", *cells)
    shown.add_section()
    bound = "" if results["complete"] else "at most "
    cells = (bound + _percent(robust["value"]), _interval(robust), "", "")
    shown.add_row("robust: worst of all", *cells, style="bold")
    return shown


def met_all(attack: Mapping[str, Any], results: Mapping[str, Any]) -> bool:
    """Return whether an attack met every image that is right clean, and not only what stood after those before it."""
    return not results["cascade"] or bool(attack.get("alone"))


def left_by(attack: Mapping[str, Any], results: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what an attack leaves: alone where it met all images, else together with those before it."""
    if met_all(attack, results):
        own: Mapping[str, Any] = attack["own_accuracy"]
        return own
    total = results["clean_accuracy"]["n"]
    return wilson(round(attack["cascaded_accuracy"] * total), total)


def sanity_lines(results: Mapping[str, Any]) -> list[str]:
    """Return what to print of the sanity battery beside the headline: one line, and one per failed item."""
    items = results["sanity"]
    if not items:
        return ["sanity battery: not run"]
    by_status = {status: [each for each in items if each["status"] == status] for status in ("pass", "fail", "not_run")}
    not_run = ", ".join(item["id"] for item in by_status["not_run"])
    lines = [
        f"sanity battery: {len(by_status['pass'])} passed, {len(by_status['fail'])} failed"
        + (f", not run: {not_run}" if not_run else "")
        + ("" if results["trusted"] else " - NOT TO BE TRUSTED")
    ]
    for item in by_status["fail"]:
        measured = f"{item['value']:.4g}, must be {relation(item)} {item['threshold']:.4g}"
        gates = "" if item["gates"] else " (reported only)"
        lines.append(f"  {item['id']} failed{gates}: {item['asks']}: {measured}. {item['detail']}".rstrip())
    return lines


def unseen_lines(results: Mapping[str, Any]) -> list[str]:
    """Return what to print of images outside the ball, nothing where they were not measured."""
    if not results["unseen"]:
        return []
    found = results["unseen"]
    st_adv, n = found["st_adv"]["value"], found["st_adv"]["n"]
    corrupted = f"corrupted images {_percent(found['mean_corrupted'])} on average, after StAdv {_percent(st_adv)}"
    return [f"outside the ball (n = {n}, not part of the robust accuracy): {corrupted}"]


def randomised_rows(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the figures R1 to R6 of a model that draws at random, none of any other.

    Each has its `id`, what it `asks`, the `part` of the figure that it is, and `value`, `n` and `ci95`, null where they
    are not known.
    """
    for key, found in (results["randomised"] or {}).items():
        if not key.startswith("R"):
            continue
        name, words = key.partition("_")[0], _FIGURES.get(key, key.partition("_")[2].replace("_", " "))
        for part, figure in _parts(found):
            known = figure if isinstance(figure, Mapping) else {"value": figure}
            told = {each: known.get(each) for each in ("value", "n", "ci95")}
            yield {"id": name, "asks": words, "part": part, **told}


def _parts(found: Any) -> list[tuple[str, Any]]:
    """Return the accuracies of a figure, each with what it is called within that."""
    if isinstance(found, Sequence):
        return [(f"draws: {each['draws']}", each) for each in found]
    if not isinstance(found, Mapping):
        return [("", found)]
    if "value" not in found:
        return [(name.replace("_", " "), each) for name, each in found.items()]
    clean = [("clean", found["clean"])] if "clean" in found else []
    left = [(f"left by {name.replace('_', ' ')}", each) for name, each in found.get("left", {}).items()]
    return [("", found), *clean, *left]


def randomised_table(results: Mapping[str, Any]) -> Optional[Table]:
    """Return the figures R1 to R6 as a table to print, None for a model that draws nothing at random."""
    rows = list(randomised_rows(results))
    if not rows:
        return None
    caption = "R6: one draw, the vote of 20, and right in each of ten, since an attacker may try again."
    curve = results["randomised"].get("R5_scaling") or ()
    if not all(each.get("is_non_increasing", True) for each in curve):
        caption += " R5 rises with the draws by more than chance: its attack fails, and more may fall than it says."
    shown = Table(title="a model that draws at random", caption=caption, caption_justify="left", title_justify="left")
    for heading in ("figure", "accuracy", "95 % interval", "images"):
        shown.add_column(heading, justify="left" if heading == "figure" else "right")
    for row in rows:
        figure = f"{row['id']} {row['asks']}" + (f": {row['part']}" if row["part"] else "")
        value = "not measured" if row["value"] is None else _percent(row["value"])
        interval = _interval(row) if row["ci95"] else ""
        shown.add_row(figure, value, interval, f"{row['n']:,}" if row["n"] else "")
    return shown


def relation(item: Mapping[str, Any]) -> str:
    """Return how the value of a sanity item must stand to its threshold."""
    return "at least" if item["id"] == "S16" else "at most"


def suite_words(suite: str, *, is_random: bool) -> str:
    """Return what the attacks of a suite are, on a model that draws at random also what becomes of them there."""
    words, on_random = SUITES[suite].words, SUITES[suite].on_random
    if not is_random:
        return words
    return f"{words}; {_ON_RANDOM[AVERAGED]}" if on_random == AVERAGED else _ON_RANDOM[on_random]


def note(results: Mapping[str, Any], suite: str) -> str:
    """Return what a reader must know of the figures: how strong the attacks were, and how many images there are."""
    words = [f"Suite {suite}: {suite_words(suite, is_random=bool(results['flags']['randomised']))}."]
    words += [
        f"{attack['name']} stands in for {attack['replaces']}." for attack in results["attacks"] if attack["replaces"]
    ]
    if results["flags"]["randomised"]:
        words.append(f"Accuracies are by the mean probabilities of {FRESH_DRAWS} draws.")
    if results["clean_accuracy"]["n"] < AUTOATTACK_IMAGES:
        words.insert(0, f"Preliminary, fewer than {AUTOATTACK_IMAGES} images.")
    if not results["complete"]:
        words.insert(0, "Upper bound: the time was up before all attacks were through.")
    skipped, queries = results["flags"].get("skipped"), results["flags"].get("queries")
    if queries:
        words.append(
            f"The model was only asked for answers, at most {queries} by each attack on an image: no attack followed "
            "its gradient and most of the sanity battery could not run, so true robustness may be far lower."
        )
    if skipped:
        why = "surrogates or of a limit on queries" if queries else "surrogates or features"
        words.append(f"For want of {why}, {' and '.join(skipped)} did not run.")
    failed = [item["id"] for item in results["sanity"] if item["gates"] and item["status"] == "fail"]
    if failed:
        words.insert(0, f"Not to be trusted: {', '.join(failed)} of the sanity battery failed.")
    return " ".join(words)
