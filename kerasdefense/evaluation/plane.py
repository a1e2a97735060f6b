"""A picture of the plane in which clean embeddings spread the most, and of where an attack moves them in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from kerasdefense.evaluation.geometry import Embeddings, directions
from kerasdefense.files import replacing

_DPI, _ROWS_OF_LEGEND = 110, 20


def write_plane(path: Path, embeddings: Embeddings, names: Sequence[str], *, attack: str) -> None:
    """Write, atomically, the embeddings at length 1 in the plane of the clean ones' first two principal components.

    The clean images stand on the left, the attacked ones, projected alike, on the right at the same scale. Nothing is
    written where the clean ones span no plane: fewer than two images or dimensions, or all embeddings the same.

    Args:
        path: the .png file.
        embeddings: of the images.
        names: of the classes, in label order.
        attack: what the attack is called.
    """
    clean, adversarial = directions(embeddings.clean), directions(embeddings.adversarial)
    if min(clean.shape) < 2 or not np.ptp(clean, axis=0).any():
        return
    plane = PCA(2, svd_solver="full").fit(clean)
    columns = math.ceil(len(np.unique(embeddings.label)) / _ROWS_OF_LEGEND)
    figure = Figure(figsize=(8.0 + 1.2 * columns, 4.2), layout="constrained")
    figure.suptitle(f"Embeddings of {len(clean):,} test images, at length 1", fontsize=11)
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, title, direction in zip(axes, ("clean", f"after {attack}"), (clean, adversarial)):
        point = plane.transform(direction)
        for number in np.unique(embeddings.label):
            of_class = point[embeddings.label == number]
            style = {"color": _colour(number, len(names)), "label": names[number], "alpha": 0.7}
            axis.scatter(*of_class.T, s=9, linewidths=0, **style)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel(_words("first", plane.explained_variance_ratio_[0]), fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(_words("second", plane.explained_variance_ratio_[1]), fontsize=8)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right upper", ncols=columns, fontsize=8, markerscale=2, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, metadata={"Software": None})


def _words(which: str, share: float) -> str:
    return f"{which} principal component ({100 * share:.0f} % of the clean variance)"


def _colour(number: int, classes: int) -> Any:
    name = "tab10" if classes <= 10 else "tab20" if classes <= 20 else "turbo"
    colours = matplotlib.colormaps[name]
    return colours(int(number)) if classes <= 20 else colours(number / (classes - 1))
