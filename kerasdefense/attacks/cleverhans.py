"""cleverhans' TF2 attacks behind our contract: an independent reference, and the source of CW-L2 and SPSA."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import keras
import numpy as np
import tensorflow as tf
from cleverhans.tf2.attacks.carlini_wagner_l2 import carlini_wagner_l2
from cleverhans.tf2.attacks.fast_gradient_method import fast_gradient_method
from cleverhans.tf2.attacks.momentum_iterative_method import momentum_iterative_method
from cleverhans.tf2.attacks.projected_gradient_descent import projected_gradient_descent
from cleverhans.tf2.attacks.spsa import spsa

from kerasdefense import losses
from kerasdefense.attacks import norms
from kerasdefense.attacks.base import Attack, AttackResult
from kerasdefense.attacks.objectives import check_logits
from kerasdefense.types import LogitsFn, UsageError

_ORDER = {"linf": np.inf, "l2": 2}


@dataclasses.dataclass(frozen=True)
class CleverHansAttack(Attack):
    """An attack of cleverhans 4, called eagerly on logits.

    cleverhans draws from TensorFlow's global generator, which is seeded here from the first example's seed: its random
    starts are repeatable, but depend on the batch. Its result is projected to the ball, and an example that it moved
    out of the ball (only CW-L2, which minimises the distance, can) is given back unperturbed. `queries` counts steps.

    Attributes:
        steps: iterations; ignored by the one-step FGM.
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
        """Call cleverhans."""
        raise UsageError("use one of the cleverhans attacks: fgm, pgd, mim, cw_l2, spsa")


@keras.saving.register_keras_serializable(package="kerasdefense")
@dataclasses.dataclass(frozen=True)
class CleverHansFGM(CleverHansAttack):
    """cleverhans' fast gradient method."""

    steps: int = 1

    def perturb(self, logits_fn: LogitsFn, image: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
        """Take one step of length epsilon."""
        return fast_gradient_method(
            logits_fn, image, self.epsilon, _ORDER[self.norm], clip_min=0.0, clip_max=1.0, y=label
        )


@keras.saving.register_keras_serializable(package="kerasdefense")
@dataclasses.dataclass(frozen=True)
class CleverHansPGD(CleverHansAttack):
    """cleverhans' projected gradient descent, with our default step of 2.5 epsilon / steps, at most epsilon."""

    random_start: bool = True

    def perturb(self, logits_fn: LogitsFn, image: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
        """Take `steps` steps from a random start."""
        return projected_gradient_descent(
            logits_fn,
            image,
            self.epsilon,
            min(2.5 * self.epsilon / self.steps, self.epsilon),
            self.steps,
            _ORDER[self.norm],
            clip_min=0.0,
            clip_max=1.0,
            y=label,
            rand_init=self.random_start,
            sanity_checks=False,
        )


@keras.saving.register_keras_serializable(package="kerasdefense")
@dataclasses.dataclass(frozen=True)
class CleverHansMIM(CleverHansAttack):
    """cleverhans' momentum iterative method, with a step of 2.5 epsilon / steps and decay 1."""

    def perturb(self, logits_fn: LogitsFn, image: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
        """Take `steps` steps along the accumulated gradient."""
        step_size = 2.5 * self.epsilon / self.steps
        return momentum_iterative_method(
            logits_fn,
            image,
            self.epsilon,
            step_size,
            self.steps,
            _ORDER[self.norm],
            clip_min=0.0,
            clip_max=1.0,
            y=label,
        )


@keras.saving.register_keras_serializable(package="kerasdefense")
@dataclasses.dataclass(frozen=True)
class CleverHansCWL2(CleverHansAttack):
    """cleverhans' Carlini-Wagner L2 attack; `steps` per binary search of five.

    cleverhans takes any given label for a target, so it is left to start from the predicted class: on an image that is
    already misclassified it may come back to the right one.
    """

    only_norm: ClassVar[str] = "l2"
    norm: str = "l2"
    epsilon: float = 0.5
    steps: int = 100

    def perturb(self, logits_fn: LogitsFn, image: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
        """Minimise distance plus margin loss."""
        del label
        found = carlini_wagner_l2(
            logits_fn,
            image,
            batch_size=image.shape[0],
            max_iterations=self.steps,
            learning_rate=1e-2,
            initial_const=1.0,
        )
        return tf.convert_to_tensor(found)


@keras.saving.register_keras_serializable(package="kerasdefense")
@dataclasses.dataclass(frozen=True)
class CleverHansSPSA(CleverHansAttack):
    """cleverhans' gradient-free SPSA on the margin, 128 samples a step, image by image as it asks for."""

    only_norm: ClassVar[str] = "linf"
    steps: int = 20

    def perturb(self, logits_fn: LogitsFn, image: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
        """Estimate the gradient from paired samples and follow it with Adam."""
        return tf.concat(
            [
                spsa(
                    logits_fn,
                    image[i : i + 1],
                    label[i : i + 1],
                    self.epsilon,
                    self.steps,
                    clip_min=0.0,
                    clip_max=1.0,
                )
                for i in range(image.shape[0])
            ],
            axis=0,
        )
