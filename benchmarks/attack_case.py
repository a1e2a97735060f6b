"""What is attacked in a benchmark, and by what budget."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import keras
import numpy as np

from benchmarks.case import Case
from kerasdefense.attacks import APGD, PGD, Square
from kerasdefense.evaluation import PlannedAttack

TINY = 1e-4
"""A radius in which no image falls: searches go on to their last step, and all do the same work."""
_NAMES = {"pgd": "PGD", "apgd": "APGD", "square": "Square"}
_CANDIDATES = 4


@dataclasses.dataclass(frozen=True)
class Budget:
    """An L-inf attack that every library has, at a budget that all of them are given.

    Attributes:
        kind: "pgd" with random start and a step of 2.5 epsilon / steps, "apgd" on the cross-entropy with one start, or
            "square" with one start, its schedule stretched to the budget.
        steps: gradient steps; for "square" queries.
        epsilon: radius, as a fraction of the [0, 1] range.
    """

    kind: str
    steps: int
    epsilon: float

    @property
    def name(self) -> str:
        """The attack in words."""
        return f"{_NAMES[self.kind]}-{self.steps}"

    @property
    def planned(self) -> PlannedAttack:
        """The attack as a suite of ours names it."""
        if self.kind == "square":
            return PlannedAttack("square", Square("linf", self.epsilon, queries=self.steps, rescale=True), "margin")
        attack = {"pgd": PGD, "apgd": APGD}[self.kind]
        return PlannedAttack(self.kind, attack("linf", self.epsilon, steps=self.steps))


class Target(NamedTuple):
    """What is attacked.

    Attributes:
        model: Keras model from images to logits.
        image: float32 [n, h, w, c] in [0, 1].
        label: int32 [n].
    """

    model: keras.Model
    image: np.ndarray
    label: np.ndarray

    def is_right(self, image: np.ndarray) -> np.ndarray:
        """Return whether each of `image` [n, h, w, c] is given its label, bool [n]."""
        return np.argmax(self.model(image, training=False), axis=1) == self.label


@dataclasses.dataclass(frozen=True)
class AttackCase:
    """An attack to time, on a network with fresh weights.

    Attributes:
        model: backbone and images; its batch size is how many there are, all attacked at once.
        kind: as of a Budget.
        steps: as of a Budget.
        rounds: how often it is timed at most, long as it takes.
    """

    model: Case
    kind: str
    steps: int
    rounds: int

    @property
    def model_name(self) -> str:
        """What is attacked, in words."""
        return self.model.architecture

    @property
    def name(self) -> str:
        """The attack and the number of images, in words."""
        return f"{self.budget.name}, {self.model.batch_size} images"

    @property
    def budget(self) -> Budget:
        """The attack, so narrow that nothing falls."""
        return Budget(self.kind, self.steps, TINY)

    def make_target(self) -> Target:
        """Return the network and images of noise of which it is surest, labelled by its own answers."""
        model, count = self.model.make_classifier(), self.model.batch_size
        image = dataclasses.replace(self.model, batch_size=_CANDIDATES * count).batch()["image"]
        logits = model(image, training=False).numpy()
        second, first = np.sort(logits, axis=1)[:, -2:].T
        surest = np.argsort(second - first)[:count]
        return Target(model, image[surest], np.argmax(logits[surest], axis=1).astype(np.int32))
