"""Pictures of anomaly scores: how known and unknown images spread, and the curves that follow from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from sklearn.metrics import roc_curve

from kerasdefense.evaluation.open_set.protocol import OpenSet
from kerasdefense.files import replacing

_COLUMNS, _BINS, _DPI = 3, 40, 110
_KNOWN, _UNKNOWN = "#3b6fb6", "#c8553d"


def write_pictures(scores: Path, roc: Path, found: OpenSet) -> None:
    """Write, atomically, histograms of the scores and ROC curves, a panel for each detector.

    Args:
        scores: .png file of the histograms: known and unknown images, clean as areas, attacked as lines.
        roc: .png file of the curves: share of unknown images refused over that of known ones refused.
        found: what was measured.
    """
    _write(scores, found, _histograms)
    _write(roc, found, _curves)


def _write(path: Path, found: OpenSet, draw: Any) -> None:
    names = list(found.results["detectors"])
    rows = math.ceil(len(names) / _COLUMNS)
    figure = Figure(figsize=(3.4 * min(_COLUMNS, len(names)), 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, min(_COLUMNS, len(names)), squeeze=False).ravel()
    for axis, name in zip(axes, names):
        draw(axis, found.results, name, _of(found, name))
        axis.set_title(name.replace("_", " "), fontsize=10, loc="left")
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, metadata={"Software": None})


def _of(found: OpenSet, name: str) -> dict[str, np.ndarray]:
    return {key[len(name) + 1 :]: array for key, array in found.arrays.items() if key.startswith(f"{name}/")}


def _first_set(results: Mapping[str, Any]) -> str:
    return next(iter(results["sets"]), "")


def _histograms(axis: Axes, results: Mapping[str, Any], name: str, arrays: Mapping[str, np.ndarray]) -> None:
    everything = np.concatenate([each for key, each in arrays.items() if key != "known_lowest_wrong"])
    finite = everything[np.isfinite(everything)]
    low, high = np.percentile(finite, [0.5, 99.5])
    bins = np.linspace(low, high if high > low else low + 1, _BINS)
    unknown = _first_set(results)
    areas = (("known", "known", _KNOWN), (f"sets/{unknown}", unknown, _UNKNOWN))
    for key, label, colour in areas:
        if key in arrays:
            axis.hist(np.clip(arrays[key], *bins[[0, -1]]), bins, density=True, color=colour, alpha=0.45, label=label)
    lines = (("known_attacked", "known, raised", _KNOWN), ("unknown_attacked", f"{unknown}, lowered", _UNKNOWN))
    for key, label, colour in lines:
        if key in arrays:
            clipped = np.clip(arrays[key], *bins[[0, -1]])
            axis.hist(clipped, bins, density=True, histtype="step", color=colour, linewidth=1.2, label=label)
    axis.axvline(results["detectors"][name]["threshold"], color="black", linewidth=0.8, label="threshold")
    axis.set_yticks([])
    axis.set_xlabel("anomaly score", fontsize=8)


def _curves(axis: Axes, results: Mapping[str, Any], name: str, arrays: Mapping[str, np.ndarray]) -> None:
    del name
    for key in results["sets"]:
        _curve(axis, arrays["known"], arrays[f"sets/{key}"], label=key)
    if "known_attacked" in arrays:
        _curve(axis, arrays["known_attacked"], arrays["unknown_attacked"], label="both attacked", linestyle="--")
    axis.plot([0, 1], [0, 1], color="#999999", linewidth=0.6)
    axis.set_xlabel("known refused", fontsize=8)
    axis.set_ylabel("unknown refused", fontsize=8)


def _curve(axis: Axes, known: np.ndarray, unknown: np.ndarray, **style: Any) -> None:
    is_unknown = np.repeat([False, True], [len(known), len(unknown)])
    false_positive, true_positive, _ = roc_curve(is_unknown, stats.rankdata(np.concatenate([known, unknown])))
    axis.plot(false_positive, true_positive, linewidth=1.2, **style)
