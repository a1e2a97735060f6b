"""foolbox's minimisers behind our contract: DDN, and the decision-based Boundary and HopSkipJump attacks.

foolbox is an optional extra: this module imports without it, and so do the attacks' descriptions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import warnings
from typing import Any, ClassVar

import keras
import tensorflow as tf

from kerasdefense.attacks import norms
from kerasdefense.attacks.base import AttackResult
from kerasdefense.attacks.external import External
from kerasdefense.attacks.iterative import where
from kerasdefense.types import InputError, LogitsFn, UsageError

_NOBODY = -1
"""A label that no image is given: what has it counts as fooled from the start."""
_BEYOND = 1.01
"""How much further than to the boundary a perturbation goes."""
_AROUND = 2
"""Passes before and after a walk, which look at what it begins with and what it found."""
_NOISES, _BLENDS = 50, 20
"""Noise images tried for a starting point, and degrees of blending one in."""


def has_foolbox() -> bool:
    """Return whether foolbox is installed."""
    return importlib.util.find_spec("foolbox") is not None


def _import_foolbox() -> Any:
    if not has_foolbox():
        raise UsageError("this attack needs foolbox, which is not installed; install it with: pip install '.[bench]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it imports from where SciPy had its filters once
        import foolbox
    return foolbox


class _Counted:
    """A classifier, compiled, that counts its passes."""

    def __init__(self, logits_fn: LogitsFn) -> None:
        self._logits_fn = tf.function(logits_fn)
        self.passes = 0

    def __call__(self, image: tf.Tensor) -> tf.Tensor:
        self.passes += 1
        return self._logits_fn(image)


class _Spent(Exception):  # noqa: N818 - nothing went wrong
    """There are no passes left, or nothing is left to look for."""


class _Nearest:
    """A classifier for so many passes, which keeps the nearest image that fools of those that it was asked about.

    Attributes:
        found: float32 [batch, h, w, c]; the image itself where none fooled.
    """

    def __init__(
        self, logits_fn: LogitsFn, image: tf.Tensor, label: tf.Tensor, *, norm: str, epsilon: float, passes: int
    ) -> None:
        self._logits_fn, self._image, self._label = logits_fn, image, label
        self._norm, self._epsilon, self._left = norm, epsilon, passes
        self.found = image
        self._length = tf.fill(tf.shape(label), float("inf"))

    def __call__(self, image: tf.Tensor) -> tf.Tensor:
        if not self._left or bool(tf.reduce_all(self._length <= self._epsilon)):
            raise _Spent
        self._left -= 1
        logits = self._logits_fn(image)
        length = norms.length(image - self._image, self._norm)
        nearer = _fooled(logits, self._label) & (length < self._length)
        self.found, self._length = where(nearer, image, self.found), tf.where(nearer, length, self._length)
        return logits


@dataclasses.dataclass(frozen=True)
class FoolboxAttack(External):
    """An attack of foolbox 3, which looks for the smallest perturbation that fools.

    As `External`, but `queries` counts passes through the model. The perturbation found ends at the decision boundary,
    where rounding decides: it is made 1 % longer where that still fools.
    """

    def __call__(self, logits_fn: LogitsFn, image: tf.Tensor, label: tf.Tensor, seed: tf.Tensor) -> AttackResult:
        """Perturb `image` [batch, h, w, c] in [0, 1] so that `logits_fn` misses `label` [batch].

        Raises:
            UsageError: foolbox is not installed.
        """
        _import_foolbox()
        counted = _Counted(logits_fn)
        result = super().__call__(counted, image, label, seed)
        return result._replace(queries=tf.fill(tf.shape(result.queries), counted.passes))

    def perturb(self, logits_fn: LogitsFn, image: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
        """Call foolbox, and go a little past the boundary."""
        model = _import_foolbox().TensorFlowModel(logits_fn, bounds=(0, 1), device=image.device)
        found = self.minimise(model, image, label)
        further = tf.clip_by_value(image + _BEYOND * (found - image), 0.0, 1.0)
        inside = norms.length(further - image, self.norm) <= self.epsilon
        return where(_fooled(logits_fn(further), label) & inside, further, found)

    def minimise(self, model: Any, image: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
        """Return what foolbox finds near `image`, given its model, float32 [batch, h, w, c]."""
        raise UsageError("use one of the foolbox attacks: ddn, boundary, hop_skip_jump")


@keras.saving.register_keras_serializable(package="kerasdefense")
@dataclasses.dataclass(frozen=True)
class FoolboxDDN(FoolboxAttack):
    """foolbox's decoupled direction and norm attack: gradient steps on a sphere that grows and shrinks.

    Source: Rony et al. 2019. Deviations: see `FoolboxAttack`.
    """

    only_norm: ClassVar[str] = "l2"

    norm: str = "l2"
    epsilon: float = 0.5
    steps: int = 100

    def minimise(self, model: Any, image: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
        """Return the nearest point of `steps` that fools; the image where none does."""
        return _import_foolbox().attacks.DDNAttack(steps=self.steps).run(model, image, _criterion(label))


@dataclasses.dataclass(frozen=True)
class _FoolboxDecisionAttack(FoolboxAttack):
    """A walk along the decision boundary from an image of another class, which sees nothing but the predicted class.

    It begins at noise blended in, or where that does not fool, at another image of the batch.
    """

    def minimise(self, model: Any, image: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
        """Return where the walk ends; the image where it could not begin."""
        start, begun = _starting_points(model, image, label)
        criterion = _criterion(tf.where(begun, label, _NOBODY))
        try:
            found = self.walk(_import_foolbox().attacks).run(model, image, criterion, starting_points=start)
        except (AssertionError, ValueError) as error:  # of its checks that what fooled once still fools
            name = type(self).__name__
            raise InputError(
                f"{name} needs a classifier that answers an image alike each time; fix its noise"
            ) from error
        return where(begun, found, image)

    def walk(self, attacks: Any) -> Any:
        """Return the attack out of foolbox's module `attacks`."""
        raise TypeError(f"{type(self).__name__} does not say how it walks")


@keras.saving.register_keras_serializable(package="kerasdefense")
@dataclasses.dataclass(frozen=True)
class FoolboxBoundary(_FoolboxDecisionAttack):
    """foolbox's Boundary attack: random steps along the boundary and towards the image.

    Attributes:
        steps: proposals; the more, the nearer, up to foolbox's default of 25,000.
        step_size: length of both steps at first, as a share of the distance; it adapts.

    Source: Brendel et al. 2018. Deviations: those that foolbox documents; it draws one direction for the whole batch.
    """

    only_norm: ClassVar[str] = "l2"

    norm: str = "l2"
    epsilon: float = 0.5
    steps: int = 5000
    step_size: float = 0.01

    def __post_init__(self) -> None:
        """Check the search."""
        super().__post_init__()
        if not 0 < self.step_size < 1:
            raise UsageError(f"step_size must be above 0 and below 1, not {self.step_size}")

    def walk(self, attacks: Any) -> Any:
        """Return foolbox's attack."""
        return attacks.BoundaryAttack(steps=self.steps, spherical_step=self.step_size, source_step=self.step_size)


@keras.saving.register_keras_serializable(package="kerasdefense")
@dataclasses.dataclass(frozen=True)
class FoolboxHopSkipJump(_FoolboxDecisionAttack):
    """foolbox's HopSkipJump: steps along a gradient estimated from decisions, and after each back to the boundary.

    Attributes:
        directions: random directions in the first estimate; their number grows with the root of the step.
        queries: passes through the model at most, of which the nearest image that fooled is the result, and none once
            all images fool within the ball; 0 = as many as the steps take.

    Source: Chen et al. 2020. Deviations: foolbox scales an estimated gradient by its length over the whole batch, so
    that steps in l2 are the shorter the larger the batch is.
    """

    steps: int = 32
    directions: int = 100
    queries: int = 0

    def __post_init__(self) -> None:
        """Check the search."""
        super().__post_init__()
        if self.directions < 1:
            raise UsageError(f"directions must be at least 1, not {self.directions}")
        if self.queries < 0 or 0 < self.queries <= _AROUND:
            raise UsageError(f"queries must be 0 or above {_AROUND}, not {self.queries}")

    def perturb(self, logits_fn: LogitsFn, image: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
        """Call foolbox, and go a little past the boundary; with a limit on queries, from the nearest image known."""
        if not self.queries:
            return super().perturb(logits_fn, image, label)
        passes = self.queries - _AROUND
        nearest = _Nearest(logits_fn, image, label, norm=self.norm, epsilon=self.epsilon, passes=passes)
        with contextlib.suppress(_Spent):
            self.minimise(_import_foolbox().TensorFlowModel(nearest, bounds=(0, 1), device=image.device), image, label)
        return nearest.found

    def walk(self, attacks: Any) -> Any:
        """Return foolbox's attack."""
        return attacks.HopSkipJumpAttack(
            steps=self.steps, initial_gradient_eval_steps=self.directions, constraint=self.norm
        )


def _criterion(label: tf.Tensor) -> Any:
    return _import_foolbox().Misclassification(tf.cast(label, tf.int64))


def _fooled(logits: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
    return tf.argmax(logits, axis=-1, output_type=tf.int32) != label


def _starting_points(model: Any, image: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return an image [batch, h, w, c] that fools for each one, and whether there is one, bool [batch]."""
    blend = _import_foolbox().attacks.LinearSearchBlendedUniformNoiseAttack(directions=_NOISES, steps=_BLENDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of too few noise images that fool
        blended = blend.run(model, image, _criterion(label))
    predicted = tf.argmax(model(image), axis=-1, output_type=tf.int32)
    rival = predicted[None, :] != label[:, None]
    by_noise = _fooled(model(blended), label)
    other = tf.gather(image, tf.argmax(tf.cast(rival, tf.int32), axis=1))
    return where(by_noise, blended, other), by_noise | tf.reduce_any(rival, axis=1)
