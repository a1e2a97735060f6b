"""Example pictures: validation images clean and attacked, what the attack changed, and what the method drew anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import keras
import tensorflow as tf

from kerasdefense.data import Split
from kerasdefense.files import replacing

COUNT = 8


class Pictures(keras.callbacks.Callback):
    """After every validated epoch, write the first validation images clean, attacked, and what the attack changed.

    The perturbation is scaled so that the L-inf ball fills the grey range around its middle. Where the method draws
    images anew, what it draws of the attacked ones is shown too, and `reconstructions.png` has one column per image:
    clean, attacked, decoded.

    Args:
        folder: TensorBoard's folder, in the run directory.
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
            decoded = self.model.reconstructed(image_adv)
        perturbation = 0.5 + (image_adv - image) / (2 * self.model.attack.epsilon + 1e-12)
        with self.writer.as_default(step=epoch + 1):
            tf.summary.image("clean", image, max_outputs=COUNT)
            tf.summary.image("adversarial", image_adv, max_outputs=COUNT)
            tf.summary.image("perturbation", tf.clip_by_value(perturbation, 0.0, 1.0), max_outputs=COUNT)
            if decoded is not None:
                tf.summary.image("decoded", decoded, max_outputs=COUNT)
        self.writer.flush()
        if decoded is not None:
            _write_rows(self.folder.parent / "reconstructions.png", image, image_adv, decoded)


def _write_rows(path: Path, *rows: tf.Tensor) -> None:
    """Write rows of images [count, h, w, c] in [0, 1], one below the other, to one PNG file."""
    picture = tf.concat([tf.concat(tf.unstack(row), axis=1) for row in rows], axis=0)
    png = tf.io.encode_png(tf.image.convert_image_dtype(picture, tf.uint8, saturate=True))
    with replacing(path) as temporary:
        temporary.write_bytes(png.numpy())
