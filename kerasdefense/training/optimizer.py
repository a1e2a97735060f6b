"""From a configuration to an optimizer with its learning-rate schedule."""

from __future__ import annotations

import warnings
from typing import Any

import keras

from kerasdefense import config
from kerasdefense.types import UsageError

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # the notice of TFA's end of life
    from tensorflow_addons.optimizers import TriangularCyclicalLearningRate


def make_optimizer(train: config.Train, steps: int) -> keras.optimizers.Optimizer:
    """Return the optimizer for a run of `steps` steps."""
    if train.ema_decay >= 1:
        raise UsageError(f"--train_ema_decay={train.ema_decay:g} must be below 1, or the average never moves")
    settings: dict[str, Any] = {
        "learning_rate": _learning_rate(train, steps),
        "weight_decay": train.weight_decay or None,
        "jit_compile": train.jit_compile,
    }
    if train.ema_decay:
        settings |= {"use_ema": True, "ema_momentum": train.ema_decay}
    if train.optimizer == "adam":
        return keras.optimizers.Adam(**settings)
    return keras.optimizers.SGD(momentum=train.momentum, **settings)


def _learning_rate(train: config.Train, steps: int) -> Any:
    """Return the learning rate, or its schedule over `steps` steps."""
    shares = _drops(train)
    if train.schedule == "triangular":
        return TriangularCyclicalLearningRate(0.0, train.learning_rate, step_size=max(1, steps // 2))
    if train.schedule == "cosine":
        return keras.optimizers.schedules.CosineDecay(train.learning_rate, steps)
    if train.schedule == "step":
        boundaries = [round(share * steps) - 1 for share in shares]  # the last step at a rate
        values = [train.learning_rate * train.drop_factor**number for number in range(len(shares) + 1)]
        return keras.optimizers.schedules.PiecewiseConstantDecay(boundaries, values)
    return train.learning_rate


def _drops(train: config.Train) -> list[float]:
    try:
        shares = [float(each) for each in train.drops.split(",")]
    except ValueError:
        shares = []
    if not shares or shares != sorted(set(shares)) or not 0 < shares[0] <= shares[-1] < 1:
        raise UsageError(f"--train_drops={train.drops!r} must be rising shares of the run, such as 0.5,0.75")
    if not 0 < train.drop_factor <= 1:
        raise UsageError(f"--train_drop_factor={train.drop_factor:g} must be above 0 and at most 1")
    return shares
