"""Layers that Keras does not have."""

from __future__ import annotations

from kerasdefense.layers.logits import Logits

__all__ = ["Logits"]
