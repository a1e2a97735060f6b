"""CAFA: the label-free attack on a classifier's class activation features."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import keras

from kerasdefense.attacks.pgd import PGD
from kerasdefense.types import UsageError


@keras.saving.register_keras_serializable(package="kerasdefense")
@dataclasses.dataclass(frozen=True)
class CAFA(PGD):
    """Class-activation feature-based attack: PGD away from the class activation features of the clean image.

    1. Start at a uniform random point of the ball, clipped to [0, 1].
    2. `steps` times: step along the sign of the gradient (l2: its direction) of the squared distance between the class
       activation features of the image and those of the clean one, which are computed once and stand in
       `context["reference"]`; project to ball and box.
    3. Return the last iterate.

    Its objective is `objectives.class_activation`; no label is used, and the prediction need not change. `steps=0` is
    the random start alone.

    Attributes:
        steps: gradient steps, 100 in the authors' code.
        step_size: length of a step in image units; None = 0.01 in a ball of 8/255, and as much of any other radius.
        random_start: always true: at the clean image the gradient is zero, and no step would ever be taken.

    Source: the code released with CAFD (Zhou et al. 2021, ICCV; arXiv 2104.09197). Deviations: theirs compares features
    rectified, brought to [0, 1] by the extremes of the whole batch and resized to the image, which ties images to those
    beside them (`legacy_cam` of the defense); 40 steps, theirs 100.
    """

    steps: int = 40
    keep: str = "last"

    fewest_steps: ClassVar[int] = 0

    def __post_init__(self) -> None:
        """Check the search."""
        super().__post_init__()
        if not self.random_start:
            raise UsageError("cafa needs a random start: at the clean image the gradient of its distance is zero")

    @property
    def length(self) -> float:
        """The length of a step."""
        return self.step_size if self.step_size is not None else 0.01 * self.epsilon / (8 / 255)
