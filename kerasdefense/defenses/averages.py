"""Averages of the weights, which some optimizers keep besides (`use_ema`), in the place of the weights themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any


@contextlib.contextmanager
def averages_in_place(optimizers: Sequence[tuple[Any, Sequence[Any]]]) -> Iterator[None]:
    """Put the averages of every optimizer that keeps some in the place of its variables, and put these back after.

    Args:
        optimizers: each with the variables that it updates.
    """
    averaging = [(optimizer, variables) for optimizer, variables in optimizers if optimizer.use_ema]
    raw = [[variable.numpy() for variable in variables] for _, variables in averaging]
    for optimizer, variables in averaging:
        optimizer.finalize_variable_values(variables)
    try:
        yield
    finally:
        for (_, variables), values in zip(averaging, raw):
            for variable, value in zip(variables, values):
                variable.assign(value)
