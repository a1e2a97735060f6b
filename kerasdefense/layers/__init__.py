"""Layers that Keras does not have, and a transformation of images without weights."""

from __future__ import annotations

from kerasdefense.layers.denoising import DENOISERS, DualAttention, NonLocal
from kerasdefense.layers.gate import Gate
from kerasdefense.layers.logits import Logits
from kerasdefense.layers.orthogonal import OrthogonalHead
from kerasdefense.layers.random_transform import RandomTransform, fresh_seeds
from kerasdefense.layers.rotation import rotate
from kerasdefense.layers.spectral import SpectralConv2D
from kerasdefense.layers.tokens import MaskToken, Positions

__all__ = [
    "DENOISERS",
    "DualAttention",
    "Gate",
    "Logits",
    "MaskToken",
    "NonLocal",
    "OrthogonalHead",
    "Positions",
    "RandomTransform",
    "SpectralConv2D",
    "fresh_seeds",
    "rotate",
]
