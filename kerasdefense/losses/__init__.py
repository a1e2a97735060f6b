"""Losses: pure functions of tensors, one value per example."""

from kerasdefense.losses.classification import (
    boosted_cross_entropy,
    cross_entropy,
    dlr,
    kl_divergence,
    margin,
    targeted_dlr,
)
from kerasdefense.losses.reconstruction import reconstruction_error

__all__ = [
    "boosted_cross_entropy",
    "cross_entropy",
    "dlr",
    "kl_divergence",
    "margin",
    "reconstruction_error",
    "targeted_dlr",
]
