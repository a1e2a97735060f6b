"""Losses: pure functions of tensors, one value per example."""

from kerasdefense.losses.aggregation import aggregation, check_aggregation, mixed_cross_entropy
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
    "aggregation",
    "boosted_cross_entropy",
    "check_aggregation",
    "cross_entropy",
    "dlr",
    "kl_divergence",
    "margin",
    "mixed_cross_entropy",
    "open_set_defense_terms",
    "peer_terms",
    "reconstruction_error",
    "targeted_dlr",
]
