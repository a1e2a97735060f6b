"""What attacks of other libraries have in common: run eagerly on logits, then held to our contract."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import tensorflow as tf

from kerasdefense import losses
from kerasdefense.attacks import norms
from kerasdefense.attacks.base import Attack, AttackResult
from kerasdefense.attacks.objectives import check_logits
from kerasdefense.types import LogitsFn, UsageError


@dataclasses.dataclass(frozen=True)
class External(Attack):
    """An attack of another library, called eagerly on logits.

    Such libraries draw from TensorFlow's global generator, which is seeded here from the first example's seed: their
    results are repeatable, but depend on the batch. An example that was moved out of the ball is given back
    unperturbed, and what is left is projected against rounding. `queries` counts steps.

    Attributes:
        steps: iterations.
        restarts: always 1.
    """

    takes: ClassVar[str] = "logits"
    only_norm: ClassVar[str] = ""

    steps: int = 10
    restarts: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Check the threat model."""
        super().__post_init__()
        if self.only_norm and self.norm != self.only_norm:
            raise UsageError(f"{type(self).__name__} attacks in the {self.only_norm} norm only, not {self.norm}")
        if self.steps < 1:
            raise UsageError(f"steps must be at least 1, not {self.steps}")

    def __call__(self, logits_fn: LogitsFn, image: tf.Tensor, label: tf.Tensor, seed: tf.Tensor) -> AttackResult:
        """Perturb `image` [batch, h, w, c] in [0, 1] so that `logits_fn` misses `label` [batch]."""
        image, label = tf.convert_to_tensor(image, tf.float32), tf.convert_to_tensor(label, tf.int32)
        check_logits(logits_fn(image))
        tf.random.set_seed(int(seed[0, 0]) ^ int(seed[0, 1]))
        found = self.perturb(logits_fn, image, label)
        inside = norms.length(found - image, self.norm) <= self.epsilon * (1 + 1e-4) + 1e-6
        found = tf.where(inside[:, None, None, None], found, image)
        image_adv = norms.project(found, image, epsilon=self.epsilon, norm=self.norm)
        logits = logits_fn(image_adv)
        return AttackResult(
            image=image_adv,
            success=tf.argmax(logits, axis=-1, output_type=tf.int32) != label,
            loss=losses.cross_entropy(logits, label),
            queries=tf.fill([image.shape[0]], self.steps),
        )

    def perturb(self, logits_fn: LogitsFn, image: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
        """Call the library."""
        raise TypeError(f"{type(self).__name__} does not say what it calls")
