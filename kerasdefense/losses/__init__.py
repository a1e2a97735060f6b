"""Losses: pure functions of tensors, one value per example."""

from kerasdefense.losses.classification import (
    boosted_cross_entropy,
    cross_entropy,
    dlr,
    kl_divergence,
    margin,
    targeted_dlr,
)
from kerasdefense.losses.open_set_defense import open_set_defense_terms, peer_terms
from kerasdefense.losses.reconstruction import reconstruction_error

__all__ = [
    "boosted_cross_entropy",
    "cross_entropy",
    "dlr",
    "kl_divergence",
    "margin",
    "open_set_defense_terms",
    "peer_terms",
    "reconstruction_error",
    "targeted_dlr",
]
