"""What open-set recognition is measured on, and how."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import tensorflow as tf

from kerasdefense.types import UsageError

FIT_ON = ("clean", "adv", "both")


class Unknown(NamedTuple):
    """Images that are of no known class: batches as of `Images`, "near" or "far" or "" for neither."""

    name: str
    group: str
    images: tf.data.Dataset


class Images(NamedTuple):
    """What open-set recognition is measured on, as batches of dicts with image, label and index.

    Attributes:
        train: training images of known classes, not augmented; detectors are fitted on them.
        validation: of known classes; thresholds are set on them.
        known: test images of known classes.
        unknown: test images of no known class, a set at a time; the score is attacked on the first of them.
        candidates: adversarial images [n, h, w, c] of the first test images of known classes that another evaluation
            found, to be tried as well; None = none.
    """

    train: tf.data.Dataset
    validation: tf.data.Dataset
    known: tf.data.Dataset
    unknown: Sequence[Unknown]
    candidates: Optional[np.ndarray] = None


class OpenSetOptions(NamedTuple):
    """How it is measured.

    Attributes:
        retention: share of validation images that the threshold must accept.
        fit_on: "clean" images, "adv"ersarial ones of PGD-10, or "both".
        fit_examples: training images to fit on, from the first on; 0 = all.
        examples: known and as many unknown test images whose score is attacked; 0 = none.
        steps: of an attack on the score.
        starts: of it.
        queries: of Square on the score; 0 = none.
        joint: whether to look for images that are mistaken and accepted.
        seed: of the attacks.
        chunk_size: images attacked at once.
        progress: whether to show progress bars.
        folder: where finished attacks are kept, to go on after a stop; None = nowhere.
    """

    retention: float = 0.95
    fit_on: str = "clean"
    fit_examples: int = 0
    examples: int = 300
    steps: int = 100
    starts: int = 1
    queries: int = 0
    joint: bool = True
    seed: int = 0
    chunk_size: int = 256
    progress: bool = False
    folder: Optional[Path] = None

    def check(self) -> None:
        """Raise a UsageError for an option that cannot be."""
        if self.fit_on not in FIT_ON:
            raise UsageError(f"fit_on must be one of {', '.join(FIT_ON)}, not {self.fit_on!r}")
        if not 0 < self.retention < 1:
            raise UsageError(f"retention must be above 0 and below 1, not {self.retention:g}")
        if min(self.fit_examples, self.examples, self.queries) < 0 or min(self.steps, self.starts) < 1:
            raise UsageError("fit_examples, examples and queries must be at least 0, steps and starts at least 1")
