"""A stage: what a defense needs trained before itself, such as a teacher or a classifier."""

from __future__ import annotations

import dataclasses
from typing import Callable

import keras

from kerasdefense import config


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training before the defense's own, with its own selection, checkpoints and saved model.

    Attributes:
        name: its folder in the run directory, and the constructor argument of the defense that takes its result.
        run: the configuration that it is trained by.
        take: what of the trained or saved model is handed on.
        saved: path of a saved model that stands in for the training, the flag `--defense_<name>`; empty = train.
        must_know: whether that must already tell the data's classes apart better than by chance.
    """

    name: str
    run: config.Run
    take: Callable[[keras.Model], keras.Model]
    saved: str = ""
    must_know: bool = False
