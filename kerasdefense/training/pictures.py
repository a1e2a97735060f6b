"""Example pictures: validation images clean and attacked, what the attack changed, and what the method draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import keras
import tensorflow as tf
from matplotlib import colormaps

from kerasdefense.data import Split
from kerasdefense.files import replacing

COUNT = 8
SHOWN_SIDE = 64
"""Pixels to which images are enlarged in the files, by a whole number of times."""


class Pictures(keras.callbacks.Callback):
    """After every validated epoch, write the first validation images clean, attacked, and what the attack changed.

    The perturbation is scaled so that the L-inf ball fills the grey range around its middle. Where the method draws
    images, what it draws of the attacked ones is shown too, and `reconstructions.png` has one column per image: clean,
    attacked, and what is drawn, such as decoded, or denoised and by how much that changed them. Where it tells where
    its networks look, the maps are shown, and `attention.png` has one column per image: clean, attacked, and a map of
    each network, from dark (0) to bright (1).

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
        self.attacked = tf.function(lambda batch: self.model.pictured(batch))

    def on_epoch_end(self, epoch: int, logs: Optional[dict[str, Any]] = None) -> None:
        """Write the pictures."""
        if not any(name.startswith("val_") for name in logs or {}):
            return
        with self.model.averaged():
            image, image_adv = self.batch["image"], self.attacked(self.model.unpack(self.batch))
            drawn = self.model.drawn(image_adv)
            attention = self.model.attention(image, image_adv) or {}
            maps = {name: _in_colours(each, image.shape[1:3]) for name, each in attention.items()}
        perturbation = 0.5 + (image_adv - image) / (2 * self.model.attack.epsilon + 1e-12)
        with self.writer.as_default(step=epoch + 1):
            tf.summary.image("clean", image, max_outputs=COUNT)
            tf.summary.image("adversarial", image_adv, max_outputs=COUNT)
            tf.summary.image("perturbation", tf.clip_by_value(perturbation, 0.0, 1.0), max_outputs=COUNT)
            for name, each in drawn.items():
                tf.summary.image(name, each, max_outputs=COUNT)
            for name, each in maps.items():
                tf.summary.image(f"attention_of_{name}", each, max_outputs=COUNT)
        self.writer.flush()
        if drawn:
            _write_rows(self.folder.parent / "reconstructions.png", image, image_adv, *drawn.values())
        if maps:
            _write_rows(self.folder.parent / "attention.png", image, image_adv, *maps.values())


def _in_colours(maps: tf.Tensor, size: Sequence[int]) -> tf.Tensor:
    """Return maps [count, h, w] in [0, 1] as images [count, *size, 3] in [0, 1]."""
    resized = tf.image.resize(maps[..., None], size)[..., 0]
    return tf.constant(colormaps["viridis"](resized.numpy())[..., :3], tf.float32)


def _write_rows(path: Path, *rows: tf.Tensor) -> None:
    """Write rows of images [count, h, w, c] in [0, 1], grey or of three colours, below each other to one PNG file."""
    colours = max(row.shape[-1] for row in rows)
    images = [row if row.shape[-1] == colours else tf.image.grayscale_to_rgb(row) for row in rows]
    picture = tf.concat([tf.concat(tf.unstack(row), axis=1) for row in images], axis=0)
    times = max(1, SHOWN_SIDE // rows[0].shape[1])
    picture = tf.repeat(tf.repeat(picture, times, axis=0), times, axis=1)
    png = tf.io.encode_png(tf.image.convert_image_dtype(picture, tf.uint8, saturate=True))
    with replacing(path) as temporary:
        temporary.write_bytes(png.numpy())
