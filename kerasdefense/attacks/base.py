"""What every attack is: a frozen description of a threat model and a search, which knows no model."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import tensorflow as tf

from kerasdefense.attacks import norms
from kerasdefense.types import UsageError


class AttackResult(NamedTuple):
    """What an attack found.

    Attributes:
        image: float32 [batch, height, width, channels], in the ball and in [0, 1].
        success: bool [batch], whether `success_fn` held at `image`; all false where none was given.
        loss: float32 [batch], the objective at `image`.
        queries: int32 [batch], passes through the model that were spent on each example.
    """

    image: tf.Tensor
    success: tf.Tensor
    loss: tf.Tensor
    queries: tf.Tensor


@dataclasses.dataclass(frozen=True)
class Attack:
    """The threat model: a norm, a radius and the box [0, 1].

    Attributes:
        norm: "linf" or "l2".
        epsilon: radius of the ball, as a fraction of the [0, 1] range (8/255, say).
    """

    takes: ClassVar[str] = "loss"
    """`loss`: call `attack(loss_fn, image, context, seed)`; `logits`: call `attack(logits_fn, image, label, seed)`."""

    norm: str = "linf"
    epsilon: float = 8 / 255

    def __post_init__(self) -> None:
        """Check the threat model."""
        norms.check_norm(self.norm)
        if not (math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise UsageError(f"epsilon must be a finite number of at least 0, not {self.epsilon}")

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments, as Keras serialisation asks for them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Attack:
        """Build the attack from `get_config()`."""
        return cls(**config)
