"""What attacks leave right of published models: ours against those of other libraries, at equal budget."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from benchmarks.attack_case import Budget, Target
from benchmarks.attack_peers import attack_peers
from benchmarks.attacks import EVALUATION, evaluation
from benchmarks.tables import Column, Row
from kerasdefense import config, data
from kerasdefense.evaluation.compare import paired_difference
from kerasdefense.types import InputError

DATA = "cifar10"
MODELS = Path(__file__).parents[1] / "saved_models"
SEED = 0
COLUMNS = (
    Column("clean", "clean", ".1%"),
    Column("after ours", "ours", ".1%"),
    Column("after theirs", "theirs", ".1%"),
    Column("ours - theirs", "difference", "+.1%"),
    Column("95 % from", "low", "+.1%", at_most=0.0),
    Column("to", "high", "+.1%"),
)


class StrengthCase(NamedTuple):
    """A published model, and what it is attacked by."""

    model: str
    budget: Budget

    @property
    def name(self) -> str:
        """Model and attack, in words."""
        return f"{self.model}, {self.budget.name}"


BUDGETS = tuple(Budget(kind, steps, 8 / 255) for kind, steps in (("pgd", 20), ("apgd", 100), ("square", 1000)))
CASES = tuple(
    StrengthCase(f"{defense}_cifar10_mini", budget)
    for defense in ("standard", "pgd_at", "trades")
    for budget in BUDGETS
)
QUICK_CASES = (StrengthCase(CASES[0].model, Budget("pgd", 3, 8 / 255)),)
IMAGES, QUICK_IMAGES = 256, 16


def title(images: int) -> str:
    """Return the title of the table."""
    return f"What is right after attacks of 8/255 (first {images} test images of {DATA})"


def missing(data_dir: str) -> str:
    """Return what is not there of that which strength is measured on, in words; empty if all is."""
    if not data_dir:
        return f"--data_dir is not given, a TFDS folder that holds {DATA}"
    if not (Path(data_dir) / DATA).is_dir():
        return f"there is no {DATA} in --data_dir={data_dir}"
    lacking = sorted({case.model for case in CASES if not (MODELS / case.model).is_dir()})
    return f"no {', '.join(lacking)} in {MODELS}" if lacking else ""


def first_images(data_dir: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first test images float32 [n, h, w, c] in [0, 1] and their labels int32 [n]."""
    splits = data.load(config.Data(name=DATA, dir=data_dir, validation_fraction=0.04))
    (batch,) = splits.test.batches(count).take(1).as_numpy_iterator()
    return batch["image"], batch["label"]


@functools.lru_cache(maxsize=1)
def load_classifier(name: str) -> keras.Model:
    """Return a published model as one from images to logits."""
    backbone = keras.models.load_model(MODELS / name / "model.keras", compile=False).backbone
    return keras.Model(backbone.input, backbone.output["logits"])


def rows_of_strength(case: StrengthCase, target: Target) -> list[Row]:
    """Return the figures of a case, a row for each other library that has the attack.

    Every library attacks the same images with the settings of `attack_peers`, from random starts of its own; ours draws
    from seed 0, and so do the generators that the others draw from. All candidates are clipped to the ball and to
    [0, 1], and scored again by the model itself. Right is what is right clean and after the attack. The interval is
    that of the paired difference; only where all of it lies above 0 are ours weaker.
    """
    clean = target.is_right(target.image)
    contenders = {EVALUATION: evaluation(case.budget, target), **attack_peers(case.budget, target)}
    right = {}
    for name, attack in contenders.items():
        np.random.seed(SEED)
        tf.random.set_seed(SEED)
        right[name] = clean & target.is_right(clipped(attack(), target.image, case.budget.epsilon))
    ours, rows = right.pop(EVALUATION), []
    for name, theirs in right.items():
        difference = paired_difference(ours, theirs, seed=SEED)
        low, high = difference["ci95"]
        accuracies = {"clean": clean.mean(), "ours": ours.mean(), "theirs": theirs.mean()}
        figures = {**accuracies, "difference": difference["value"], "low": low, "high": high}
        rows.append({"name": case.name, "strategy": name, **{key: float(value) for key, value in figures.items()}})
    return rows


def clipped(image_adv: np.ndarray, image: np.ndarray, epsilon: float) -> np.ndarray:
    """Return candidates within the L-inf ball around `image` and within [0, 1].

    Raises:
        InputError: candidates that are not finite.
    """
    if not np.isfinite(image_adv).all():
        raise InputError("an attack returned pixels that are NaN or infinite")
    return np.clip(np.clip(image_adv, image - epsilon, image + epsilon), 0, 1).astype(np.float32)
