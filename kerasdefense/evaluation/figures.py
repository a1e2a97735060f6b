"""Figures that an evaluation keeps of each image: read back, and put side by side with paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
from rich.table import Table

from kerasdefense.evaluation.compare import paired_difference, points
from kerasdefense.evaluation.geometry import Embeddings
from kerasdefense.evaluation.recorded import read_results
from kerasdefense.files import replacing
from kerasdefense.types import InputError

ARRAYS = "evaluation/{}.npz"
"""Where the arrays of a block of results.json lie in a run directory."""
PICTURE = "evaluation/embedding.png"
"""Where the picture of the embeddings lies, if there are such."""


class Figures(NamedTuple):
    """What was measured: a block of results.json, arrays by name (`index`, and each figure per image), embeddings.

    A figure is NaN at an image for which it has no meaning, and then not counted in its mean.
    """

    results: dict[str, Any]
    arrays: dict[str, np.ndarray]
    embeddings: Optional[Embeddings] = None

    def write(self, path: Path) -> None:
        """Write the arrays to an .npz file, atomically."""
        with replacing(path) as temporary:
            np.savez_compressed(temporary, **self.arrays)


def read_figures(folder: Path, block: str) -> Figures:
    """Read a block and its arrays from a run directory.

    Raises:
        InputError: results.json is damaged, or has no such block.
    """
    path = folder / ARRAYS.format(block)
    results = read_results(folder).get(block)
    if not results:
        raise InputError(f"{path} is of another evaluation than results.json; evaluate again")
    with np.load(path) as stored:
        return Figures(results, dict(stored))


def compare_figures(
    folders: Mapping[str, Path],
    block: str,
    *,
    alike: Sequence[str],
    title: str,
    words: str = "",
    in_percent: bool = False,
    seed: int = 0,
) -> Optional[Table]:
    """Return a table of what runs measured alike, with paired differences from the first run.

    Args:
        folders: run directories by what they are called; None is returned unless all of them hold such figures.
        block: what is compared, a block of results.json.
        alike: what of it must be the same in all runs.
        title: of the table, and what runs that differ are said not to compare as.
        words: to put before the caption.
        in_percent: whether figures are shares, to be shown in percent and their differences in points.
        seed: seed of the bootstrap.

    Raises:
        InputError: runs that were not measured alike, or not on the same images.
    """
    if not all((folder / ARRAYS.format(block)).is_file() for folder in folders.values()):
        return None
    (name_of_first, first), *others = [(name, read_figures(folder, block)) for name, folder in folders.items()]
    for name, each in others:
        same = all(each.results[key] == first.results[key] for key in alike)
        if not same or not np.array_equal(each.arrays["index"], first.arrays["index"]):
            raise InputError(f"{name_of_first} and {name} do not compare {title}: other images or another attack")
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.caption = (
        f"{words}n = {first.results['n']}. Means; below them the difference from the first run"
        f"{' in percentage points' if in_percent else ''}, paired on the same images, with the percentile bootstrap's "
        "95 % interval; *: it excludes 0."
    )
    of_all = [each.results.get("figures", {}) for each in (first, *(each for _, each in others))]
    single = [key for key in of_all[0] if key not in first.arrays and any(key in each for each in of_all[1:])]
    if single:
        table.caption += " Ratios are of all images at once: below each its own 95 % interval, and nothing is paired."
    for heading in ("figure", *folders):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for figure in (key for key in first.arrays if key != "index" and any(key in each.arrays for _, each in others)):
        reference = first.arrays[figure]
        cells = [_beside(each.arrays.get(figure), reference, in_percent, seed) for _, each in others]
        table.add_row(figure.replace("_", " "), _mean(reference, in_percent), *cells)
    for figure in single:
        table.add_row(figure.replace("_", " "), *(_alone(each.get(figure)) for each in of_all))
    return table


def _mean(values: np.ndarray, in_percent: bool) -> str:
    mean = np.nanmean(values)
    return f"{100 * mean:.1f} %" if in_percent else f"{mean:.4g}"


def _alone(figure: Optional[Mapping[str, Any]]) -> str:
    """Return a figure that no image has for itself and, below it, its interval."""
    return "-" if figure is None else "{:.4g}\n{:.4g} to {:.4g}".format(figure["value"], *figure["ci95"])


def _beside(values: Optional[np.ndarray], reference: np.ndarray, in_percent: bool, seed: int) -> str:
    """Return a mean and, below it, its difference from that of the reference."""
    if values is None:
        return "-"
    both = ~np.isnan(values) & ~np.isnan(reference)
    difference = paired_difference(values[both], reference[both], seed=seed)
    value, (low, high) = difference["value"], difference["ci95"]
    plain = f"{value:+.3g} ({low:+.3g} to {high:+.3g}){'*' if difference['significant'] else ''}"
    return f"{_mean(values, in_percent)}\n{points(difference) if in_percent else plain}"
