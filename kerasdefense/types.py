"""The concepts of the package, each named once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Callable

import tensorflow as tf

Activations = Mapping[str, tf.Tensor]
"""Named outputs of a backbone: `feature_map` [batch, h, w, c], `embedding` [batch, d], `logits` [batch, classes]."""

ActivationsFn = Callable[[tf.Tensor], Activations]
"""`activations_fn(image) -> Activations`, of which a model may lack all but the logits."""

Context = Any
"""A nest of per-example tensors (label, target, reference features), each with leading axis [batch]."""

LossFn = Callable[[tf.Tensor, Context], tf.Tensor]
"""`loss_fn(image, context) -> [batch]`, which an attack maximises."""

SuccessFn = Callable[[tf.Tensor, Context], tf.Tensor]
"""`success_fn(image, context) -> bool [batch]`: true where the attack has reached its goal."""

LogitsFn = Callable[[tf.Tensor], tf.Tensor]
"""`logits_fn(image) -> logits [batch, classes]`."""

PathFn = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
"""`path(image, seed) -> logits [batch, classes]`, with `seed` int32 [batch, 2] keyed per example."""


class UsageError(ValueError):
    """A command, flag or configuration that cannot be carried out; one line, exit code 2."""


class InputError(ValueError):
    """Data, a file or a model that is not what it should be; one line, exit code 1."""


def look_up(registry: Mapping[str, Any], name: str, kind: str) -> Any:
    """Return `registry[name]`, or raise a UsageError that lists the valid names of this `kind`."""
    if name not in registry:
        raise UsageError(f"unknown {kind} {name!r}; valid: {', '.join(sorted(registry))}")
    return registry[name]
