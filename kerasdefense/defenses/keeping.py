"""A trained defense as it goes to disk."""

from __future__ import annotations

from kerasdefense.backbones import in_precision
from kerasdefense.defenses.base import Defense


def as_kept(defense: Defense, *, optimizer: bool) -> Defense:
    """Return a copy that computes in float32, whatever it was trained in, with or without its optimizers."""
    copy = type(defense).from_config(in_precision(defense.get_config(), "float32"))
    counters = {id(variable) for metric in defense.metrics for variable in metric.variables}
    copy.set_weights([variable.numpy() for variable in defense.weights if id(variable) not in counters])
    compiled = defense.get_compile_config() if optimizer else None
    if compiled:
        copy.compile_from_config(compiled)
        for (kept, _), (trained, _) in zip(copy.optimizers(), defense.optimizers()):
            for variable, value in zip(kept.variables, trained.variables):
                variable.assign(value)
    return copy
