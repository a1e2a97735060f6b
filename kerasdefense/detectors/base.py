"""What every detector of unknown images is: fitted on a classifier's activations, and a score of other activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Callable, ClassVar, Optional

import numpy as np
import tensorflow as tf

from kerasdefense.detectors.training import Head, Training, check_training
from kerasdefense.types import Activations, ActivationsFn, InputError, UsageError

ScoreFn = Callable[[Activations], tf.Tensor]
"""`score_fn(activations) -> [batch]`."""


class Detector(tf.Module):
    """Score images by how unknown they look to a classifier: higher = more unknown.

    A subclass names what it `needs`, returns its `fitted` arrays from `_fit` and its score from `_score`. The arrays
    are non-trainable variables, so that an exported model holds them as such; a fit makes new ones, so that a graph
    traced before it keeps the old.
    """

    needs: ClassVar[tuple[str, ...]] = ("logits",)
    """The activations that it uses, of `logits` and `embedding`."""

    needs_head: ClassVar[bool] = False
    """Whether a fit needs kernel and bias of the classifier's last layer."""

    takes_cosines: ClassVar[bool] = False
    """Whether that layer may give cosines in place of `embedding @ kernel + bias`."""

    fitted: ClassVar[tuple[str, ...]] = ()
    """Names of the arrays that a fit finds; none where the detector can score without."""

    scores_images: ClassVar[bool] = False
    """Whether it scores by `score_image` alone, not by activations that are at hand."""

    follows_own: ClassVar[bool] = True
    """Whether an attacker gains by following the score itself beside its `stand_ins`."""

    notes: tuple[str, ...] = ()
    """What the last fit had to do without, in words."""

    def fit(self, activations: Mapping[str, np.ndarray], label: np.ndarray, head: Optional[Head] = None) -> Detector:
        """Fit the detector, in float64, to training images of known classes.

        Args:
            activations: `logits` float [n, classes] and `embedding` float [n, d], those that the detector needs.
            label: int [n], in [0, classes); images of unknown classes have no place here.
            head: the classifier's last layer, or its kernel [d, classes] and bias [classes] or None as a pair.

        Returns:
            The detector itself.

        Raises:
            UsageError: an activation or the head is missing, the head gives cosines, from which the detector cannot be
                computed, or a setting does not go with the data.
            InputError: no images, other lengths, NaN or infinity, or a label outside [0, classes).
        """
        head = None if head is None else Head(*head)
        if self.needs_head and head is not None and not (head.is_linear or self.takes_cosines):
            raise UsageError(
                f"{type(self).__name__} needs logits = embedding @ kernel + bias, but those of this model are cosines "
                "with frozen axes (--backbone_head=orthogonal); leave it out of --detector_name"
            )
        training = check_training(activations, label, head, needs=self.needs, needs_head=self.needs_head)
        notes: list[str] = []
        self._keep(self._fit(training, notes))
        self.notes = tuple(notes)
        return self

    def score(self, activations: Activations) -> tf.Tensor:
        """Return the anomaly score, higher = more unknown.

        Args:
            activations: `logits` float [batch, classes] and `embedding` float [batch, d], those that it needs.

        Returns:
            float32 [batch].

        Raises:
            UsageError: the detector is not fitted, or an activation is missing.
        """
        return self._score(self._read(activations))

    def score_image(self, activations_fn: ActivationsFn, image: tf.Tensor) -> tf.Tensor:
        """Return the anomaly score of images, higher = more unknown.

        Args:
            activations_fn: the classifier, `activations_fn(image) -> activations`.
            image: float32 [batch, height, width, channels] in [0, 1].

        Returns:
            float32 [batch].
        """
        return self.score(activations_fn(image))

    def score_with(self, activations: Activations, activations_fn: ActivationsFn, image: tf.Tensor) -> tf.Tensor:
        """Return the anomaly score [batch] of images whose activations are at hand, by more passes if need be."""
        return self.score_image(activations_fn, image) if self.scores_images else self.score(activations)

    def stand_ins(self) -> dict[str, ScoreFn]:
        """Return smooth scores, higher = more unknown, for attacks to follow where the own one's gradient fails."""

        def checked(stand_in: ScoreFn) -> ScoreFn:
            return lambda activations: stand_in(self._read(activations))

        return {name: checked(stand_in) for name, stand_in in self._stand_ins().items()}

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {}

    def recorded(self) -> dict[str, Any]:
        """Return what a model card tells of the detector: its settings, and facts of the fit."""
        return self.get_config()

    @property
    def is_fitted(self) -> bool:
        """Whether it can score."""
        return all(hasattr(self, name) for name in self.fitted)

    def state(self) -> dict[str, np.ndarray]:
        """Return the fitted arrays by name, none where nothing is fitted."""
        return {name: np.asarray(getattr(self, name).numpy()) for name in self.fitted} if self.is_fitted else {}

    def restore(self, state: Mapping[str, np.ndarray], notes: tuple[str, ...] = ()) -> Detector:
        """Take over the fitted arrays of `state()` and the notes of that fit; return the detector itself.

        Raises:
            InputError: `state` has other names than those of `fitted`.
        """
        if state and set(state) != set(self.fitted):
            name, expected = type(self).__name__, ", ".join(self.fitted) or "nothing"
            raise InputError(f"the state of a fitted {name} holds {expected}, not {', '.join(sorted(state))}")
        self._keep(state)
        self.notes = tuple(notes)
        return self

    def _keep(self, arrays: Mapping[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            dtype = np.float32 if np.issubdtype(np.asarray(array).dtype, np.floating) else np.int32
            setattr(self, name, tf.Variable(np.asarray(array, dtype), trainable=False, name=name))

    def _read(self, activations: Activations) -> dict[str, tf.Tensor]:
        name = type(self).__name__
        if not self.is_fitted:
            raise UsageError(f"{name} is not fitted; call fit or restore before it scores")
        missing = [each for each in self.needs if each not in activations]
        if missing:
            raise UsageError(f"{name} scores {' and '.join(self.needs)}; missing: {', '.join(missing)}")
        return {each: tf.cast(activations[each], tf.float32) for each in self.needs}

    def _fit(self, training: Training, notes: list[str]) -> dict[str, np.ndarray]:
        """Return the arrays named in `fitted`; append to `notes` what had to be done without."""
        return {}

    def _score(self, activations: Activations) -> tf.Tensor:
        """Return the anomaly score of float32 activations."""
        raise NotImplementedError

    def _stand_ins(self) -> dict[str, ScoreFn]:
        """Return the smooth scores, of float32 activations."""
        return {}
