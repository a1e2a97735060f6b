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

from kerasdefense.attacks.external import External
from kerasdefense.types import LogitsFn, UsageError

_ORDER = {"linf": np.inf, "l2": 2}


@dataclasses.dataclass(frozen=True)
class CleverHansAttack(External):
    """An attack of cleverhans 4.

    As `External`; only CW-L2, which minimises the distance, can leave the ball.

    Attributes:
        steps: iterations; ignored by the one-step FGM.
    """

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
