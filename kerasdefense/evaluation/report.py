"""Results for people and machines: intervals, the printed table, the JSON schema."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from scipy import stats

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


def accuracy_interval(right: np.ndarray) -> dict[str, Any]:
    """Return the share of true values [n] as `{value, n, ci95}`, the last being Wilson's 95 % interval."""
    count, total = int(np.sum(right)), len(right)
    interval = stats.binomtest(count, total).proportion_ci(0.95, method="wilson")
    return {"value": count / total, "n": total, "ci95": [float(interval.low), float(interval.high)]}


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


def radius(epsilon: float) -> str:
    """Return a radius as people write it: 8/255 where it is a whole number of grey levels, else a decimal."""
    levels = epsilon * 255
    return f"{round(levels)}/255" if abs(levels - round(levels)) < 1e-6 else f"{epsilon:g}"


def table(results: Mapping[str, Any], title: str) -> Table:
    """Return the results as one readable table: clean, each attack alone, and what survives all of them."""
    robust, clean = results["robust_accuracy"], results["clean_accuracy"]
    threat = results["attacks"][0]["threat_model"]
    caption = f"{threat['norm']} ball of radius {radius(threat['epsilon'])}, n = {clean['n']}, seed {results['seed']}. "
    shown = Table(title=title, caption=caption + results["note"], caption_justify="left", title_justify="left")
    for heading in ("images", "accuracy", "95 % interval", "seconds"):
        shown.add_column(heading, justify="left" if heading == "images" else "right")
    shown.add_row("clean", _percent(clean["value"]), _interval(clean), "")
    for attack in results["attacks"]:
        path = "" if attack["path"] == "exact" else f" via {attack['path']}"
        cells = (_percent(attack["accuracy"]), _interval(attack), f"{attack['seconds']:.1f}")
        shown.add_row(f"after {attack['name']}{path}", *cells)
    shown.add_section()
    shown.add_row("robust: after the worst of all", _percent(robust["value"]), _interval(robust), "", style="bold")
    return shown


def note(suite: str, examples: int) -> str:
    """Return what a reader must know of the figures: how strong the attacks were, and how many images there are."""
    words = f"Suite {suite}: not an AutoAttack result, true robustness is at most this."
    return f"Preliminary, fewer than {AUTOATTACK_IMAGES} images. {words}" if examples < AUTOATTACK_IMAGES else words
