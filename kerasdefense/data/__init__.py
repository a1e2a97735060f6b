"""Data sets: bundled digits, TFDS sets by name, folders of images or of tf.Examples; `load(config.Data) -> Splits`."""

from __future__ import annotations

from kerasdefense.data.loading import load
from kerasdefense.data.splits import Split, Splits, TrainSplit

__all__ = ["Split", "Splits", "TrainSplit", "load"]
