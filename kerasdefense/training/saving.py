"""TensorFlow checkpoints in a folder: the last few are kept, and a write that fails or is cut off leaves nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import tensorflow as tf

from kerasdefense.files import write_error

KEPT = 3


def open_folder(checkpoint: tf.train.Checkpoint, folder: Path, name: str) -> tf.train.CheckpointManager:
    """Return the manager of the checkpoints `<folder>/<name>-N.*`, and remove what a write that was cut off left."""
    _remove_unfinished(folder)
    return tf.train.CheckpointManager(checkpoint, str(folder), max_to_keep=KEPT, checkpoint_name=name)


def save(manager: tf.train.CheckpointManager, number: int) -> None:
    """Write checkpoint `number`; if that fails, nothing of it stays, and those before are untouched."""
    try:
        manager.save(checkpoint_number=number)
    except tf.errors.OpError as error:
        folder = Path(manager.directory)
        _remove_unfinished(folder)
        for file in folder.glob(f"*-{number}.*"):
            file.unlink()
        raise write_error(error, f"checkpoint {number} in {folder}") from error


def _remove_unfinished(folder: Path) -> None:
    for path in folder.glob("*_temp"):
        shutil.rmtree(path)
