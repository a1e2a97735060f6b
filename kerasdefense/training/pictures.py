"""Example pictures for TensorBoard: validation images clean and attacked, and what the attack changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import keras
import tensorflow as tf

from kerasdefense.data import Split

COUNT = 8


class Pictures(keras.callbacks.Callback):
    """After every validated epoch, write the first validation images clean, attacked, and what the attack changed.

    The perturbation is scaled so that the L-inf ball fills the grey range around its middle.

    Args:
        folder: TensorBoard's folder.
        validation: where the images are from.
    """

    def __init__(self, folder: Path, validation: Split) -> None:
        super().__init__()
        self.folder = folder
        self.batch = next(iter(validation.batches(COUNT)))

    def on_train_begin(self, logs: Optional[dict[str, float]] = None) -> None:
        """Compile the attack."""
        self.writer = tf.summary.create_file_writer(str(self.folder / "pictures"))
        self.attacked = tf.function(lambda batch: self.model.attacked(batch))

    def on_epoch_end(self, epoch: int, logs: Optional[dict[str, Any]] = None) -> None:
        """Write the pictures."""
        if not any(name.startswith("val_") for name in logs or {}):
            return
        with self.model.averaged():
            image, image_adv = self.batch["image"], self.attacked(self.model.unpack(self.batch))
        perturbation = 0.5 + (image_adv - image) / (2 * self.model.attack.epsilon + 1e-12)
        with self.writer.as_default(step=epoch + 1):
            tf.summary.image("clean", image, max_outputs=COUNT)
            tf.summary.image("adversarial", image_adv, max_outputs=COUNT)
            tf.summary.image("perturbation", tf.clip_by_value(perturbation, 0.0, 1.0), max_outputs=COUNT)
        self.writer.flush()
