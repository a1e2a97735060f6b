"""ODIN: confidence at a high temperature, after a step of the image towards the class it is taken for."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from kerasdefense import losses
from kerasdefense.detectors.base import Detector, ScoreFn
from kerasdefense.detectors.confidence import check_temperature, log_odds_against
from kerasdefense.types import Activations, ActivationsFn, UsageError


class ODIN(Detector):
    """Minus the largest probability of the stepped image, `-max_c softmax(logits(stepped) / temperature)_c`.

    1. Take the class with the largest logit as the label.
    2. `stepped = clip(image - step * sign(gradient of the cross-entropy of logits(image) / temperature), 0, 1)`, with
       sign(0) = 1.
    3. Return minus the largest probability at `stepped`.

    The gradient of the score takes the step as a constant.

    Args:
        temperature: above 0.
        step: length of the step as a fraction of the [0, 1] range, at least 0.

    Source: Liang et al. 2018, section 3, and its authors' code for sign(0). Deviations: the stepped image is clipped to
    [0, 1]; the step is in units of the image, before the model normalises it.
    """

    scores_images = True

    def __init__(self, temperature: float = 1000.0, step: float = 0.0014) -> None:
        super().__init__()
        if not 0 <= step < float("inf"):
            raise UsageError(f"step of odin must be a finite number of at least 0, not {step}")
        self.temperature, self.step = check_temperature(temperature), step

    def score_image(self, activations_fn: ActivationsFn, image: tf.Tensor) -> tf.Tensor:
        """Return the anomaly score of images, higher = more unknown.

        Args:
            activations_fn: the classifier, `activations_fn(image) -> activations`.
            image: float32 [batch, height, width, channels] in [0, 1].

        Returns:
            float32 [batch].
        """
        image = tf.convert_to_tensor(image, tf.float32)
        fixed = tf.stop_gradient(image)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(fixed)
            logits = self._scaled(activations_fn(fixed))
            loss = losses.cross_entropy(logits, tf.argmax(logits, axis=-1))
        gradient = tape.gradient(loss, fixed, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        sign = tf.stop_gradient(tf.where(gradient >= 0, 1.0, -1.0))
        stepped = tf.clip_by_value(image - self.step * sign, 0.0, 1.0)
        return -tf.reduce_max(tf.nn.softmax(self._scaled(activations_fn(stepped))), axis=-1)

    def get_config(self) -> dict[str, Any]:
        """Return every constructor argument."""
        return {"temperature": self.temperature, "step": self.step}

    def _scaled(self, activations: Activations) -> tf.Tensor:
        return self._read(activations)["logits"] / self.temperature

    def _score(self, activations: Activations) -> tf.Tensor:
        raise UsageError("odin scores images, as it takes a step on them, not activations; use score_image")

    def _stand_ins(self) -> dict[str, ScoreFn]:
        return {"unperturbed": lambda activations: log_odds_against(activations["logits"] / self.temperature)}
