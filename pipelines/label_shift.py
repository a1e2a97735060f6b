"""Whether the classes of one set of images come in other shares than those of another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf
from scipy import stats

from kerasdefense.types import InputError

SIGNIFICANCE = 1e-3
"""Chance at most that shares which are the same are called shifted."""

_FEW = 5
"""Images that a chi-square test expects of each class at least (Cochran's rule)."""


def label_shift(counts: Sequence[int], reference: Sequence[int], most: float) -> str:
    """Say how the shares of classes differ from those of a reference; empty = not by more than chance and `most`.

    They are shifted where the total variation distance of both, sum_k |p_k - q_k| / 2, exceeds `most` and a chi-square
    test of both counts is significant; or where a class of the reference has no image at all, which by its share there
    would be as unlikely. So a few images raise no false alarm.

    Args:
        counts: images of each class.
        reference: the same of the images that they are compared with.
        most: distance that is let pass, in [0, 1]: the share of images that would have to be of another class.
    """
    found, others = np.asarray(counts, float), np.asarray(reference, float)
    if not (found.any() and others.any()):
        return ""
    share, expected = found / found.sum(), others / others.sum()
    distance = np.abs(share - expected).sum() / 2
    if distance > most and _p_value(found, others) < SIGNIFICANCE:
        label = int(np.argmax(np.abs(share - expected)))
        told = f"of class {label} has a share of {share[label]:.1%} instead of {expected[label]:.1%}"
        return f"{told}, and all classes together differ by {distance:.1%}"
    chance = np.where(found == 0, (1 - expected) ** found.sum(), 1)
    missing = int(np.argmin(chance))
    if chance[missing] < SIGNIFICANCE / len(found):
        return f"of class {missing} is missing, and has a share of {expected[missing]:.1%} elsewhere"
    return ""


def label_shifts(counts: Mapping[str, Sequence[int]], most: float, reference: str) -> dict[str, str]:
    """Return by split what is shifted: others against train, and train against an earlier one.

    Args:
        counts: images of each class, by split.
        most: as of `label_shift`.
        reference: file in which `counts` were kept as JSON, which may be remote, and not be there yet; empty = none.

    Raises:
        InputError: the reference is there and no such file, or of another number of classes.
    """
    shifts = {name: label_shift(each, counts["train"], most) for name, each in counts.items() if name != "train"}
    if reference and tf.io.gfile.exists(reference):
        before = _read(reference, len(counts["train"]))
        shifts["train"] = label_shift(counts["train"], before, most)
    return {name: shift for name, shift in shifts.items() if shift}


def _read(path: str, classes: int) -> list[int]:
    try:
        with tf.io.gfile.GFile(path) as file:
            counts = [int(count) for count in json.loads(file.read())["train"]]
    except (tf.errors.OpError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no file of label shares that an earlier validation wrote") from error
    if len(counts) != classes:
        raise InputError(
            f"{path}: is of {len(counts)} classes, but the examples have {classes}; remove it to begin anew"
        )
    return counts


def _p_value(counts: np.ndarray, others: np.ndarray) -> float:
    """Return that of a chi-square test, for which neighbouring classes of few images are put together."""
    table = np.stack([counts, others])
    expected = np.cumsum(table.sum(0)) * table.sum(1).min() / table.sum()
    pooled = np.stack([np.bincount((expected // _FEW).astype(int), each) for each in table])
    pooled = pooled[:, pooled.any(axis=0)]
    return float(stats.chi2_contingency(pooled).pvalue) if pooled.shape[1] > 1 else 1.0
