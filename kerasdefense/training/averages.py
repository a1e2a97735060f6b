"""Averages of the weights: what is validated where an optimizer keeps some."""

from __future__ import annotations

import contextlib
from typing import Optional

import keras


class ValidateAverages(keras.callbacks.Callback):
    """Validate the averages of the weights, and train on from the weights themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.swapped = contextlib.ExitStack()

    def on_test_begin(self, logs: Optional[dict[str, float]] = None) -> None:
        """Put the averages in the place of the weights."""
        self.swapped.enter_context(self.model.averaged())

    def on_test_end(self, logs: Optional[dict[str, float]] = None) -> None:
        """Put the weights back."""
        self.swapped.close()
