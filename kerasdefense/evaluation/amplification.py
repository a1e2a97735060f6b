"""How an error in an image grows on its way through the layers of a classifier: a plot over models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from kerasdefense.evaluation.figures import ARRAYS, read_figures
from kerasdefense.files import replacing

ERRORS = "evaluation/errors.png"
"""Where the plot of one model lies in a run directory."""
_DPI = 110
_ERROR = re.compile(r"(undenoised_)?error_(\d+)_(.*)")


def errors_of(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Return the relative errors of layers in figures per image, `denoised` and `undenoised`, by layer, image first."""
    found: dict[str, dict[str, np.ndarray]] = {"denoised": {}, "undenoised": {}}
    for name in sorted(arrays):
        match = _ERROR.fullmatch(name)
        if match:
            found["undenoised" if match[1] else "denoised"][match[3]] = arrays[name]
    return found


def write_errors(path: Path, arrays_of: Mapping[str, Mapping[str, np.ndarray]]) -> bool:
    """Write, atomically, a plot of the mean relative error of every layer by depth, and say whether there was any.

    A line per model, and a dashed one of the first without its denoiser. Models without such errors, or of other layers
    than the first one's, are left out.

    Args:
        path: the .png file.
        arrays_of: figures per image of models, by what they are called.
    """
    of_models = {name: errors_of(arrays) for name, arrays in arrays_of.items()}
    shown = {name: errors for name, errors in of_models.items() if errors["denoised"]}
    if not shown:
        return False
    first = next(iter(shown.values()))
    layers = list(first["denoised"])
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    lines = {"without denoiser": first["undenoised"]}
    lines |= {name: errors["denoised"] for name, errors in shown.items() if list(errors["denoised"]) == layers}
    for number, (name, errors) in enumerate(lines.items()):
        means = [float(np.mean(errors[layer])) for layer in layers]
        axes.plot(means, marker="o", markersize=3, label=name, linestyle="--" if number == 0 else "-")
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    axes.set_ylabel("relative error, mean")
    axes.set_ylim(bottom=0)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, metadata={"Software": None})
    return True


def compare_errors(path: Path, folders: Mapping[str, Path]) -> bool:
    """Plot the errors of run directories as `write_errors` does, by what they are called."""
    there = {name: folder for name, folder in folders.items() if (folder / ARRAYS.format("internals")).is_file()}
    return write_errors(path, {name: read_figures(folder, "internals").arrays for name, folder in there.items()})
